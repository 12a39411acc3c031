"""What a report is made of, before it is a page or a Markdown file."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Text:
    text: str
    """A paragraph."""


@dataclass(frozen=True)
class Code:
    text: str
    """A command, on a line of its own."""


@dataclass(frozen=True, kw_only=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    """`l` or `r` for each column; numbers stand at the right."""
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    figure: Figure
    says: str
    """What is to be seen, for those who do not see it."""
    numbers: Table
    """The same in numbers, or a summary of it."""
    is_wide: bool = False
    """Whether it takes the whole width of a page."""


Block = Text | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """One number that matters."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Contents:
    title: str
    subtitle: str
    verdict: Sequence[str]
    """Sentences."""
    tiles: Sequence[Tile]
    sections: Sequence[Section]
