"""Every message that docs/failures.md quotes is one of the source: its fixed parts stand, in order, in one string there."""

import ast
import re
from collections.abc import Iterator

import pytest
from pages import DOCS, ROOT

PAGE = (DOCS / "failures.md").read_text()
ANYTHING = "…"
GAP = "\0"
"""Stands for what a string of the source puts in."""


def strings(tree: ast.AST) -> Iterator[str]:
    """The strings of a file but for docstrings, each f-string as one, with gaps."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        yield from strings(node)


SOURCE = [
    text
    for folder in ("nvfp4_train", "launch")
    for file in sorted((ROOT / folder).rglob("*.py"))
    for text in strings(ast.parse(file.read_text()))
]


def quoted() -> list[str]:
    """What stands in backticks in the first column of the tables headed `message`."""
    found: list[str] = []
    for table in re.findall(r"^\| message \|.*\n\| --- .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        for line in table.splitlines():
            found += re.findall("`(.*?)`", re.split(r"(?<!\\)\|", line)[1])
    return found


def is_in_source(message: str, source: list[str]) -> bool:
    parts = [part.strip() for part in message.removeprefix("error: ").split(ANYTHING)]
    pattern = re.compile(".*".join(re.escape(part) for part in parts if part), re.DOTALL)
    return any(pattern.search(text) for text in source)


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert is_in_source(message, SOURCE)


def test_the_page_quotes_messages_of_every_phase() -> None:
    assert len(quoted()) > 70
    assert len(set(quoted())) == len(quoted())


def test_other_words_are_not_found() -> None:
    """What the test above would say of a message that was changed."""
    assert is_in_source("quant.rule must be one of …, got …", ["quant.rule must be one of \0, got \0"])
    assert not is_in_source("quant.rule must be one of …, got …", ["quant.rule must be in \0, got \0"])
    assert not is_in_source("b … a", ["a \0 b"])
