import math

import pytest
import torch

from nvfp4_train.kernels import reference
from nvfp4_train.quant.statistics import STATISTICS, weight_statistics


def statistics(weight: torch.Tensor) -> dict[str, float]:
    amax = weight.abs().amax()
    values = weight_statistics(weight, reference.global_scale(amax), amax)
    return dict(zip([*STATISTICS, "signal", "noise"], values.tolist(), strict=True))


def test_gaussian_weights_have_the_known_sqnr() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    found = statistics(weight)
    assert found["sqnr_db"] == pytest.approx(20.43, abs=0.05)
    assert found["global_amax"] == weight.abs().max().item()
    assert found["signal"] == pytest.approx(weight.double().square().sum().item())
    assert found["scale_min"] <= found["scale_median"] <= found["scale_max"] <= 448
    assert found["scale_zero_share"] == found["scale_subnormal_share"] == 0


def test_shares_count_blocks() -> None:
    weight = torch.zeros(4, 16)
    weight[0, 0] = 2688.0  # s2 = 1, block scale 448
    weight[1, 0] = 6 * 2.0**-7  # subnormal block scale
    weight[2, 0] = 6 * 2.0**-12  # block scale below the smallest subnormal
    found = statistics(weight)
    assert found["scale_saturated_share"] == 0.25
    assert found["scale_subnormal_share"] == 0.75
    assert found["scale_zero_share"] == 0.5


def test_a_lossless_weight_has_infinite_sqnr() -> None:
    assert math.isinf(statistics(torch.tensor([[6.0, -3.0, 1.5, 0.5] * 4]))["sqnr_db"])
