"""The experts of a layer as transformers keeps them: two parameters, each with one matrix for every expert.

    up      [E, N, K]   makes the hidden values of an expert of its input: gate and up together, or up alone
    down    [E, N, K]   makes its output of what the gate leaves of them

Blocks of NVFP4 run along the inputs K of a matrix. Some classes keep matrices with inputs first, [E, K, N]. Such a parameter is held as
[E, N, K] while it is quantized, so that kernels, shards and checkpoints know one layout, and the forward sees it transposed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvfp4_train.quant.served import rows_first_of

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",)}
"""Names of the up parameter -> what serving engines call the matrices that its rows belong to."""

DOWN_NAME = "down_proj"


@dataclass(frozen=True, kw_only=True)
class ExpertWeight:
    """A parameter with the matrices of all experts of a layer."""

    module: nn.Module
    module_name: str
    leaf: str
    """Name of the parameter in the module."""
    partner: str
    """The other parameter of the experts, by name in the model: serving engines take all matrices of an expert for quantized, or none.
    """
    num_experts: int
    num_outputs: int
    """N."""
    num_inputs: int
    """K."""
    is_transposed: bool
    """Whether its class computes with [E, K, N]."""
    projections: tuple[str, ...]
    """What serving engines call the matrices that its rows belong to: one, or gate and up."""
    is_interleaved: bool
    """Whether rows of gate and up alternate. Otherwise those of the gate come first."""
    can_open_inputs: bool
    """Whether its input can be measured and quantized: its class computes by transformers' common implementations."""

    @property
    def name(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.module_name}.{self.leaf}".removeprefix(".")

    def rows(self, projection: str) -> slice:
        """The rows of one of the projections."""
        index = self.projections.index(projection)
        if self.is_interleaved:
            return slice(index, None, len(self.projections))
        size = self.num_outputs // len(self.projections)
        return slice(index * size, (index + 1) * size)


def find_experts(model: nn.Module) -> dict[str, ExpertWeight]:
    """The expert parameters of a model by name. It may be on the meta device, sharded, or hold them with rows first already."""
    found = {}
    for module_name, module in model.named_modules():
        matrices = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.dim() == 3}
        up = next((leaf for leaf in PROJECTIONS if leaf in matrices), None)
        if up is not None and DOWN_NAME in matrices:
            for weight in _weights_of(module_name, module, up, matrices):
                found[weight.name] = weight
    return found


def _weights_of(module_name: str, module: nn.Module, up: str, matrices: Mapping[str, Tensor]) -> list[ExpertWeight]:
    held = rows_first_of(module)
    is_transposed = bool(held) or _is_transposed(module, matrices[up].shape, matrices[DOWN_NAME].shape)
    weights = []
    for leaf, partner, projections in (
        (up, DOWN_NAME, PROJECTIONS[up]),
        (DOWN_NAME, up, (DOWN_NAME,)),
    ):
        num_experts, *sizes = matrices[leaf].shape
        is_inputs_first = is_transposed and leaf not in held
        weights.append(
            ExpertWeight(
                module=module,
                module_name=module_name,
                leaf=leaf,
                partner=f"{module_name}.{partner}".removeprefix("."),
                num_experts=num_experts,
                num_outputs=sizes[1 if is_inputs_first else 0],
                num_inputs=sizes[0 if is_inputs_first else 1],
                is_transposed=is_transposed,
                projections=projections,
                is_interleaved=len(projections) > 1 and not getattr(module, "is_concatenated", True),
                can_open_inputs=_is_common(module),
            )
        )
    return weights


def _is_transposed(module: nn.Module, up: torch.Size, down: torch.Size) -> bool:
    """Whether a class keeps [E, K, N]. Classes that share transformers' implementations say so, shapes tell of others."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    return up[1] == down[2] and up[2] == 2 * down[1]


def _is_common(module: nn.Module) -> bool:
    """Whether experts compute by one of transformers' implementations for all families, which have one way to the down matrices."""
    return hasattr(module, "is_transposed") and getattr(module.config, "_experts_implementation", None) != "eager"


def hold_rows_first(model: nn.Module, names: Iterable[str]) -> None:
    """Hold those of the expert parameters of that name that are [E, K, N] as [E, N, K], in place. `show_served` shows them transposed.

    The parameters stay the same objects.
    """
    experts = find_experts(model)
    for name in names:
        weight = experts.get(name)
        if weight is None or not weight.is_transposed or weight.leaf in rows_first_of(weight.module):
            continue
        parameter = weight.module._parameters[weight.leaf]
        assert parameter is not None
        parameter.data = parameter.data.transpose(1, 2).contiguous()
        weight.module.rows_first = rows_first_of(weight.module) | {weight.leaf}  # type: ignore[assignment]


def held_rows_first(model: nn.Module) -> set[str]:
    """Names of the parameters that `hold_rows_first` has changed."""
    return {f"{prefix}.{leaf}".removeprefix(".") for prefix, m in model.named_modules() for leaf in rows_first_of(m)}


def input_module(model: nn.Module, name: str) -> nn.Module:
    """The module whose first argument is what a quantized parameter is multiplied with, by the parameter's name.

    It is a linear itself; of expert parameters it exists once `expert_inputs.open_inputs` has made it.
    """
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf == "weight":
        return module
    return module.get_submodule("down_input" if leaf == DOWN_NAME else "up_input")


def owner_of(name: str) -> str:
    """What a quantized parameter is called where people read it: its linear, or the parameter of experts itself."""
    return name.removesuffix(".weight")
