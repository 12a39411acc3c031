"""What quantization does to a weight: scale statistics and the signal-to-quantization-noise ratio (SQNR)."""

import torch
from torch import Tensor

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels.reference import E4M3_MAX, E4M3_MIN, FP4_MAX, divide, round_to_e4m3

STATISTICS = (
    "global_amax",
    "scale_min",
    "scale_median",
    "scale_max",
    "scale_subnormal_share",
    "scale_zero_share",
    "scale_saturated_share",
    "sqnr_db",
)
"""Block scales in units of E4M3 (before s2); shares are fractions of the blocks of the tensor. `scale_subnormal_share` counts blocks
whose scale was raised to the floor of 2^-6, `scale_zero_share` those among them that would have rounded to zero in E4M3."""


@torch.no_grad()
def weight_statistics(weight: Tensor, s2: Tensor, global_amax: Tensor) -> Tensor:
    """The values of STATISTICS for one weight [..., K] with global scale s2: float64 [len(STATISTICS) + 2], without a device sync.

    The last two are the signal and the noise power, so that an aggregate SQNR over weights can be formed.
    """
    amax = torch.ops.nvfp4.block_amax(weight).flatten()
    packed, block_scale = torch.ops.nvfp4.quantize(weight, s2)
    scale = block_scale.float().flatten()
    decoded = torch.ops.nvfp4.dequantize(packed, block_scale, s2, torch.float32)
    unraised = round_to_e4m3(divide(amax, FP4_MAX) / s2)
    signal = weight.double().square().sum()
    noise = (weight.double() - decoded).square().sum()
    values = [
        global_amax,
        scale.min(),
        scale.median(),
        scale.max(),
        (unraised < E4M3_MIN).double().mean(),
        (unraised == 0).double().mean(),
        (scale == E4M3_MAX).double().mean(),
        sqnr_db(signal, noise),
        signal,
        noise,
    ]
    return torch.stack([value.double() for value in values])


def sqnr_db(signal: Tensor, noise: Tensor) -> Tensor:
    """10 log10(sum w^2 / sum (w - w_hat)^2) in dB; infinite where nothing is lost."""
    return 10 * torch.log10(signal / noise)
