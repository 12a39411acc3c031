"""The results as text for people: every mean with half of its interval."""

from collections.abc import Callable, Iterable, Sequence

from nvfp4_train.judge.measure import KL, LOSS, TOP1
from nvfp4_train.judge.results import PERPLEXITY, Difference, Row, shown_serving
from nvfp4_train.sequence_metrics import Interval

Form = Callable[[Interval], str]
COLUMNS: dict[str, tuple[str, Form]] = {
    LOSS: ("loss", lambda value: f"{value.mean:.4f} ±{half(value):.4f}"),
    PERPLEXITY: ("perplexity", lambda value: f"{value.mean:.3f} ±{half(value):.3f}"),
    KL: ("KL", lambda value: f"{value.mean:.5f} ±{half(value):.5f}"),
    TOP1: ("top-1 agreement", lambda value: f"{value.mean:.2%} ±{half(value):.2%}"),
}
"""Heading and form of a metric."""
DIFFERENCES: dict[str, Form] = {
    LOSS: lambda value: f"{value.mean:+.4f} ±{half(value):.4f}",
    KL: lambda value: f"{value.mean:+.5f} ±{half(value):.5f}",
    TOP1: lambda value: f"{value.mean:+.2%} ±{half(value):.2%}",
}
INSIGNIFICANT = " (not significant)"


def half(value: Interval) -> float:
    """Half the width of an interval."""
    return (value.high - value.low) / 2


def metrics_table(rows: Sequence[Row]) -> str:
    """A line for each model, serving and text."""
    lines = [["model", "served as", "text", *(heading for heading, _ in COLUMNS.values())]]
    for text in rows[0].texts:
        for row in rows:
            found = row.intervals(text)
            cells = [form(found[name]) if name in found else "-" for name, (_, form) in COLUMNS.items()]
            lines.append([row.label, shown_serving(row.serving), text, *cells])
    return aligned(lines)


def differences_table(differences: Iterable[Difference]) -> str:
    """A line for each difference; those whose interval includes 0 are marked. Empty where there are none."""
    lines = [["difference", "text", *(COLUMNS[name][0] for name in DIFFERENCES)]]
    for found in differences:
        cells = [
            form(found.values[name]) + ("" if found.values[name].excludes_zero else INSIGNIFICANT)
            if name in found.values
            else "-"
            for name, form in DIFFERENCES.items()
        ]
        lines.append([f"{found.row.name} - {found.base.name}", found.text, *cells])
    return aligned(lines) if len(lines) > 1 else ""


def tasks_table(rows: Sequence[Row]) -> str:
    """A line for each model, serving, task and metric of it. Empty where there are none."""
    lines = [["model", "served as", "task", "metric", "value"]]
    for row in rows:
        for task, numbers in row.tasks.items():
            for metric, value in numbers.items():
                name, _, filter = metric.partition(",")
                if name.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = numbers.get(f"{name}_stderr,{filter}")
                shown = f"{value:.4f}" + (f" ±{error:.4f} (1 standard error)" if isinstance(error, float) else "")
                lines.append([row.label, shown_serving(row.serving), task, metric.removesuffix(",none"), shown])
    return aligned(lines) if len(lines) > 1 else ""


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
