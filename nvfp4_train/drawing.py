"""Pictures, tables and histograms in the loggers that can show them. Another logger is one function and one entry of `DRAWERS`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from nvfp4_train.pictures import pixels
from nvfp4_train.quant.statistics import Histogram


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """All that is drawn at one moment, by the names under which loggers show it: what is before the first slash is a section."""

    images: Mapping[str, Figure] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


def _in_wandb(logger: Any, drawings: Drawings, step: int) -> None:
    # Whoever has such a logger has imported it, which takes a second.
    import wandb

    shown: dict[str, Any] = {name: wandb.Image(pixels(figure)) for name, figure in drawings.images.items()}
    shown |= {
        name: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        for name, table in drawings.tables.items()
    }
    shown |= {
        name: wandb.Histogram(np_histogram=(counts.numpy(), edges.numpy()))
        for name, (counts, edges) in drawings.histograms.items()
    }
    # Each call is a step of wandb.
    logger.log_metrics(shown, step=step)


def _in_tensorboard(logger: Any, drawings: Drawings, step: int) -> None:
    writer = logger.experiment
    for name, figure in drawings.images.items():
        writer.add_image(name, pixels(figure), step, dataformats="HWC")
    for name, table in drawings.tables.items():
        writer.add_text(name, markdown(table), step)
    for name, histogram in drawings.histograms.items():
        counts, edges = (tensor.numpy() for tensor in histogram)
        if not len(filled := np.flatnonzero(counts)):
            continue
        middles = (edges[:-1] + edges[1:]) / 2
        writer.add_histogram_raw(
            name,
            min=edges[filled[0]],
            max=edges[filled[-1] + 1],
            num=counts.sum(),
            # Of the values themselves only their bins are known.
            sum=counts @ middles,
            sum_squares=counts @ middles**2,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


DRAWERS: dict[type[Logger], Callable[[Any, Drawings, int], None]] = {
    WandbLogger: _in_wandb,
    TensorBoardLogger: _in_tensorboard,
}
"""What shows drawings in a logger of a class or of one derived from it."""


def can_draw(loggers: Iterable[Logger]) -> bool:
    """Whether one of them shows drawings. To make them takes a quarter of a second each."""
    return any(isinstance(logger, tuple(DRAWERS)) for logger in loggers)


def draw(loggers: Iterable[Logger], drawings: Drawings, step: int) -> None:
    """Show drawings in every logger that can, at an optimizer step. Call it on the first rank."""
    for logger in loggers:
        for kind, drawer in DRAWERS.items():
            if isinstance(logger, kind):
                drawer(logger, drawings, step)


def markdown(table: Table) -> str:
    """A table in Markdown; numbers have four digits."""
    rows = [table.columns, ["---"] * len(table.columns), *([_cell(value) for value in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
