"""What quantization does to the weights, as sums. Sums add up over rows, ranks and layers, whatever the sharding.

To add a statistic is to write a subclass of `Statistic` and to name it in `callbacks.scale_stats.statistics`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels.reference import E4M3_MAX, E4M3_MIN, FP4_MAX, divide
from nvfp4_train.metrics import SQNR_STATISTIC
from nvfp4_train.quant.local_weight import LocalWeight

SCALE_VALUES = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""Value of each E4M3 byte without a sign, in ascending order; the last one is NaN."""

LOG2_EDGES = torch.cat((SCALE_VALUES[1:127], SCALE_VALUES.new_tensor([480.0]))).log2()
"""Bin edges: log2 of the positive `SCALE_VALUES`. The last edge is where the value after 448 would be."""

Histogram = tuple[Tensor, Tensor]
"""Counts [bins] and edges [bins + 1], float64 on the CPU; a bin holds its lower edge."""


class Statistic(ABC):
    """Something to know about every quantized weight, and about all of them together."""

    names: tuple[str, ...]
    """Names of the metrics that `finish` returns."""
    histogram_names: tuple[str, ...] = ()
    """Names of what `histograms` returns."""

    @abstractmethod
    def local(self, weight: LocalWeight) -> Tensor:
        """The sums over this rank's rows: float64 [entries] on their device, without waiting for it.

        The number of entries is the same for every weight, also without rows.
        """

    @abstractmethod
    def finish(self, sums: Tensor) -> dict[str, float]:
        """The metrics of a layer from its sums over all ranks, float64 [entries] on the CPU."""

    def aggregate(self, sums: Tensor) -> dict[str, float]:
        """The metrics of all layers, from their sums, float64 [layers, entries]. By default those of one layer with all rows."""
        return self.finish(sums.sum(0))

    def histograms(self, sums: Tensor) -> dict[str, Histogram]:
        """Histograms by name, from sums as `finish` takes them, for loggers that draw some."""
        return {}


class GlobalAmax(Statistic):
    """The largest magnitude of a weight and its siblings, which share s2; over layers the largest one.

    Every rank knows it already, so the sum over ranks is divided by their number. In float64 that is exact.
    """

    names = ("global_amax",)

    def local(self, weight: LocalWeight) -> Tensor:
        amax = weight.global_amax.max().double()
        return torch.stack((amax, torch.ones_like(amax)))

    def finish(self, sums: Tensor) -> dict[str, float]:
        return self.aggregate(sums.unsqueeze(0))

    def aggregate(self, sums: Tensor) -> dict[str, float]:
        return {"global_amax": (sums[:, 0] / sums[:, 1]).max().item()}


class BlockScales(Statistic):
    """The distribution of the block scales, in units of E4M3 (before s2), from a count of each E4M3 byte.

    The median is the lower one, as in torch.median. Shares are fractions of the blocks. `at_floor` and `saturated` count blocks whose
    scale is the floor or the largest E4M3 value. `below_floor` counts those whose amax / 6 / s2 is below the floor, so that their
    scale was raised to it.
    """

    names = (
        "scale_min",
        "scale_median",
        "scale_max",
        "scale_at_floor_share",
        "scale_below_floor_share",
        "scale_saturated_share",
    )
    histogram_names = ("scale_log2",)

    def local(self, weight: LocalWeight) -> Tensor:
        # torch.bincount would wait for the device. Atomic additions into few counts would wait for each other.
        scales = weight.block_scales.reshape(-1).view(torch.uint8).sort().values
        num_up_to = torch.searchsorted(scales, torch.arange(256, dtype=torch.uint8, device=scales.device), right=True)
        unrounded = divide(torch.ops.nvfp4.block_amax(weight.master), FP4_MAX) / weight.global_scale.view(-1, 1, 1)
        num_below_floor = (unrounded < E4M3_MIN).sum().reshape(1)
        return torch.cat((num_up_to.diff(prepend=num_up_to.new_zeros(1)), num_below_floor)).double()

    def finish(self, sums: Tensor) -> dict[str, float]:
        counts, num_below_floor = _by_scale(sums), sums[-1]
        num_blocks = counts.sum()
        present = SCALE_VALUES[counts > 0]
        # The first byte whose cumulative count exceeds the number of blocks before the median.
        median = torch.searchsorted(counts.cumsum(0), (num_blocks - 1).div(2, rounding_mode="floor") + 1)
        values = (
            present.min(),
            SCALE_VALUES[median],
            present.max(),
            counts[SCALE_VALUES == E4M3_MIN].sum() / num_blocks,
            num_below_floor / num_blocks,
            counts[SCALE_VALUES == E4M3_MAX].sum() / num_blocks,
        )
        return {name: value.item() for name, value in zip(self.names, values, strict=True)}

    def histograms(self, sums: Tensor) -> dict[str, Histogram]:
        return {"scale_log2": (_by_scale(sums)[1:127], LOG2_EDGES)}


class Sqnr(Statistic):
    """The signal-to-quantization-noise ratio 10 log10(sum w^2 / sum (w - w_hat)^2) in dB; infinite where nothing is lost.

    The aggregate is the ratio of all weights taken as one tensor.
    """

    names = (SQNR_STATISTIC,)

    def local(self, weight: LocalWeight) -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=weight.master.device)
        for piece in weight.pieces():
            decoded = torch.ops.nvfp4.dequantize(piece.codes, piece.block_scales, piece.global_scale, torch.float32)
            master = piece.master.double()
            sums += torch.stack((master.square().sum(), (master - decoded).square().sum()))
        return sums

    def finish(self, sums: Tensor) -> dict[str, float]:
        signal, noise = sums
        return {SQNR_STATISTIC: (10 * torch.log10(signal / noise)).item()}


def sum_over_ranks(weights: Iterable[LocalWeight], statistics: Sequence[Statistic]) -> tuple[list[str], list[Tensor]]:
    """Names of the weights, and for each statistic their sums over all ranks: float64 [weights, entries], on the CPU.

    A collective: one all_reduce of one tensor, and one copy to the host, the only time that something waits for the device.
    """
    names, table = [], []
    widths: list[int] = []
    for weight in weights:
        local = [statistic.local(weight) for statistic in statistics]
        names.append(weight.name)
        table.append(torch.cat(local))
        widths = [len(sums) for sums in local]
    sums = torch.stack(table)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return names, list(sums.cpu().split(widths, dim=1))


def _by_scale(sums: Tensor) -> Tensor:
    """Counts [128] by the E4M3 byte without its sign, which a NaN may have."""
    return sums[:128] + sums[128:256]
