"""Whoever reads marked channels is told which ones, exactly or not at all."""

import pytest
import torch
from torch import Tensor, nn

from nvfp4_train.models.channel_codes import ChannelCodes, power_of_two

FIRST, SECOND = nn.Identity(), nn.Identity()
REPEATED = torch.arange(64).view(4, 1, 16).expand(-1, 2, -1).flatten()
"""Every head of 16 channels is read twice."""


def codes() -> ChannelCodes:
    return ChannelCodes({FIRST: (64, slice(None)), SECOND: (96, slice(48, 96))}, torch.Generator().manual_seed(0))


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_powers_are_exact() -> None:
    assert power_of_two(torch.arange(-126, 128)).tolist() == [2.0**k for k in range(-126, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "channels"),
    [(FIRST, torch.arange(64)), (FIRST, REPEATED), (FIRST, torch.arange(40, 64)), (SECOND, torch.arange(48, 96))],
)
def test_readers_are_told_their_channels(module: nn.Module, channels: Tensor, dtype: torch.dtype) -> None:
    marks = codes()
    x = values(2, 5, len(channels)).to(dtype)
    found = marks.find(x, x * marks.scales[module][channels].to(dtype))
    assert found is not None
    assert found[0] is module
    assert torch.equal(found[1], channels)


def test_only_the_part_is_scaled() -> None:
    assert (codes().scales[SECOND][:48] == 1).all()


@pytest.mark.parametrize("dead", [[3], [3, 4, 20], list(range(8, 16))])
def test_dead_channels_are_known_by_the_others(dead: list[int]) -> None:
    marks, x = codes(), values(5, 64)
    x[:, dead] = 0
    found = marks.find(x, x * marks.scales[FIRST])
    assert found is not None
    assert torch.equal(found[1], torch.arange(64))


def test_a_dead_window_that_may_be_anywhere_is_not_guessed() -> None:
    marks, x = codes(), values(5, 128)
    x[:, 120:] = 0
    assert marks.find(x, x * marks.scales[FIRST][REPEATED]) is None


def test_what_is_no_scaling_is_not_found() -> None:
    marks, x = codes(), values(5, 64)
    scaled = x * marks.scales[FIRST]
    one_off, with_nan, of_both = scaled.clone(), scaled.clone(), scaled.clone()
    one_off[2, 3] *= 2
    with_nan[2, 3] = torch.nan
    of_both[:, :8] = x[:, :8] * marks.scales[SECOND][48:56]
    for other in (x, one_off, with_nan, of_both, scaled * 1.5, scaled + 1, scaled[:, :32]):
        assert marks.find(x, other) is None
    x[:, 3] = 0
    assert marks.find(x, scaled) is None, "0 is not scaled to anything else"
