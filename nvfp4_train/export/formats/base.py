"""What a format has to say about a folder. How tensors are found, split over files and verified is the same for all formats."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.manifest import QuantManifest


class QuantizedTensor(NamedTuple):
    """A quantized weight [S, N, K] of S slots: one for a linear."""

    codes: Tensor
    """uint8 [S, N, K / 2]: two E2M1 codes a byte, the even element in the low nibble."""
    block_scales: Tensor
    """float8_e4m3fn [S, N, K / 16]."""
    global_scale: Tensor
    """s2, float32 [S], on the CPU: a weight is value(code) * block scale * s2."""
    input_scale: Tensor | None
    """1 / g of the input, float32 [1], on the CPU; None where inputs are not quantized (`manifest.activations`)."""


class Unquantized(NamedTuple):
    """What serving engines would take for quantized linears, unless a config tells them otherwise."""

    modules: list[str]
    """Full names, in memory and on disk; `lm_head` first, which always stays as it is."""
    experts: list[str]
    """Names on disk of modules that hold experts (`model.layers.0.mlp.experts`), none of which is quantized. Engines ask for experts
    under names of their own, so a config has to match whatever lies below."""
    blocks: list[str]
    """Names on disk of blocks that transformers does not build (`mtp`), none of which is quantized."""


def unquantized(layout: HubLayout, quantized: Mapping[str, str]) -> Unquantized:
    """What stays unquantized, where `quantized` is not. Every format says it in a config, each in a language of its own."""
    modules, experts, blocks = ["lm_head"], layout.unquantized_experts(), layout.blocks_not_built()
    for name, hub_name in layout.linears().items():
        if name not in quantized:
            modules += [name, hub_name or name]
    of_experts = tuple(f"{name}." for name in experts)
    for name in layout.matrices_outside_linears():
        is_expert_of_block = ".experts." in name and name.startswith(tuple(f"{block}." for block in blocks))
        if not name.startswith(of_experts) and not is_expert_of_block:
            modules.append(name)
    return Unquantized(list(dict.fromkeys(modules)), experts, blocks)


class Format(Protocol):
    """A format of NVFP4 folders."""

    reader: str | None = None
    """Name of the reader, where it is another format's."""

    def tensors(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors that replace `module.weight` on disk, by name. `module` is a name on disk; its weight has one slot. Of experts it
        is called for every matrix of every expert.

        Called with tensors on the meta device as well, for names and sizes.
        """

    def configs(self, layout: HubLayout, quantized: Mapping[str, str], manifest: QuantManifest) -> dict[str, dict[str, Any]]:
        """JSON by file name. What is given for `config.json` is added to the config of the model.

        `quantized` are the quantized linears: name in memory -> name on disk. Quantized experts are those of `layout`.
        """

    def note(self, layout: HubLayout, quantized: Mapping[str, str]) -> str | None:
        """A line for the user about readers that do not load such a folder as it is, with the line that makes one that they load.

        FOLDER stands for the folder.
        """
        return None
