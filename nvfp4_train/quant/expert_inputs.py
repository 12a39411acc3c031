"""Where the inputs of products with the matrices of experts can be measured and quantized.

An expert's up matrices get a token's hidden state, its down matrix what the gate makes of their product. All experts of a layer share
one input scale for each, so an expert that saw few tokens has one too.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nvfp4_train.quant.experts import find_experts
from nvfp4_train.quant.inputs import InputQuantizer
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import straight_through


class ExpertInput(nn.Module):
    """What a product with the matrices of all experts gets as its input [tokens, K] runs through one of these."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer: InputQuantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.quantizer is None or not self.quantizer.is_enabled:
            return x
        return straight_through(x, self.quantizer.fake_quant(x.detach()))


class _OpenExperts:
    """Mixin, put before the class of experts: inputs of their products run through submodules."""

    up_input: ExpertInput
    down_input: ExpertInput

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Every expert gets some of these rows, and quantizes them alike.
        return super().forward(self.up_input(hidden_states), *args, **kwargs)  # type: ignore[misc]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.down_input(super()._apply_gate(gate_up))  # type: ignore[misc]


_classes: dict[type, type] = {}


def open_inputs(model: nn.Module, names: Iterable[str]) -> None:
    """Let the inputs of products with expert parameters run through a module each, in place: see `experts.input_module`.

    Call it before `show_served`, torch.compile and `fully_shard`, all of which look at the classes of modules. Passes over names that
    are no experts, and experts that compute in a way of their own.
    """
    experts = find_experts(model)
    for weight in [experts[name] for name in names if name in experts]:
        module: Any = weight.module
        if isinstance(module, _OpenExperts) or not weight.can_open_inputs:
            continue
        module.up_input, module.down_input = ExpertInput(), ExpertInput()
        if not module.has_gate:
            module.act_fn = nn.Sequential(module.act_fn, module.down_input)
        cls = type(module)
        if cls not in _classes:
            _classes[cls] = type(cls.__name__, (_OpenExperts, cls), {"__module__": cls.__module__})
        module.__class__ = _classes[cls]


def has_open_inputs(module: nn.Module) -> bool:
    """Whether `open_inputs` has been applied to experts."""
    return isinstance(module, _OpenExperts)


def closed_groups(model: nn.Module, manifest: QuantManifest) -> list[str]:
    """The groups, by first parameter, of experts whose inputs are not open. What needs their inputs does not choose them."""
    experts = find_experts(model)
    return [group[0] for group in manifest.groups if group[0] in experts and not has_open_inputs(experts[group[0]].module)]
