"""The pages of docs/, and what stands in their fences."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)(?: title=\"(.*?)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found.groups(default="")) for found in FENCE.finditer(page.read_text())]


def commands(page: Path) -> list[str]:
    """The lines of a page's `sh` blocks, continued lines joined."""
    lines = "".join(block.text for block in blocks(page) if block.language == "sh").replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))
