"""What was measured, and what follows from it: intervals, paired differences, and which of them a threshold refuses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from nvfp4_train.judge.loading import UNQUANTIZED
from nvfp4_train.judge.measure import ALL, KL, LOSS, TOP1
from nvfp4_train.sequence_metrics import Interval, SequenceMetrics

PERPLEXITY = "perplexity"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model under one serving."""

    label: str
    serving: str
    texts: Mapping[str, SequenceMetrics]
    """By text, `ALL` among them. The reference has its loss alone."""
    tasks: Mapping[str, Mapping[str, Any]]
    """What lm-evaluation-harness says of it, by task."""

    @property
    def is_quantized(self) -> bool:
        return self.serving != UNQUANTIZED

    @property
    def name(self) -> str:
        return f"{self.label} {shown_serving(self.serving)}"

    def intervals(self, text: str) -> dict[str, Interval]:
        """Loss, perplexity, and what else there is, on a text."""
        found = {name: self.texts[text].interval(name) for name in self.texts[text].values}
        return {LOSS: (loss := found.pop(LOSS)), PERPLEXITY: _exp(loss), **found}


def shown_serving(serving: str) -> str:
    """As people write it."""
    return serving if serving == UNQUANTIZED else serving.upper()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row minus another, paired sequence by sequence, by metric."""

    row: Row
    base: Row
    text: str
    values: Mapping[str, Interval]


def differences(rows: Sequence[Row]) -> Iterator[Difference]:
    """Every row against the reference, in its loss, and against the first quantized model under the same serving, in all metrics.

    The reference is the first row, and no quantized model in this.
    """
    reference, *others = rows
    for text in reference.texts:
        for row in others:
            loss = row.texts[text].difference(reference.texts[text], LOSS)
            yield Difference(row=row, base=reference, text=text, values={LOSS: loss})
        for row in others:
            base = next((other for other in others if other.is_quantized and other.serving == row.serving), None)
            if base is not None and base is not row:
                values = {name: row.texts[text].difference(base.texts[text], name) for name in (LOSS, KL, TOP1)}
                yield Difference(row=row, base=base, text=text, values=values)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Thresholds on quantized models, over all texts; null ones are none."""

    kl: float | None = None
    """Largest KL from the reference, in nats a position."""
    loss: float | None = None
    """Largest loss, in nats a position."""
    ppl_ratio: float | None = None
    """Largest perplexity, as a multiple of that of the reference."""
    top1: float | None = None
    """Least share of positions with the reference's most likely token, from 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("kl", "loss", "ppl_ratio"):
            if (limit := getattr(self, name)) is not None and not 0 <= limit < math.inf:
                raise ValueError(f"fail_if.{name} must be at least 0, or null, got {limit}")
        if self.top1 is not None and not 0 <= self.top1 <= 1:
            raise ValueError(f"fail_if.top1 must be a share from 0 to 1, or null, got {self.top1}")

    @property
    def given(self) -> dict[str, float]:
        return {field.name: limit for field in fields(self) if (limit := getattr(self, field.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A threshold on a row."""

    row: Row
    limit: str
    """A name of `Limits`."""
    threshold: float
    value: Interval

    @property
    def is_exceeded(self) -> bool:
        """By the mean. One that is no number exceeds every threshold."""
        mean = self.value.mean
        return not (mean >= self.threshold if self.limit == "top1" else mean <= self.threshold)

    def __str__(self) -> str:
        relation = "below" if self.limit == "top1" else "above"
        if math.isfinite(self.value.high - self.value.low):
            includes = "includes" if self.value.low <= self.threshold <= self.value.high else "does not include"
            interval = f"its interval, {self.value.low:.4g} to {self.value.high:.4g}, {includes} that"
        else:
            interval = "it has no interval"
        return (
            f"{'failed' if self.is_exceeded else 'passed'}: {self.limit} of {self.row.name} is {self.value.mean:.4g}, "
            f"{'' if self.is_exceeded else 'not '}{relation} fail_if.{self.limit}={self.threshold:g}; {interval}"
        )


def verdicts(rows: Sequence[Row], limits: Limits) -> list[Verdict]:
    """Every threshold on every quantized row but the reference, which is the first."""
    reference, *others = rows
    found = []
    for row in others:
        if row.is_quantized:
            ratio = row.texts[ALL].difference(reference.texts[ALL], LOSS)
            values = {
                "kl": row.texts[ALL].interval(KL),
                "loss": row.texts[ALL].interval(LOSS),
                "ppl_ratio": _exp(ratio),
                "top1": row.texts[ALL].interval(TOP1),
            }
            found += [
                Verdict(row=row, limit=name, threshold=threshold, value=values[name])
                for name, threshold in limits.given.items()
            ]
    return found


def _exp(value: Interval) -> Interval:
    """Of the perplexity, or a ratio of two, from the loss: exp is monotonic, so quantiles stay quantiles."""
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(bound)) for bound in value))
