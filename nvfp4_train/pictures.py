"""Pictures of a run and of a model's layers, by matplotlib: one look for dashboards, reports, documents and the README."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

SIZE = (8.0, 3.6)
"""Inches."""
COLOURS = ("#0b6e4f", "#c8553d", "#3a6ea5", "#b08900", "#6b4e9b", "#5c6670")
"""Told apart by people who do not see all colours, on paper too."""
SCALE = "viridis"


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of `curves`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """With `high`: a band, say a confidence interval."""
    high: Sequence[float] | None = None


def curves(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    marks: Mapping[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Lines over a common axis. `marks` are vertical lines by their labels, say the switch to quantized weights."""
    figure, axes = _axes(title, x_label, y_label)
    for colour, line in zip(_colours(len(series)), series, strict=True):
        axes.plot(
            line.x,
            line.y,
            color=colour,
            label=line.label,
            linewidth=1.6,
            marker="o" if len(line.x) < 12 else None,
            markersize=4,
        )
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    for label, x in (marks or {}).items():
        axes.axvline(x, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(
            label, (x, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points", color="#555555"
        )
    if log:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def bars(
    title: str,
    value_label: str,
    labels: Sequence[str],
    values: Sequence[float],
    *,
    intervals: Sequence[tuple[float, float]] | None = None,
    colours: Sequence[str] | None = None,
) -> Figure:
    """Horizontal bars, the first one on top. `intervals` are (low, high) of each."""
    figure, axes = _rows(title, value_label, labels)
    errors = None
    if intervals is not None:
        errors = np.array([(value - low, high - value) for value, (low, high) in zip(values, intervals, strict=True)]).T
    bar = {"height": 0.66, "error_kw": {"elinewidth": 1, "capsize": 2}}
    axes.barh(range(len(labels)), values, xerr=errors, color=colours or COLOURS[0], **bar)
    return figure


def points(
    title: str,
    value_label: str,
    labels: Sequence[str],
    values: Sequence[float],
    *,
    intervals: Sequence[tuple[float, float]],
    colours: Sequence[str],
) -> Figure:
    """Dots with intervals, the first one on top, of values that are far from 0: the axis does not begin there."""
    figure, axes = _rows(title, value_label, labels)
    for place, (value, (low, high), colour) in enumerate(zip(values, intervals, colours, strict=True)):
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=colour, fmt="o", elinewidth=1.4, capsize=3)
    axes.margins(x=0.08)
    return figure


def bar_panels(
    title: str,
    value_label: str,
    labels: Sequence[str],
    panels: Mapping[str, Sequence[float]],
    *,
    colours: Sequence[str] | None = None,
    form: str = ".3g",
) -> Figure:
    """Horizontal bars of the same `labels`, a panel for each name side by side on one scale. Values are written as `form` says."""
    figure = Figure(figsize=(SIZE[0], 1.4 + 0.34 * len(labels)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    row = np.atleast_1d(figure.subplots(1, len(panels), sharex=True, sharey=True))
    places = range(len(labels))
    for axes, (name, values) in zip(row, panels.items(), strict=True):
        drawn = axes.barh(places, values, color=colours or COLOURS[0], height=0.66)
        axes.bar_label(drawn, [format(value, form) for value in values], padding=4)
        axes.set_title(name, loc="left", fontsize="medium")
        _plain(axes)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    row[0].set_yticks(places, labels)
    row[0].invert_yaxis()
    # Room for the value behind the longest bar.
    row[0].set_xlim(0, 1.22 * max(max(values) for values in panels.values()))
    figure.suptitle(title, x=0.0125, ha="left")
    figure.supxlabel(value_label, fontsize="medium")
    return figure


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    """One colour for each of values [rows][columns]; a NaN is left blank.

    Where cells are few their values are written, and where rows or columns are many only some of their names.
    """
    table = np.ma.masked_invalid(np.asarray(values, dtype=np.float64).reshape(len(rows), len(columns)))
    of_names = 0.08 * max(map(len, rows), default=0)
    width, height = max(6.5, 1.3 + of_names + 0.26 * len(columns)), 1.5 + 0.3 * len(rows)
    width, height = min(width, 16), min(height, 12)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap=SCALE, aspect="auto", interpolation="nearest")
    # A character takes about 0.085 inches; between two names is one more.
    inches_of_names = 0.085 * (len("".join(columns)) + len(columns))
    across = max(1, math.ceil(inches_of_names / (width - 1.3 - of_names)))
    down = max(1, math.ceil(len(rows) / 32))
    axes.set_xticks(range(0, len(columns), across), columns[::across])
    axes.set_yticks(range(0, len(rows), down), rows[::down])
    axes.set_title(title, loc="left")
    if len(columns) <= 12 and len(rows) <= 32:
        middle = (table.min() + table.max()) / 2 if table.count() else 0
        for (row, column), value in np.ndenumerate(table):
            if value is not np.ma.masked:
                axes.text(
                    column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color="w" if value < middle else "k"
                )
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def svg(figure: Figure) -> str:
    """An <svg> element with text as text, to stand in a page; equal figures give equal bytes."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nvfp4_train"}):
        # Without metadata, whose addresses look like something to fetch.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Red, green and blue of each pixel, [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _axes(title: str, x_label: str, y_label: str):
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _plain(axes)
    return figure, axes


def _rows(title: str, value_label: str, labels: Sequence[str]):
    """A row for each label, the first one on top, at 0, 1, 2, ..."""
    figure = Figure(figsize=(SIZE[0], 1.1 + 0.34 * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(value_label)
    axes.set_title(title, loc="left")
    _plain(axes)
    return figure, axes


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _colours(number: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(number)]
