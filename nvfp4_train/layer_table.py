"""RUN_DIR/layers.csv: the statistics of every quantized layer at every look at them, one row a layer and look, in order of steps."""

import csv
import io
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nvfp4_train.disk import replace_file
from nvfp4_train.earlier import keep_earlier

LAYERS_FILE = "layers.csv"
"""Its name in the folder of a run."""
KEYS = ("step", "layer")
"""The first columns. The others are statistics, by name."""

_TAIL_BYTES = 1 << 16
"""More than the longest line has."""


@dataclass(frozen=True)
class LayerRow:
    step: int
    """Optimizer steps done."""
    layer: str
    """The parameter's name without `.weight`."""
    values: dict[str, float]
    """Statistics by name, those that exist."""


def append_rows(path: Path, step: int, rows: Mapping[str, Mapping[str, float]], *, statistics: Collection[str] = ()) -> None:
    """Add a look at the layers: their statistics by layer and name. `statistics` are names that need no value yet.

    Rows of this step and later ones are replaced: they are of a run that was stopped, and that continues before them. A file that
    lacks a column is kept under a numbered name, and a new one begun.
    """
    names = list(dict.fromkeys((*statistics, *(name for values in rows.values() for name in values))))
    header = [*KEYS, *names]
    if path.exists():
        found = _header(path)
        if set(header) <= set(found):
            header = found
            last = _last_step(path)
            if last is None or last >= step:
                rewind(path, step - 1)
        else:
            keep_earlier(path)
    # repr gives the same float64 back.
    lines = [
        [str(step), layer, *("" if name not in values else repr(float(values[name])) for name in header[len(KEYS) :])]
        for layer, values in rows.items()
    ]
    if path.exists():
        with path.open("a", newline="") as file:
            file.write(_written(lines))
    else:
        _replace(path, [header, *lines])


def read_rows(path: Path) -> list[LayerRow]:
    """All rows, in the order of the file. A line that a killed run left unfinished is none."""
    # An empty file has no header either.
    header, *lines = _lines(path) or [[]]
    return [
        LayerRow(
            int(step), layer, {name: float(value) for name, value in zip(header[len(KEYS) :], values, strict=True) if value}
        )
        for step, layer, *values in lines
    ]


def rewind(path: Path, step: int) -> None:
    """Leave only the rows up to a step, of which a run continues."""
    if not (found := _lines(path)):
        return
    header, *lines = found
    _replace(path, [header, *(line for line in lines if int(line[0]) <= step)])


def _lines(path: Path) -> list[list[str]]:
    text = path.read_text()
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _last_step(path: Path) -> int | None:
    """The step of the last row, -1 where there is none; None where the last line is unfinished. Reads the end of the file alone."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        tail = file.read()
    if not tail.endswith(b"\n"):
        return None
    step = tail.splitlines()[-1].split(b",", 1)[0]
    return int(step) if step.isdigit() else -1


def _written(lines: Iterable[Iterable[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _replace(path: Path, lines: Iterable[Iterable[str]]) -> None:
    replace_file(path, _written(lines), what="the table of layers")
