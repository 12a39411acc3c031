"""What quantization costs and what training gave back: masters, PTQ and the final weights side by side, each with its interval."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nvfp4_train import pictures
from nvfp4_train.metrics import MASTER, MASTER_AT_SWITCH, PTQ, QUANTIZED, evaluated_state
from nvfp4_train.report.blocks import Block, Picture, Table, Text, Tile
from nvfp4_train.report.numbers import NONE, PERCENT, POINTS, significance, with_interval
from nvfp4_train.report.run_files import RunFiles
from nvfp4_train.sequence_metrics import LEVEL, Interval, SequenceMetrics

FEW = 20
"""Sequences, below which a bootstrap over them is narrower than it should be."""
SERVINGS = ("w4a16", "w4a4")


class Metric(NamedTuple):
    label: str
    unit: str
    is_better_low: bool = True

    @property
    def is_percent(self) -> bool:
        return self.unit == "%"

    @property
    def title(self) -> str:
        if not self.unit:
            # Of a loss that is not ours.
            return self.label
        return f"{self.label}, {self.unit}; {'lower' if self.is_better_low else 'higher'} is better"


METRICS = {
    "kl": Metric("KL to the original", "nats a token"),
    "top1_agreement": Metric("same most likely token as the original", "%", False),
    "loss": Metric("loss on held-out text", "nats a token"),
    "cross_entropy": Metric("cross-entropy on held-out text", "nats a token"),
    "hidden_error": Metric("error of hidden states", "relative to their variance"),
}
"""By name, those that say most first."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric under one serving."""

    name: str
    serving: str | None
    masters: Interval | None
    """At the end, or without quantized training at the switch."""
    ptq: Interval | None
    final: Interval | None
    """None without quantized training."""
    gained: Interval | None
    """Final minus PTQ, paired."""
    cost: Interval | None
    """The quantized model minus its masters, at the same moment, paired."""

    @property
    def metric(self) -> Metric:
        return METRICS.get(self.name, Metric(self.name, ""))

    @property
    def served_as(self) -> str:
        return "as trained" if self.serving is None else f"as {self.serving.upper()}"

    def cell(self, found: Interval | None, *, sign: bool = False) -> str:
        return with_interval(found, percent=self.metric.is_percent, sign=sign)


def comparisons(files: RunFiles) -> list[Comparison]:
    """Of every metric and serving that was measured, in the order of `METRICS`."""
    found, is_trained = files.sequences, files.start_step is not None
    masters = found.get(MASTER if is_trained else MASTER_AT_SWITCH)
    known: list[str | None] = [
        serving
        for serving in SERVINGS
        if evaluated_state(PTQ, serving) in found or evaluated_state(QUANTIZED, serving) in found
    ]
    all_names = dict.fromkeys(name for metrics in found.values() for name in metrics.values)
    if _are_one(found, "loss", "kl"):
        # It is what was minimized.
        del all_names["loss"]
    names = [name for name in METRICS if name in all_names] + [name for name in all_names if name not in METRICS]

    def of(name: str, serving: str | None) -> Comparison:
        ptq = found.get(evaluated_state(PTQ, serving))
        final = found.get(evaluated_state(QUANTIZED, serving)) if is_trained else None
        return Comparison(
            name=name,
            serving=serving,
            masters=_interval(masters, name),
            ptq=_interval(ptq, name),
            final=_interval(final, name),
            gained=_difference(final, ptq, name),
            cost=_difference(final if is_trained else ptq, masters, name),
        )

    return [of(name, serving) for name in names for serving in known or [None]]


def main_comparison(files: RunFiles, found: list[Comparison]) -> Comparison | None:
    """The one that the run was for: of the first metric, as it is to be served."""
    served = files.option("quant.serve") or files.record.get("trained_serving")
    of_first = [one for one in found if one.name == found[0].name]
    return next((one for one in of_first if one.serving in (served, None)), of_first[0] if of_first else None)


def verdict(files: RunFiles, main: Comparison | None) -> list[str]:
    """The numbers that matter, in sentences."""
    if main is None and not files.is_finished:
        return ["What the quantized model is worth is not known yet: it is measured at the end of the run."]
    if main is None:
        return [
            "What the quantized model is worth is not known: sequences.json is not in this folder, or empty. callbacks.requantize "
            "measures it, callbacks.run_summary writes it."
        ]
    label, level = main.metric.label, f"{LEVEL:.0%}"
    said = []
    if main.final is not None and main.gained is not None:
        is_better = (main.gained.mean < 0) == main.metric.is_better_low
        how = "better" if is_better else "worse"
        said.append(
            f"Served {main.served_as}, the {label} went from {main.cell(main.ptq)} after PTQ to {main.cell(main.final)} after "
            f"training: {main.cell(main.gained, sign=True)}, "
            + (f"{how}, and significant at {level}." if main.gained.excludes_zero else f"not significant at {level}.")
        )
    elif main.final is not None:
        said.append(
            f"Served {main.served_as}, the {label} is {main.cell(main.final)}. There is no PTQ to compare it with: what was measured "
            "at the switch was of other text or options, or of an earlier version."
        )
    elif main.ptq is not None:
        said.append(f"Served {main.served_as}, without training in NVFP4, the {label} is {main.cell(main.ptq)}.")
    if main.cost is not None and main.masters is not None:
        said.append(
            f"Against its own masters in bf16 ({main.cell(main.masters)}) quantization costs {main.cell(main.cost, sign=True)}, "
            f"{significance(main.cost)} at {level}."
        )
    if (num := num_sequences(files)) < FEW:
        said.append(f"That is of {num} held-out {'sequence' if num == 1 else 'sequences'}, too few to be sure of it.")
    return said


def num_sequences(files: RunFiles) -> int:
    """Held-out sequences that were measured."""
    return max((len(metrics.positions) for metrics in files.sequences.values()), default=0)


def tiles(main: Comparison | None) -> list[Tile]:
    if main is None:
        return []
    found = []
    label = main.metric.label
    for state, value in (("PTQ", main.ptq), ("final", main.final)):
        if value is not None:
            mean, _, bounds = main.cell(value).partition(" ")
            found.append(
                Tile(f"{label}, {state}, {main.served_as}", mean + (PERCENT if main.metric.is_percent else ""), bounds)
            )
    if main.gained is not None:
        mean, _, bounds = main.cell(main.gained, sign=True).partition(" ")
        found.append(
            Tile(
                "final minus PTQ, paired",
                mean + (POINTS if main.metric.is_percent else ""),
                f"{bounds}, {significance(main.gained)}",
            )
        )
    return found


def comparison_blocks(files: RunFiles, found: list[Comparison]) -> Iterator[Block]:
    """A table for each metric, and a picture of the first one."""
    if not found:
        yield Text("No intervals: sequences.json is not in this folder. callbacks.run_summary writes it at the end of a run.")
        return
    num = num_sequences(files)
    few = " With so few, take them for narrower than they should be; data.val_sequences holds out more." if num < FEW else ""
    yield Text(
        f"Means over {num} held-out sequences with {LEVEL:.0%} intervals, by a bootstrap over sequences. Differences are taken "
        f"sequence by sequence (paired), so they are surer than the intervals of the two means suggest.{few}"
    )
    if teacher := files.option("loss.teacher_path"):
        yield Text(f"The original, from which the KL is measured, is the teacher: loss.teacher_path={teacher}.")
    is_trained = any(one.final is not None for one in found)
    drawn = _drawn([one for one in found if one.name == found[0].name])
    if is_trained and drawn:
        yield _picture(found[0].metric, drawn)
    for name in dict.fromkeys(one.name for one in found):
        yield _table([one for one in found if one.name == name], is_trained)
    if "kl" in {one.name for one in found} and not any(one.name == "loss" for one in found):
        yield Text("The loss that was minimized is the KL.")
    if not is_trained:
        how = "launch/train.py with quant.start_step below trainer.max_steps does"
        if not files.option("quant.enabled", True):
            how = "quant.enabled=true does; this run had quant.enabled=false"
        yield Text(f"There is no column of a final model: nothing was trained in NVFP4. {how}.")


def _table(of_servings: list[Comparison], is_trained: bool) -> Table:
    def row(label: str, cells: Iterable[str]) -> list[str]:
        return [label, *cells]

    def difference(label: str, found: Iterable[Interval | None]) -> list[str]:
        cells = zip(of_servings, found, strict=True)
        return row(
            label, (NONE if value is None else f"{one.cell(value, sign=True)}, {significance(value)}" for one, value in cells)
        )

    rows = [
        row("masters, at the end" if is_trained else "masters", (one.cell(one.masters) for one in of_servings)),
        row("PTQ", (one.cell(one.ptq) for one in of_servings)),
    ]
    if is_trained:
        rows.append(row("final", (one.cell(one.final) for one in of_servings)))
        rows.append(difference("final minus PTQ", (one.gained for one in of_servings)))
    rows.append(difference("final minus masters" if is_trained else "PTQ minus masters", (one.cost for one in of_servings)))
    header = ["", *(one.served_as for one in of_servings)]
    return Table(title=_first_upper(of_servings[0].metric.title), header=header, rows=rows, align="l" + "r" * len(of_servings))


def _drawn(rows: list[Comparison]) -> list[tuple[str, Interval, str]]:
    """PTQ and final under each serving, where they are numbers: label, interval and colour."""
    states = (("PTQ", pictures.COLOURS[5]), ("final", pictures.COLOURS[0]))
    return [
        (f"{one.served_as}, {state}", found, colour)
        for one in rows
        for (state, colour), found in zip(states, (one.ptq, one.final), strict=True)
        if found is not None and math.isfinite(found.mean)
    ]


def _picture(metric: Metric, drawn: list[tuple[str, Interval, str]]) -> Picture:
    """Bars of the KL, of which 0 is what the original has, else dots."""
    labels, intervals, colours = zip(*drawn, strict=True)
    scale = 100 if metric.is_percent else 1
    # A bar says how far a value is from 0, which a loss never comes near.
    draw = pictures.bars if metric.label == METRICS["kl"].label else pictures.points
    figure = draw(
        f"{_first_upper(metric.label)}: PTQ and final",
        f"{metric.unit}",
        labels,
        [scale * found.mean for found in intervals],
        intervals=[_bounds(found, scale) for found in intervals],
        colours=colours,
    )
    figure.set_size_inches(6.4, figure.get_figheight())
    numbers = Table(
        header=["", metric.unit],
        rows=[[label, with_interval(found, percent=metric.is_percent)] for label, found in zip(labels, intervals, strict=True)],
        align="lr",
    )
    says = "; ".join(
        f"{label} {with_interval(found, percent=metric.is_percent)}" for label, found in zip(labels, intervals, strict=True)
    )
    return Picture(figure=figure, says=f"{_first_upper(metric.label)}: {says}.", numbers=numbers)


def _bounds(found: Interval, scale: float) -> tuple[float, float]:
    """Bounds as they are drawn: the mean itself where there are none."""
    is_bounded = math.isfinite(found.high - found.low)
    return (scale * found.low, scale * found.high) if is_bounded else (scale * found.mean, scale * found.mean)


def loss_is_kl(files: RunFiles) -> bool:
    """Whether the loss that was minimized is the KL, by what was measured of both."""
    history = files.history
    pairs = []
    for name in history:
        if name.startswith("val/kl"):
            losses = dict(history.get(name.replace("val/kl", "val/loss", 1), []))
            pairs += [(kl, losses[step]) for step, kl in history[name] if step in losses]
    if pairs:
        return all(math.isclose(kl, loss, rel_tol=1e-5, abs_tol=1e-7) for kl, loss in pairs)
    return _are_one(files.sequences, "loss", "kl")


def _are_one(found: Mapping[str, SequenceMetrics], first: str, second: str) -> bool:
    """Whether two metrics are the same numbers wherever they were measured."""
    both = [metrics.values for metrics in found.values()]
    return bool(both) and all(
        first in values and second in values and np.allclose(values[first], values[second], rtol=1e-5, atol=1e-7)
        for values in both
    )


def _interval(metrics: SequenceMetrics | None, name: str) -> Interval | None:
    return None if metrics is None or name not in metrics.values else metrics.interval(name)


def _difference(first: SequenceMetrics | None, second: SequenceMetrics | None, name: str) -> Interval | None:
    if first is None or second is None or name not in first.values or name not in second.values:
        return None
    # Of other held-out text there are no pairs.
    return first.difference(second, name) if np.array_equal(first.positions, second.positions) else None


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
