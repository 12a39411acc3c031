"""How far a long phase is, with the time left: a bar at a terminal, and a line a minute in a log file or under TERM=dumb.

    with progress("verifying", total=num_bytes, unit="B", is_shown=rank == 0) as bar:
        bar.advance(n)

    for batch in progress_bar("calibration", is_shown=rank == 0)(batches): ...

A phase of less than a minute leaves no line in a log file. What is shown goes to stderr.
"""

import io
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY_S = 60.0
"""Seconds between two lines of a phase where there is no terminal, and before its first one."""

LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} so far, {remaining} left{postfix}"
"""What such a line says, in tqdm's words; what is not known is a question mark."""

SCALED = 100_000
"""Totals from here on are written with k, M and G."""


def progress_bar(
    description: str, *, total: int | None = None, unit: str = "batches", is_shown: bool = True
) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A function that shows how far an iteration is. `total` is for items that do not know their number."""

    def shown(items: Iterable[Any]) -> Iterator[Any]:
        with progress(description, total=_length(items) if total is None else total, unit=unit, is_shown=is_shown) as bar:
            for item in items:
                yield item
                bar.advance()

    return shown


def _length(items: Any) -> int | None:
    try:
        return len(items)
    except TypeError:
        return None


class Progress:
    """A context manager, made by `progress`. Any thread may advance it."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, n: int = 1) -> None:
        """Count `n` more units."""
        with self._lock:
            self._bar.update(n)

    def note(self, text: str) -> None:
        """Show a text behind the numbers from now on."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Remove the bar. What is not used as a context manager is closed by hand."""
        self._bar.close()


def progress(
    description: str, *, total: int | None = None, unit: str = "steps", start: int = 0, is_shown: bool = True
) -> Progress:
    """The progress of a phase of `total` units, or of an unknown number, from `start` on. "B" are bytes.

    Nothing is shown where not `is_shown`.
    """
    return Progress(
        tqdm(
            desc=description,
            total=total,
            initial=start,
            unit=unit if unit == "B" or at_terminal() else f" {unit}",
            unit_scale=unit == "B" or (total or 0) >= SCALED,
            **{"leave": False} | _options(is_shown),
        )
    )


def at_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        # One that no window belongs to has no columns.
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return True


@contextmanager
def printing_above_bars() -> Iterator[None]:
    """Let what is printed meanwhile stand above the bars of a terminal, line by line."""
    if not (at_terminal() and sys.stdout.isatty()):
        yield
        return
    above = _AboveBars(sys.stdout)
    try:
        with redirect_stdout(above):
            yield
    finally:
        above.close()


def tame_other_bars(*, is_shown: bool) -> None:
    """Let the bars that other packages draw with tqdm follow the same rules, in all of this process from now on."""
    if options := _options(is_shown):
        tqdm.__init__ = partialmethod(tqdm.__init__, **options)  # type: ignore[method-assign, assignment]


def _options(is_shown: bool) -> dict[str, Any]:
    """Arguments of tqdm for where this process writes."""
    if not is_shown:
        return {"disable": True}
    if at_terminal():
        return {}
    every = dict.fromkeys(("delay", "mininterval", "maxinterval"), LINE_EVERY_S)
    return {"file": _Lines(), "bar_format": LINE, "leave": False, **every}


class _Lines(io.TextIOBase):
    """What tqdm draws over its last line becomes a line of its own on stderr."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


class _AboveBars(io.TextIOBase):
    """Takes the bars away while it writes to `stream`, a line at a time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._unfinished = ""

    def write(self, text: str) -> int:
        lines, end, rest = (self._unfinished + text).rpartition("\n")
        self._unfinished = rest
        if end:
            with tqdm.external_write_mode(file=sys.stderr):
                self._stream.write(lines + end)
                self._stream.flush()
        return len(text)

    def close(self) -> None:
        if not self.closed:
            self._stream.write(self._unfinished)
        super().close()
