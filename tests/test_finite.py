"""Norms and kinds of numbers that are not finite."""

import math

import pytest
import torch
from torch import nn

from nvfp4_train.finite import bad_weights, gradient_norms, kinds, largest_weights


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, dtype in enumerate(dtypes):
        found.append(nn.Parameter(torch.zeros(3 + 7 * index, 40, dtype=dtype)))
        found[-1].grad = torch.randn(found[-1].shape, generator=generator).to(dtype)
    return found


@pytest.mark.parametrize("dtypes", [[torch.float32] * 9, [torch.bfloat16, torch.float32, torch.bfloat16]], ids=["one", "two"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_norm_and_clipped_gradients_have_the_bits_of_torch(dtypes: list[torch.dtype], max_norm: float) -> None:
    ours, theirs = parameters(*dtypes), parameters(*dtypes)
    total, each = gradient_norms(ours)
    torch.nn.utils.clip_grads_with_norm_(ours, max_norm, total)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    if len(set(dtypes)) == 1:
        assert torch.equal(total, expected)
        assert all(torch.equal(our.grad, their.grad) for our, their in zip(ours, theirs, strict=True))
    else:
        torch.testing.assert_close(total, expected)
    torch.testing.assert_close(each.square().sum().sqrt(), total)


def test_norms_are_those_of_their_parameters() -> None:
    some = parameters(*[torch.float32] * 4)
    some[1].grad = None
    some[2].grad[0, 0] = torch.nan
    some[3].grad[-1, -1] = -torch.inf
    total, each = gradient_norms(some)
    assert kinds(each) == ["", "", "NaN", "Inf"]
    assert each[1] == 0
    assert kinds(total[None]) == ["NaN"]
    for parameter in some:
        parameter.grad = None
    total, each = gradient_norms(some)
    assert (total, each.tolist()) == (0, [0] * 4)


def test_large_weights_are_finite_and_empty_ones_too() -> None:
    weights = [torch.full((2, 2), 3e38), torch.zeros(0, 4), torch.tensor([1.0, torch.nan]), torch.tensor([-torch.inf, 0])]
    assert kinds(largest_weights(weights)) == ["", "", "NaN", "Inf"]
    assert kinds(largest_weights([])) == []


def test_bad_weights_have_their_names_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert bad_weights(model) == []
    model[0].weight.data[0, 0] = torch.nan
    model[1].bias.data[1] = torch.inf
    assert bad_weights(model) == [("0.weight", "NaN"), ("1.bias", "Inf")]
