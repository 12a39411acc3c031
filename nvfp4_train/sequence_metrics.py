"""Held-out metrics sequence by sequence, and how sure their means are: a bootstrap over sequences.

Tokens of one text are no independent draws, sequences nearly are. So a resample draws whole sequences, with replacement, and its mean
is over their positions: sum n v / sum n, for n positions of a sequence and its mean v. An interval is from the 2.5 to the 97.5 %
quantile of the means of the resamples (the percentile method; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). A difference of two models is taken sequence by sequence, with the same draws (Koehn, EMNLP 2004).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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

    It is unbounded where fewer than two sequences have a position that counts.
    """
    draws = np.random.default_rng(0)
    num = len(values)
    total = positions * values
    if np.count_nonzero(positions) < 2:
        # One sequence tells nothing of others.
        return Interval(float(total.sum() / positions.sum()), -math.inf, math.inf)
    means = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = draws.integers(num, size=(BLOCK, num))
        # Where none of the drawn sequences has a position that counts, there is no mean.
        with np.errstate(invalid="ignore"):
            means.append(total[drawn].sum(1) / positions[drawn].sum(1))
    low, high = np.nanquantile(np.concatenate(means), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(total.sum() / positions.sum()), float(low), float(high))
