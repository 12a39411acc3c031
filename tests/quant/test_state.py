"""What the quantizer remembers: where it lies, under which names, and on whom it is sharded."""

import pytest
import torch
from torch import nn

from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.quant.calibration import InputStatistics
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.state import QuantState

WEIGHTS = {
    "layers.0.q.weight": torch.randn(8, 32),
    "layers.0.k.weight": torch.randn(4, 32),
    "layers.0.down.weight": torch.randn(8, 48),
}
GROUPS = (("layers.0.q.weight", "layers.0.k.weight"), ("layers.0.down.weight",))


def state_of(rule: str) -> QuantState:
    return QuantState(WEIGHTS, QuantManifest(groups=GROUPS, rule=ScaleRule(block_scale=rule)))


def test_names_are_those_of_parameters() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state_of("hessian").state_dict().items()}
    assert shapes == {
        "layers.0.q.weight.input_scale": (1,),
        "layers.0.q.weight.hessian": (2, 16, 16),
        "layers.0.q.weight.steps": (8, 2),
        "layers.0.k.weight.steps": (4, 2),
        "layers.0.down.weight.input_scale": (1,),
        "layers.0.down.weight.hessian": (3, 16, 16),
        "layers.0.down.weight.steps": (8, 3),
    }
    assert set(state_of("max").state_dict()) == {"layers.0.q.weight.input_scale", "layers.0.down.weight.input_scale"}


def test_siblings_share_what_is_of_their_input() -> None:
    state = state_of("hessian")
    assert state.hessian("layers.0.k.weight") is state.hessian("layers.0.q.weight")
    assert state.input_scale("layers.0.k.weight") is state.input_scale("layers.0.q.weight")


@pytest.mark.parametrize(
    ("amax", "headroom", "scale"),
    [
        (2688.0, 1.0, 1.0),
        (2688.5, 1.0, 2.0),
        (2688.0, 2.0, 2.0),
        (1.0, 2.0, 2.0**-10),
        (21.0, 2.0, 2.0**-6),
        (21.1, 2.0, 2.0**-5),
    ],
)
def test_an_input_scale_is_the_least_power_of_two_with_headroom(amax: float, headroom: float, scale: float) -> None:
    state = state_of("hessian")
    hessian = torch.randn(2, 16, 16)
    measured = InputStatistics(hessian=hessian, amax=torch.tensor([0.5, amax] * 16), rms=torch.ones(32), num_tokens=1)
    state.fill({"layers.0.q.weight": measured}, headroom=headroom)
    assert state.input_scale("layers.0.k.weight").item() == scale
    assert torch.equal(state.hessian("layers.0.k.weight"), hessian)
    assert state.input_scale("layers.0.down.weight").item() == 0, "not calibrated"
    assert headroom * amax * (1 / scale) <= 2688


def test_it_is_no_part_of_what_is_trained() -> None:
    state = state_of("hessian")
    assert not list(state.parameters())
    assert all(not buffer.requires_grad for buffer in state.buffers())
    holder = nn.Module()
    holder.quant_state = state
    assert "quant_state.layers.0.k.weight.steps" in holder.state_dict()
