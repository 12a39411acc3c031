"""What a measurement of sensitivity found, as plain data, as tables and as pictures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvfp4_train import pictures
from nvfp4_train.judge.bits_budget import mean_bits
from nvfp4_train.judge.sensitivity import METRICS, Key
from nvfp4_train.judge.units import ALL, Unit
from nvfp4_train.sequence_metrics import LEVEL, Interval, SequenceMetrics

CHOSEN, NAIVE = "chosen", "first and last layers"
"""Labels of what is quantized where the chosen units, or those nearest to both ends of the model, are left in bf16."""
MOST = 20
"""Rows of a short table."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured, and what was chosen for a budget."""

    by: str
    """The level of the units among which was chosen."""
    bits: float
    """The budget, bits a weight."""
    serving: str
    """The serving that was chosen for."""
    servings: Sequence[str]
    """Those that were measured."""
    smallest: Sequence[Unit]
    """All units of the level `weight`."""
    units: Mapping[str, Sequence[Unit]]
    """The units that were measured alone, by level."""
    metrics: Mapping[Key, SequenceMetrics]
    """Of the sequences to choose by: of all units, and of `ALL`, by label and serving."""
    verified: Mapping[Key, SequenceMetrics]
    """Of other sequences: of `ALL`, `CHOSEN` and `NAIVE`."""
    chosen: Sequence[Unit]
    """Units left in bf16."""
    naive: Sequence[Unit]
    exclude: Sequence[str]
    """All of quant.exclude: the patterns that were given, and those of what was chosen."""

    def kl(self, label: str, serving: str | None = None) -> Interval:
        return self.metrics[label, serving or self.serving].interval("kl")

    def sum_alone(self, units: Sequence[Unit], serving: str | None = None) -> float:
        """Of the divergences of units that are quantized alone."""
        return sum(self.kl(unit.label, serving).mean for unit in units)

    def predicted(self, excluded: Sequence[Unit]) -> float | None:
        """KL on the other sequences with some units in bf16: that with all quantized, less the share of these in the sum of KLs alone.
        None where the units are of another level than was chosen among."""
        units = self.units[self.by]
        if not set(excluded) <= set(units):
            return None
        sum_of_all = self.sum_alone(units)
        left = [unit for unit in units if unit not in set(excluded)]
        together = self.verified[ALL, self.serving].means()["kl"]
        return together * self.sum_alone(left) / sum_of_all if sum_of_all else together

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        configurations = {ALL: (), CHOSEN: self.chosen, NAIVE: self.naive}
        return {
            "by": self.by,
            "bits": self.bits,
            "serving": self.serving,
            "level_of_intervals": LEVEL,
            "units": [
                {
                    "level": level,
                    "label": unit.label,
                    "layer": unit.layer,
                    "kind": unit.kind,
                    "parameters": list(unit.names),
                    "weights": unit.num_weights,
                    "bits": unit.bits,
                    "extra_bits": unit.extra_bits,
                    **_measured(self.metrics, unit.label, self.servings),
                }
                for level, units in self.units.items()
                for unit in units
            ],
            "configurations": {
                label: {
                    "in_bf16": [unit.label for unit in excluded],
                    "bits": mean_bits(self.smallest, excluded),
                    "predicted_kl": self.predicted(excluded),
                    **_measured(self.verified, label, self.servings),
                }
                for label, excluded in configurations.items()
            },
            "additivity": {
                serving: {level: self.additivity(units, serving) for level, units in self.units.items()}
                for serving in self.servings
            },
            "exclude": list(self.exclude),
            "sequences": {"to_choose": _by_serving(self.metrics), "to_verify": _by_serving(self.verified)},
        }

    def additivity(self, units: Sequence[Unit], serving: str) -> dict[str, float]:
        return {"sum_alone": self.sum_alone(units, serving), "together": self.kl(ALL, serving).mean}


def _measured(metrics: Mapping[Key, SequenceMetrics], label: str, servings: Sequence[str]) -> dict[str, Any]:
    return {metric: {serving: metrics[label, serving].interval(metric).to_dict() for serving in servings} for metric in METRICS}


def _by_serving(metrics: Mapping[Key, SequenceMetrics]) -> dict[str, dict[str, Any]]:
    by_serving: dict[str, dict[str, Any]] = {}
    for (label, serving), found in metrics.items():
        by_serving.setdefault(serving, {})[label] = found.to_dict()
    return by_serving


def markdown(found: Findings, *, most: int | None = None) -> str:
    """Tables of the findings; of units at most so many rows each."""
    num_sequences = len(next(iter(found.metrics.values())).positions)
    head = (
        f"# Sensitivity to quantization\n\nKL in nats a token from the unquantized model, over {num_sequences} held-out sequences; in "
        f"brackets its {100 * LEVEL:g} % interval by bootstrap over sequences. Each unit is quantized alone, all others are in bf16."
    )
    parts = [head, _additivity_table(found)]
    for level, units in found.units.items():
        parts.append(_units_table(found, level, units, most))
    return "\n\n".join([*parts, _budget_table(found)]) + "\n"


def _additivity_table(found: Findings) -> str:
    rows = [
        [
            level,
            f"{len(units)}",
            serving.upper(),
            _number(alone),
            _number(together),
            f"{together / alone:.2f}" if alone else "-",
        ]
        for serving in found.servings
        for level, units in found.units.items()
        for alone, together in [found.additivity(units, serving).values()]
    ]
    title = ["unit", "number", "serving", "sum of KLs alone", "KL of all together", "together / sum"]
    return f"## Do they add up?\n\n{_table(title, rows)}"


def _units_table(found: Findings, level: str, units: Sequence[Unit], most: int | None) -> str:
    ranked = sorted(units, key=lambda unit: -found.kl(unit.label).mean)
    num_weights, total = sum(unit.num_weights for unit in units), found.sum_alone(units)
    # Weights of a kind or layer, measured one by one.
    has_parts = level != "weight" and "weight" in found.units
    rows = []
    for unit in ranked[:most]:
        parts = [part for part in found.smallest if set(part.names) <= set(unit.names)]
        rows.append(
            [
                unit.label,
                *(_interval(found.kl(unit.label, serving)) for serving in found.servings),
                *([_number(found.sum_alone(parts))] if has_parts else []),
                f"{found.kl(unit.label).mean / total:.1%}" if total else "-",
                f"{unit.num_weights / num_weights:.1%}",
                f"{1e9 * found.kl(unit.label).mean / unit.extra_bits:.3g}",
            ]
        )
    title = [
        level,
        *(f"KL {serving.upper()}" for serving in found.servings),
        *(["sum of its weights alone"] if has_parts else []),
        "of the sum",
        "of the weights",
        "KL per 10^9 bits",
    ]
    shown = f"the first {most} of {len(units)}" if most is not None and most < len(units) else f"{len(units)}"
    return f"## By {level} ({shown}, by KL {found.serving.upper()})\n\n{_table(title, rows)}"


def _budget_table(found: Findings) -> str:
    rows = []
    for label, excluded in ((ALL, ()), (CHOSEN, found.chosen), (NAIVE, found.naive)):
        rows.append(
            [
                {ALL: "all quantized", CHOSEN: f"chosen: {len(excluded)} in bf16", NAIVE: f"{NAIVE}: {len(excluded)} in bf16"}[
                    label
                ],
                f"{mean_bits(found.smallest, excluded):.4f}",
                "-" if (predicted := found.predicted(excluded)) is None else _number(predicted),
                _interval(found.verified[label, found.serving].interval("kl")),
                f"{found.verified[label, found.serving].means()['top1_agreement']:.2%}",
            ]
        )
    chosen_kl = found.verified[CHOSEN, found.serving]
    differences = {
        label: chosen_kl.difference(found.verified[other, found.serving], "kl")
        for label, other in (("all quantized", ALL), (NAIVE, NAIVE))
    }
    told = " ".join(
        f"Chosen minus {label}: KL {_interval(difference)}, {'' if difference.excludes_zero else 'not '}significant."
        for label, difference in differences.items()
    )
    if found.chosen and not differences["all quantized"].high < 0:
        told += (
            " On these sequences the bits that it costs gain nothing that could be told from noise: more sequences= may tell."
        )
    title = ["configuration", "bits a weight", "KL predicted", "KL measured", "top-1 agreement"]
    num = len(found.verified[ALL, found.serving].positions)
    chosen = ", ".join(unit.label for unit in found.chosen) or "nothing: no unit fits"
    return (
        f"## A budget of {found.bits:g} bits a weight, {found.serving.upper()}\n\nOver {num} sequences that were not chosen by.\n\n"
        f"{_table(title, rows)}\n\n{told}\n\nLeft in bf16: {chosen}\n\nBits are a mean over the weights that are "
        "quantized without this choice; the bits per weight of a run's summary are over all of its parameters."
    )


def heat_map(found: Findings) -> "pictures.Figure | None":
    """The KL of every unit of the level `weight` in a layer, kind by depth, as its logarithm; None where these were not measured."""
    depth_of = {unit: unit.depth for unit in found.units.get("weight", ()) if unit.depth is not None}
    if not depth_of:
        return None
    kinds, depths = list(dict.fromkeys(unit.kind for unit in depth_of)), sorted(set(depth_of.values()))
    values = [[math.nan] * len(depths) for _ in kinds]
    for unit, depth in depth_of.items():
        if (kl := found.kl(unit.label).mean) > 0:
            values[kinds.index(unit.kind)][depths.index(depth)] = math.log10(kl)
    title = f"log10 of KL, one weight alone in {found.serving.upper()}"
    return pictures.heat_map(title, kinds, [str(depth) for depth in depths], values)


def bars(found: Findings) -> pictures.Figure:
    """The KL of every kind and of the most sensitive layers alone, with intervals."""
    kinds = list(found.units["kind"])
    layers = sorted(found.units.get("layer", ()), key=lambda unit: -found.kl(unit.label).mean)[:MOST]
    intervals = [found.kl(unit.label) for unit in (*kinds, *layers)]
    return pictures.bars(
        f"KL, one kind or layer alone in {found.serving.upper()}",
        "nats a token",
        [unit.label for unit in (*kinds, *layers)],
        [each.mean for each in intervals],
        intervals=[(min(each.low, each.mean), max(each.high, each.mean)) for each in intervals],
        colours=[pictures.COLOURS[0]] * len(kinds) + [pictures.COLOURS[1]] * len(layers),
    )


def files(found: Findings) -> Iterator[tuple[str, bytes]]:
    """Name and content of every picture."""
    for name, figure in (("sensitivity.png", heat_map(found)), ("sensitivity_bars.png", bars(found))):
        if figure is not None:
            yield name, pictures.png(figure)


def _table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(title, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(title), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def _number(value: float) -> str:
    return f"{value:.4g}"


def _interval(of: Interval) -> str:
    return f"{of.mean:.4g} [{of.low:.4g}, {of.high:.4g}]"
