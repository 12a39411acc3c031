"""Progress of a long phase, for a person at a terminal."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm


def progress_bar(description: str, *, is_shown: bool = True) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A function that shows how far an iteration is, with the time left. It shows nothing in a log file."""

    def shown(items: Iterable[Any]) -> Iterable[Any]:
        total = len(items) if isinstance(items, Sequence) else None
        return tqdm(items, desc=description, total=total, leave=False, disable=not (is_shown and sys.stderr.isatty()))

    return shown
