"""Held-out metrics sequence by sequence, and how sure their means are: a bootstrap over sequences.

Tokens of one text are no independent draws, sequences nearly are. So a resample draws whole sequences, with replacement, and its mean
is over their positions: sum n v / sum n, for n positions of a sequence and its mean v. An interval is from the 2.5 to the 97.5 %
quantile of the means of the resamples (the percentile method; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). A difference of two models is taken sequence by sequence, with the same draws (Koehn, EMNLP 2004).

Of few sequences such an interval is too narrow, so it is stretched about the mean as that of a normal mean would have to be:
by sqrt(n / (n - 1)) t(n - 1) / z, for t and z at 97.5 % (after Hesterberg, What Teachers Should Know About the Bootstrap, 2015, who
moves the quantiles instead).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvfp4_train.ranks import gather_from_ranks

RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 250
"""Resamples that are drawn at once, which bounds the memory."""


class Interval(NamedTuple):
    """A mean, and between what it lies at `LEVEL`."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain data, for JSON, which has no number for a bound that there is not."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean, of a difference, is significant."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class SequenceMetrics:
    """Metrics of held-out sequences in the order of the held-out text, whatever the number of ranks.

    Where a loss knows the means of whole batches alone, a batch stands for a sequence.
    """

    positions: NDArray[np.float64]
    """How many of a sequence count, [S]."""
    values: Mapping[str, NDArray[np.float64]]
    """The mean over them, [S], by the name of a metric. 0 where none counts."""

    def means(self) -> dict[str, float]:
        """Over all positions that count."""
        return {name: float((self.positions * of_name).sum() / self.positions.sum()) for name, of_name in self.values.items()}

    def interval(self, name: str) -> Interval:
        return interval(self.positions, self.values[name])

    def difference(self, other: "SequenceMetrics", name: str) -> Interval:
        """The mean of this minus the other, which is of the same sequences. Raises ValueError if it is not."""
        if not np.array_equal(self.positions, other.positions):
            raise ValueError("metrics must be of the same sequences to be compared one by one")
        return interval(self.positions, self.values[name] - other.values[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and checkpoints."""
        return {"positions": self.positions.tolist(), "values": {name: found.tolist() for name, found in self.values.items()}}

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "SequenceMetrics":
        values = {name: np.asarray(found, np.float64) for name, found in saved["values"].items()}
        return SequenceMetrics(np.asarray(saved["positions"], np.float64), values)


def interval(positions: NDArray[np.float64], values: NDArray[np.float64]) -> Interval:
    """The bootstrap interval of the mean of `values` [S] over `positions` [S]. The same draws for every call with equal S.

    It is unbounded where fewer than two sequences have a position that counts, or the mean is not finite.
    """
    draws = np.random.default_rng(0)
    num = len(values)
    total = positions * values
    mean = float(total.sum() / positions.sum())
    # One sequence tells nothing of others.
    count = int(np.count_nonzero(positions))
    if count < 2 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf)
    means = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = draws.integers(num, size=(BLOCK, num))
        # Where none of the drawn sequences has a position that counts, there is no mean.
        with np.errstate(invalid="ignore"):
            means.append(total[drawn].sum(1) / positions[drawn].sum(1))
    low, high = np.nanquantile(np.concatenate(means), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    stretch = math.sqrt(count / (count - 1)) * _t(count - 1) / _Z
    return Interval(mean, mean - stretch * (mean - float(low)), mean + stretch * (float(high) - mean))


_Z = 1.959964
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantiles of the normal distribution, and of Student's t with 1, 2, 3, ... degrees of freedom."""


def _t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by the first terms of its expansion (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    return _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)


Key = TypeVar("Key", bound=Hashable)


class SequenceCollector:
    """Collects metrics of the sequences of this rank, which has every world_size-th one of the held-out text."""

    def __init__(self) -> None:
        self._positions: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {}

    def add(self, positions: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Take a batch: `positions` that count of its sequences, [B], and what they add to its means, [B] each, on any device."""
        positions = positions.double()
        self._positions.append(positions)
        for name, of_batch in parts.items():
            self._values.setdefault(name, []).append(sequence_means(of_batch, positions))

    def arrays(self) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """Positions and values of all sequences that were taken. Waits for the device."""
        positions = torch.cat(self._positions).cpu().numpy() if self._positions else np.zeros(0)
        return positions, {name: torch.cat(found).cpu().numpy() for name, found in self._values.items()}


def sequence_means(parts: Tensor, positions: Tensor) -> Tensor:
    """The means of sequences, float64 [B], of what they add to the mean of their batch, which is over all of its positions."""
    positions = positions.to(parts.device)
    return parts.double() * positions.sum() / positions.clamp(min=1)


def over_ranks(collected: Mapping[Key, SequenceCollector]) -> dict[Key, SequenceMetrics]:
    """The metrics of the sequences of all ranks, by the keys that all of them have. One collective.

    Raises ValueError if no position counts.
    """
    by_rank = gather_from_ranks({key: collector.arrays() for key, collector in collected.items()})
    found: dict[Key, SequenceMetrics] = {}
    for key in collected:
        of_ranks = [of_rank[key] for of_rank in by_rank]
        positions = _interleaved([own for own, _ in of_ranks])
        check_num_positions(positions.sum())
        names = dict.fromkeys(name for _, values in of_ranks for name in values)
        values = {name: _interleaved([values.get(name, np.zeros(0)) for _, values in of_ranks]) for name in names}
        found[key] = SequenceMetrics(positions, values)
    return found


def check_num_positions(num_positions: float) -> None:
    """Raise ValueError where no position of the held-out sequences counts, on any rank."""
    if not num_positions:
        raise ValueError(
            "held-out sequences must have a position that counts, got none: every token of every loss_mask but first tokens is "
            "unmarked; hold out others (data.val_fraction, data.val_sequences)"
        )


def _interleaved(of_ranks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """One array of those of all ranks, each of which has every len(of_ranks)-th entry."""
    whole = np.zeros(sum(map(len, of_ranks)))
    for rank, own in enumerate(of_ranks):
        whole[rank :: len(of_ranks)] = own
    return whole
