"""The error of hidden states: its formula, which layers it is of, and when their outputs are recorded."""

from typing import Any

import pytest
import torch
from test_distillation import batch, build, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nvfp4_train.losses.distillation import DistillationLoss
from nvfp4_train.losses.divergence import Positions
from nvfp4_train.losses.hidden import LayerOutputs, hidden_error
from nvfp4_train.models.causal_lm import decoder_layers


class Layer(nn.Module):
    """Returns its output alone, or as the first of a tuple."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.in_tuple = in_tuple

    def forward(self, x: Tensor) -> Any:
        x = x + torch.tanh(self.linear(x))
        return (x, None) if self.in_tuple else x


class Stack(nn.Module):
    _no_split_modules = ("Layer",)

    def __init__(self, num_layers: int, in_tuple: bool = False, recomputes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(in_tuple) for _ in range(num_layers))
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs of all layers."""
        outputs = []
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
            x = x[0] if isinstance(x, tuple) else x
            outputs.append(x)
        return outputs


def mean_error(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The error over all positions."""
    num_positions = teacher[0][..., 0].numel()
    return hidden_error(student, teacher, torch.full((num_positions,), 1 / num_positions))


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_it_is_the_mean_square_by_the_variance_of_the_teachers_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 5, 3, generator=generator) for _ in range(2)] for _ in range(2))
    total = 0.0
    for h, t in zip(student, teacher, strict=True):
        for channel in range(3):
            own = t[..., channel].double()
            mean = own.sum() / 10
            variance = ((own - mean) ** 2).sum() / 10
            total += float(((h[..., channel].double() - own) ** 2 / variance).sum())
    assert mean_error(student, teacher).item() == pytest.approx(total / (2 * 5 * 3 * 2), rel=1e-4)
    assert mean_error(teacher, teacher) == 0


def test_what_predicting_the_mean_costs_is_1() -> None:
    teacher = torch.randn(3, 7, 4) * torch.tensor([0.1, 1.0, 5.0, 10.0]) + 3
    mean = teacher.mean((0, 1), keepdim=True).expand_as(teacher)
    assert mean_error([mean], [teacher]).item() == pytest.approx(1, rel=1e-2)


def test_a_channel_that_never_varies_does_not_outweigh_the_others() -> None:
    teacher = torch.randn(4, 50, 4)
    teacher[..., 0] = 2.0
    student = teacher.clone()
    student[..., 0] += 1e-3
    assert mean_error([student], [teacher]).item() == pytest.approx(1 / teacher.square().mean().item() / 4, rel=1e-3)


def test_positions_that_do_not_count_cost_nothing() -> None:
    student, teacher = torch.randn(2, 1, 6, 4)
    weights = torch.tensor([0.5, 0.0, 0.0, 0.5, 0.0, 0.0])
    changed = student.clone()
    changed[:, [1, 2, 4, 5]] += 100
    assert hidden_error([changed], [teacher], weights) == hidden_error([student], [teacher], weights) > 0
    assert hidden_error([student], [teacher], torch.zeros(6)) == 0


def test_hidden_states_that_never_vary_give_numbers() -> None:
    for teacher in (torch.ones(2, 8, 4), torch.zeros(2, 8, 4)):
        assert mean_error([teacher], [teacher]) == 0
    assert mean_error([torch.full((2, 8, 4), 2.0)], [torch.ones(2, 8, 4)]).isfinite()


def test_bf16_is_compared_in_fp32_and_the_gradient_is_that_of_the_student() -> None:
    teacher = torch.randn(2, 9, 4, dtype=torch.bfloat16)
    student = (teacher + 0.1).requires_grad_()
    error = mean_error([student], [teacher])
    error.backward()
    assert error.dtype is torch.float32
    variance = teacher.float().flatten(0, 1).var(0, correction=0)
    difference = student.detach().float() - teacher.float()
    expected = 2 * difference / (variance + 1e-6 * teacher.float().square().mean()) / difference.numel()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.float(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("num_layers", "recorded"),
    [
        (1, [0]),
        (4, [0, 1, 2, 3]),
        (6, [0, 1, 2, 3, 4, 5]),
        (7, [0, 1, 2, 3, 4, 6]),
        (12, [1, 3, 5, 7, 9, 11]),
        (30, [4, 9, 14, 19, 24, 29]),
        (32, [4, 9, 15, 20, 25, 31]),
    ],
)
@pytest.mark.parametrize("in_tuple", [False, True])
def test_six_layers_are_evenly_spaced_and_the_last_is_among_them(num_layers: int, recorded: list[int], in_tuple: bool) -> None:
    model = Stack(num_layers, in_tuple)
    outputs = LayerOutputs(model)
    outputs.start()
    every = model(X)
    found = outputs.take()
    assert len(found) == len(recorded)
    assert all(tensor is every[index] for tensor, index in zip(found, recorded, strict=True))


def test_nothing_is_recorded_before_the_start_or_after_it_was_taken() -> None:
    model = Stack(3)
    outputs = LayerOutputs(model)
    model(X)
    outputs.start()
    assert outputs.take() == []
    model(X)
    assert outputs.take() == []
    outputs.start()
    model(X)
    model(2 * X)
    assert torch.equal(outputs.take()[-1], model(2 * X)[-1]), "of the last forward"


def test_what_a_backward_recomputes_is_not_recorded() -> None:
    model, calls = Stack(3, recomputes=True), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: calls.append(module))
    outputs = LayerOutputs(model)
    outputs.start()
    every = model(X.clone().requires_grad_())
    found = outputs.take()
    assert all(tensor is own for tensor, own in zip(found, every, strict=True))
    mean_error(found, [torch.zeros_like(X) + torch.arange(8) * X] * 3).backward()
    assert calls == [*model.layers, *reversed(model.layers)]
    assert outputs.take() == []
    assert all(layer.linear.weight.grad is not None for layer in model.layers)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_are_recorded_without_another_compilation(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = Stack(4), Stack(4)
    for layer in compiled.layers:
        layer.compile(backend=backend)
    found = []
    for model in (plain, compiled):
        outputs = LayerOutputs(model)
        x = X.clone().requires_grad_()
        model(x)
        outputs.start()
        model(x)
        found.append(outputs.take())
        mean_error(found[-1], [X] * 4).backward()
    assert len(found[0]) == len(found[1]) == 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def recorded(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Outputs of all decoder layers, by hooks of our own."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(output)) for layer in decoder_layers(model)
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [output if isinstance(output, Tensor) else output[0] for output in found]


def test_the_loss_adds_it_with_its_weight_and_its_gradient() -> None:
    built, loss = build(hidden=0.5, cross_entropy=0.25)
    value, metrics = loss(built.model, batch())
    value.backward()
    found = gradients(built.model)

    with torch.no_grad():
        of_teacher = recorded(loss.teacher, batch()["input_ids"])
    error = hidden_error(recorded(built.model, batch()["input_ids"]), of_teacher, Positions.of(batch()).weights)
    # The same student and teacher.
    same, without = build(cross_entropy=0.25)
    plain, parts = without(same.model, batch())
    plain.backward()
    (0.5 * error).backward()
    assert value.item() == pytest.approx(plain.item() + 0.5 * error.item(), rel=1e-6)
    assert metrics["hidden_error"].item() == pytest.approx(error.item(), rel=1e-6)
    assert not metrics["hidden_error"].requires_grad
    assert metrics.keys() == parts.keys() | {"hidden_error"}
    of_error, of_rest = gradients(built.model), gradients(same.model)
    assert found.keys() == of_rest.keys() == of_error.keys() | {"lm_head.weight", "model.norm.weight"}
    for name, gradient in of_rest.items():
        expected = gradient + of_error.get(name, 0)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item(), msg=name)

    with torch.no_grad():
        assert loss(built.model, batch())[1].keys() == {"kl", "cross_entropy", "top1_agreement", "hidden_error"}


def test_a_weight_below_0_is_refused() -> None:
    for weight in (-0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="loss.hidden must be at least 0 and finite"):
            DistillationLoss(hidden=weight)
