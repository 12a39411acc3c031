"""The report as Markdown; a picture becomes its numbers."""

import re
from collections.abc import Sequence

from nvfp4_train.report.blocks import Block, Code, Contents, Picture, Table, Text

RULES = {"l": "---", "r": "---:"}


def document(contents: Contents) -> str:
    """The text of report.md."""
    parts = [f"# {_text(contents.title)}", _text(contents.subtitle), _text(" ".join(contents.verdict))]
    if contents.tiles:
        rows = [[tile.label, f"{tile.value} {tile.note}".strip()] for tile in contents.tiles]
        parts.append(_table(Table(header=["", ""], rows=rows, align="lr")))
    for section in contents.sections:
        parts.append(f"## {_text(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(filter(None, parts)) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _text(block.text)
    if isinstance(block, Code):
        # Longer than any in the text, which would end the block.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return f"{fence}sh\n{block.text}\n{fence}"
    if isinstance(block, Picture):
        return f"{_text(block.says)}\n\n{_table(block.numbers)}"
    return _table(block)


def _table(table: Table) -> str:
    lines: list[Sequence[str]] = [table.header, [RULES[side] for side in table.align]]
    written = [
        _row([_text(cell) for cell in lines[0]]),
        _row(lines[1]),
        *(_row([_text(cell) for cell in row]) for row in table.rows),
    ]
    return (f"### {_text(table.title)}\n\n" if table.title else "") + "\n".join(written)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(text: str) -> str:
    """Text that Markdown shows as it is: names of layers and options have underscores, stars and brackets."""
    for mark in ("\\", "`", "*", "_", "[", "]", "<", "|", "#"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
