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
        """A line for the user about what readers make of such a folder."""
        return None
