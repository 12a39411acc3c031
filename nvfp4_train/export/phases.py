"""Progress of the long phases of an export. Whoever calls decides how it is shown; `nvfp4_train.progress.progress` fits."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """How far a phase is."""

    def advance(self, n: int = 1, /) -> object:
        """Count `n` more units."""


class Phases(Protocol):
    """Called when a phase begins, with what is done in it and the number of units to come."""

    def __call__(self, description: str, *, total: int, unit: str) -> AbstractContextManager[Bar]: ...


class _NoBar:
    def advance(self, n: int = 1, /) -> None:
        pass


def silent(description: str, *, total: int, unit: str) -> AbstractContextManager[Bar]:
    """Shows nothing."""
    return nullcontext(_NoBar())
