"""Refined scales lose less in a layer's output than those that the search begins with, and channels that are read together stay so."""

from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_train.kernels import reference
from nvfp4_train.models.equalize_search import draw_inputs, refine
from nvfp4_train.models.fold_sites import FoldSite
from nvfp4_train.quant.calibration import InputStatistics, second_moments

TOKENS = 512


def spread(*shape: int, seed: int) -> Tensor:
    """Channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (1.5 * torch.randn(shape[-1], generator=generator)).exp2()


def statistics_of(x: Tensor) -> InputStatistics:
    hessian = (second_moments(x) / len(x)).float()
    return InputStatistics(
        hessian=hessian, amax=x.abs().amax(0), rms=hessian.diagonal(dim1=1, dim2=2).flatten().sqrt(), num_tokens=len(x)
    )


def site(num_channels: int, inputs: dict[str, Tensor]) -> FoldSite:
    return FoldSite(name="norm", feeder=nn.Identity(), num_channels=num_channels, outputs=[], readers=[], inputs=inputs)


def refined(
    sites: list[FoldSite],
    start: list[Tensor],
    groups: dict[str, list[Tensor]],
    statistics: dict[str, InputStatistics],
    **options: Any,
) -> list[Tensor]:
    column_amax = {group: torch.cat(weights).abs().amax(0).double() for group, weights in groups.items()}
    return refine(sites, start, groups, column_amax, statistics, **options)


def lost(x: Tensor, weight: Tensor, s: Tensor) -> float:
    """Mean square of what quantization of both adds to an output of the layer."""
    scaled, scaled_x = weight * s, x / s
    w_hat = reference.fake_quant(scaled, reference.global_scale(scaled.abs().amax()), torch.float32)
    x_hat = reference.fake_quant_input(scaled_x, reference.global_scale(2 * scaled_x.abs().amax()))
    return ((x_hat @ w_hat.T - x @ weight.T) ** 2).mean().item()


def test_refined_scales_lose_less() -> None:
    x, weight = spread(TOKENS, 64, seed=0), spread(96, 64, seed=1)
    start = torch.ones(64)
    (s,) = refined([site(64, {"w": torch.arange(64)})], [start], {"w": [weight]}, {"w": statistics_of(x)})
    assert lost(x, weight, s) < 0.6 * lost(x, weight, start)


def test_groups_and_places_that_share_channels_share_scales() -> None:
    """As the channels of a value head do: two query heads read them, and here a second group does."""
    x, weight, other = spread(TOKENS, 64, seed=0), spread(96, 64, seed=1), spread(40, 32, seed=2)
    inputs = {"w": torch.arange(32).repeat(2), "other": torch.arange(32)}
    statistics = {"w": statistics_of(x), "other": statistics_of(x[:, :32])}
    (s,) = refined([site(32, inputs)], [torch.ones(32)], {"w": [weight], "other": [other]}, statistics)
    assert lost(x, weight, s.repeat(2)) < 0.8 * lost(x, weight, torch.ones(64))
    assert s.shape == (32,)
    assert not torch.equal(s, torch.ones(32))


def test_steps_of_one_keep_powers_of_two() -> None:
    x, weight = spread(TOKENS, 32, seed=0), spread(96, 32, seed=1)
    (s,) = refined([site(32, {"w": torch.arange(32)})], [torch.ones(32)], {"w": [weight]}, {"w": statistics_of(x)}, steps=[1.0])
    assert torch.equal(s.log2(), s.log2().round())
    assert not torch.equal(s, torch.ones(32))


def test_channels_at_other_places_of_other_blocks_keep_their_scales() -> None:
    x, weight, start = spread(TOKENS, 64, seed=0), spread(96, 64, seed=1), torch.arange(32) + 1.0
    inputs = {"w": torch.cat((torch.arange(32), torch.arange(32).roll(1)))}
    (s,) = refined([site(32, inputs)], [start], {"w": [weight]}, {"w": statistics_of(x)})
    assert torch.equal(s, start)


def test_many_rows_are_thinned_out() -> None:
    x, weight = spread(TOKENS, 32, seed=0), spread(3000, 32, seed=1)
    (s,) = refined([site(32, {"w": torch.arange(32)})], [torch.ones(32)], {"w": [weight]}, {"w": statistics_of(x)})
    assert lost(x, weight, s) < 0.7 * lost(x, weight, torch.ones(32))


def test_drawn_inputs_have_the_second_moments() -> None:
    hessian = statistics_of(spread(TOKENS, 32, seed=0)).hessian
    drawn = second_moments(draw_inputs(hessian)) / len(draw_inputs(hessian))
    size = hessian.diagonal(dim1=1, dim2=2).sqrt()
    assert ((drawn - hessian) / (size.unsqueeze(1) * size.unsqueeze(2))).abs().max() < 0.3
