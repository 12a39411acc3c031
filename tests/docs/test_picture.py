"""The README opens with a picture of its own table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT
from picture import BARS, PICTURE, chosen, read_table

README = (ROOT / "README.md").read_text()


def texts(svg: str) -> list[str]:
    """What is written in a picture. Places and fonts are those of a version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]*)", svg)


def lengths(svg: str) -> list[float]:
    """Widths of the bars, of the picture's own: paths of four corners that are filled in a colour of a bar."""
    colours = {colour for _, colour, _ in BARS}
    paths = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*"[^>]*?fill: (#\w{6})', svg)
    return [float(right) - float(left) for left, right, colour in paths if colour in colours]


def test_the_picture_is_that_of_the_table(tmp_path: Path) -> None:
    again = tmp_path / "result.svg"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "picture.py", "--out", again], check=True, cwd=tmp_path)
    assert texts(again.read_text()) == texts(PICTURE.read_text()), "python benchmarks/picture.py draws it anew"


def test_the_picture_shows_the_values_of_the_table() -> None:
    svg = PICTURE.read_text()
    values = [value for row in chosen(read_table(README)).values() for value in row]
    assert len(values) == 8
    assert [text for text in texts(svg) if re.fullmatch(r"0\.\d{4}", text)] == [f"{value:.4f}" for value in values]
    longest = max(lengths(svg))
    assert [length / longest for length in lengths(svg)] == pytest.approx([value / max(values) for value in values], abs=0.002)


def test_a_changed_table_changes_the_values() -> None:
    values = chosen(read_table(README.replace("**0.0319**", "**0.0320**")))
    assert values["W4A16"][-1] == 0.0320
    with pytest.raises(ValueError, match=re.escape("one row must begin with 'PTQ, ours', got []")):
        chosen(read_table(README.replace("| PTQ, ours", "| PTQ")))


def test_the_readme_opens_with_it_and_says_the_same_to_who_cannot_see_it() -> None:
    opening = README.partition("## Quickstart")[0]
    (alternative, path), *_ = re.findall(r"!\[(.*?)\]\((.*?)\)", opening, re.DOTALL)
    assert ROOT / path == PICTURE
    assert "python benchmarks/picture.py" in opening
    values = chosen(read_table(README))
    for pair in zip(values["W4A16"], values["W4A4"], strict=True):
        assert f"{pair[0]:.4f} and {pair[1]:.4f}" in " ".join(alternative.split())
