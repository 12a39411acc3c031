"""What quantization does to the weights, as sums. Sums add up over rows, ranks and layers, whatever the sharding.

To add a statistic is to write a subclass of `Statistic` and to name it in `callbacks.scale_stats.statistics`. Those here pick what they
need from one pass over a weight, `LocalWeight.measured`. `changes` has those of two looks, `input_statistics` those of inputs.

A look calls `finish` for every layer. Those here compute with numbers of Python's and NumPy's, since an operation on a tensor takes the
host as long whatever the size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from nvfp4_train.kernels import statistics_reference as measured
from nvfp4_train.kernels.reference import E2M1_VALUES, E4M3_MAX, E4M3_MIN
from nvfp4_train.metrics import SQNR_STATISTIC
from nvfp4_train.quant.local_weight import LocalWeight, WeightSums
from nvfp4_train.ranks import rank_and_world_size

SCALE_VALUES = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""Value of each E4M3 byte without a sign, in ascending order; the last one is NaN."""

_SCALES: list[float] = SCALE_VALUES.tolist()
_AT_FLOOR, _SATURATED = _SCALES.index(E4M3_MIN), _SCALES.index(E4M3_MAX)
_NAN = len(_SCALES) - 1

LOG2_EDGES = torch.cat((SCALE_VALUES[1:127], SCALE_VALUES.new_tensor([480.0]))).log2()
"""Bin edges: log2 of the positive `SCALE_VALUES`. The last edge is where the value after 448 would be."""

CODE_EDGES = torch.tensor([*(-v for v in reversed(E2M1_VALUES)), *E2M1_VALUES[1:], 8.0], dtype=torch.float64)
"""Bin edges: the values of the codes in ascending order, -0 and 0 as one. The last edge is where the value after 6 would be."""

SomeSums = TypeVar("SomeSums", Tensor, np.ndarray)

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

        The number of entries is the same for every weight, also without rows. What is no sum over ranks goes into entries that one
        rank fills, where others have zeros.
        """

    @abstractmethod
    def finish(self, sums: Tensor) -> dict[str, float]:
        """The metrics of a layer from its sums over all ranks, float64 [entries] on the CPU. A metric that does not exist is absent."""

    def bytes_kept(self, shape: Sequence[int], num_rows: int) -> float:
        """Bytes that a rank keeps between looks of its part of a weight: `num_rows` rows of [N, K], or of each matrix of [E, N, K]."""
        return 0.0

    def aggregate(self, sums: Tensor) -> dict[str, float]:
        """The metrics of all layers, from their sums, float64 [layers, entries]. By default those of one layer with all rows."""
        return self.finish(sums.sum(0))

    def histograms(self, sums: Tensor) -> dict[str, Histogram]:
        """Histograms by name, from sums as `finish` takes them, for loggers that draw some."""
        return {}


@dataclass
class MeasuredWeights:
    """All weights as they were measured, of this rank's rows."""

    sums: Tensor
    """Of `kernels.statistics_reference.weight_sums`: float64 [weights, NUM_SUMS]."""
    amax: Tensor
    """Largest magnitude of the rows, float32 [weights]; 0 without rows."""
    global_amax: Tensor
    """Amax of the whole weight and its siblings, the largest of experts: float32 [weights]."""
    are_siblings: list[bool]
    """Which are linears that share their global amax with other weights."""

    @classmethod
    def of(cls, measured: Sequence[WeightSums]) -> "MeasuredWeights":
        # One operation for all layers, since each small one takes the host as long as a large one.
        return cls(
            sums=_rows([weight.sums for weight in measured]),
            amax=torch.cat([_largest(weight.amax) for weight in measured]),
            global_amax=torch.cat([_largest(weight.global_amax) for weight in measured]),
            are_siblings=[weight.has_siblings and len(weight.global_amax) == 1 for weight in measured],
        )


class MeasuredStatistic(Statistic):
    """A statistic that needs no more of a weight than `LocalWeight.measured`, so that it is taken of all weights at once."""

    @abstractmethod
    def of_all(self, weights: MeasuredWeights) -> Tensor:
        """What `local` returns, of every weight: float64 [weights, entries]."""

    def local(self, weight: LocalWeight) -> Tensor:
        return self.of_all(MeasuredWeights.of([weight.measured]))[0]


class GlobalAmax(MeasuredStatistic):
    """The largest magnitude of a weight and its siblings, which share s2; over layers the largest one."""

    names = ("global_amax",)

    def of_all(self, weights: MeasuredWeights) -> Tensor:
        amax = weights.global_amax.double().unsqueeze(1)
        # Every rank knows it already.
        return amax if rank_and_world_size()[0] == 0 else torch.zeros_like(amax)

    def finish(self, sums: Tensor) -> dict[str, float]:
        return {"global_amax": sums.item()}

    def aggregate(self, sums: Tensor) -> dict[str, float]:
        return {"global_amax": sums.max().item()}


class SiblingAmax(MeasuredStatistic):
    """The amax of a weight over the global amax that it shares with its siblings: 1 for the largest of them; the aggregate is the
    smallest. With a ratio of r a weight has 1 / r less of the range of block scales than under an s2 of its own.

    It is of linears, since experts hold gate and up as one weight. A weight without siblings has none, and a group of zeros or NaN
    neither.
    """

    names = ("sibling_amax_ratio",)

    def of_all(self, weights: MeasuredWeights) -> Tensor:
        # Every rank has an entry, of which `finish` takes the largest. 1 is added, since 0 is a ratio too.
        ratios = (weights.amax / weights.global_amax).double() + 1
        rank, world_size = rank_and_world_size()
        entries = ratios.new_zeros(len(ratios), world_size)
        zero = entries[0, 0]
        # No mask, whose way to the device would be waited for.
        of_weights = zip(ratios.unbind(), weights.are_siblings, strict=True)
        entries[:, rank] = torch.stack([ratio if is_sibling else zero for ratio, is_sibling in of_weights])
        return entries

    def finish(self, sums: Tensor) -> dict[str, float]:
        return self.aggregate(sums.unsqueeze(0))

    def aggregate(self, sums: Tensor) -> dict[str, float]:
        # All zeros where there is none, and their sum is NaN if one is.
        ratios = [max(of_ranks) - 1 for of_ranks in sums.tolist() if any(of_ranks) and not math.isnan(sum(of_ranks))]
        return {"sibling_amax_ratio": min(ratios)} if ratios else {}


class GlobalScale(MeasuredStatistic):
    """log2 of s2: a whole number, but a fraction under `quant.global_scale=exact`. Of experts and over layers the mean."""

    names = ("global_scale_exponent",)

    def of_all(self, weights: MeasuredWeights) -> Tensor:
        return weights.sums[:, measured.LOG2_S2 : measured.SLOTS + 1]

    def finish(self, sums: Tensor) -> dict[str, float]:
        # The log2 of a GPU is off by 1e-15.
        return {"global_scale_exponent": round(_quotient(*sums.tolist()), 12)}

    def aggregate(self, sums: Tensor) -> dict[str, float]:
        # Ranks count a slot as often as they have rows of it, hence the mean of the layers' means.
        return {"global_scale_exponent": round((sums[:, 0] / sums[:, 1]).mean().item(), 12)}


class BlockScales(MeasuredStatistic):
    """The distribution of the block scales, in units of E4M3 (before s2), from a count of each E4M3 byte.

    The median is the lower one, as in torch.median. Shares are fractions of the blocks. `at_floor` and `saturated` count blocks whose
    scale is the floor or the largest E4M3 value. `below_floor` counts those whose amax / 6 / s2 is below the floor, so that their
    scale was raised to it. `other_scale` counts those whose rule chose another scale than the rule max, which makes amax 6.
    """

    names = (
        "scale_min",
        "scale_median",
        "scale_max",
        "scale_at_floor_share",
        "scale_below_floor_share",
        "scale_saturated_share",
        "other_scale_share",
    )
    histogram_names = ("scale_log2",)

    def of_all(self, weights: MeasuredWeights) -> Tensor:
        sums = weights.sums
        return torch.cat((sums[:, measured.SCALES], sums[:, measured.BELOW_FLOOR : measured.OTHER_SCALE + 1]), dim=1)

    def finish(self, sums: Tensor) -> dict[str, float]:
        entries = sums.numpy()
        counts = _by_scale(entries)
        cumulative = counts.cumsum()
        num_blocks = cumulative.item(-1)
        # The bytes at which the count reaches the first block in ascending order, the median and the last one.
        first, median, last = cumulative.searchsorted((1, (num_blocks - 1) // 2 + 1, num_blocks)).tolist()
        found = (
            _SCALES[_NAN if last == _NAN else first],
            _SCALES[median],
            _SCALES[last],
            counts.item(_AT_FLOOR) / num_blocks,
            entries.item(-2) / num_blocks,
            counts.item(_SATURATED) / num_blocks,
            entries.item(-1) / num_blocks,
        )
        return dict(zip(self.names, found, strict=True))

    def histograms(self, sums: Tensor) -> dict[str, Histogram]:
        return {"scale_log2": (_by_scale(sums)[1:127], LOG2_EDGES)}


class Codes(MeasuredStatistic):
    """Where the elements lie on the grid of E2M1. Shares are fractions of the elements.

    `underflow` counts |w| < amax / 24 with the amax of the block: under the rule max these become zero. `zero` counts elements that are
    not zero but have the code of zero. `edge` counts those whose |w| / s is within 1 % of a value at which the code changes, so that a
    small update flips it.
    """

    names = ("underflow_share", "zero_share", "edge_share")
    histogram_names = ("code",)

    def of_all(self, weights: MeasuredWeights) -> Tensor:
        sums = weights.sums
        return torch.cat((sums[:, measured.CODES], sums[:, measured.UNDERFLOW : measured.EDGE + 1]), dim=1)

    def finish(self, sums: Tensor) -> dict[str, float]:
        *counts, underflow, zero, edge = sums.tolist()
        num_elements = sum(counts)
        return dict(zip(self.names, (underflow / num_elements, zero / num_elements, edge / num_elements), strict=True))

    def histograms(self, sums: Tensor) -> dict[str, Histogram]:
        positive, negative = sums[:8], sums[8:16]
        zeros = positive[:1] + negative[:1]
        return {"code": (torch.cat((negative[1:].flip(0), zeros, positive[1:])), CODE_EDGES)}


class Sqnr(MeasuredStatistic):
    """The signal-to-quantization-noise ratio 10 log10(sum w^2 / sum (w - w_hat)^2) in dB; infinite where nothing is lost.

    The aggregate is the ratio of all weights taken as one tensor.
    """

    names = (SQNR_STATISTIC,)

    def of_all(self, weights: MeasuredWeights) -> Tensor:
        return weights.sums[:, measured.SIGNAL : measured.NOISE + 1]

    def finish(self, sums: Tensor) -> dict[str, float]:
        ratio = _quotient(*sums.tolist())
        return {SQNR_STATISTIC: 10 * math.log10(ratio) if ratio else -math.inf}


def sum_over_ranks(weights: Iterable[LocalWeight], statistics: Sequence[Statistic]) -> tuple[list[str], list[Tensor]]:
    """Names of the weights, and for each statistic their sums over all ranks: float64 [weights, entries], on the CPU.

    A collective: one all_reduce of one tensor, and one copy to the host, the only time that something waits for the device.
    """
    names: list[str] = []
    passes: list[WeightSums] = []
    rows: list[list[Tensor]] = [[] for _ in statistics]
    pairs = list(zip(statistics, rows, strict=True))
    others = [(statistic, found) for statistic, found in pairs if not isinstance(statistic, MeasuredStatistic)]
    # Nothing here holds on to a weight, whose codes may have been made for this look.
    for weight in weights:
        names.append(weight.name)
        if len(others) < len(statistics):
            passes.append(weight.measured)
        for statistic, found in others:
            found.append(statistic.local(weight))
    together = MeasuredWeights.of(passes) if passes else None
    tables = [
        statistic.of_all(together) if together and isinstance(statistic, MeasuredStatistic) else _rows(found)
        for statistic, found in pairs
    ]
    sums = torch.cat(tables, dim=1)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return names, list(sums.cpu().split([table.shape[1] for table in tables], dim=1))


def _rows(entries: list[Tensor]) -> Tensor:
    """The table [weights, entries] of the entries of each weight."""
    return torch.cat(entries).view(len(entries), -1)


def _largest(amax: Tensor) -> Tensor:
    """float32 [1] of [S]; 0 where a rank has no expert."""
    if len(amax) == 1:
        return amax
    return amax.amax(0, keepdim=True) if len(amax) else amax.new_zeros(1)


def _quotient(a: float, b: float) -> float:
    """a / b as tensors have it: infinite or NaN where b is 0, which Python refuses."""
    return a / b if b else a * math.inf


def _by_scale(sums: SomeSums) -> SomeSums:
    """Counts [128] by the E4M3 byte without its sign, which a NaN may have; of a tensor or an array."""
    return sums[:128] + sums[128:256]
