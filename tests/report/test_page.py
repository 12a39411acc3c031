"""The page of a real run in a real browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import look

from nvfp4_train.layer_table import append_rows
from nvfp4_train.report import write_report
from nvfp4_train.report.numbers import STATISTICS

PAGE = '<!DOCTYPE html><html lang="en"><head><link rel="icon" href="data:,"><title>.</title></head><body>{}</body></html>'
TABLES = """console.log(JSON.stringify([...document.querySelectorAll(".scroll")].map(place => ({
  of: place.closest("section").id, wide: place.scrollWidth, place: place.clientWidth, bottom: place.getBoundingClientRect().bottom,
  columns: place.querySelectorAll("thead th").length,
  row: Math.max(...[...place.querySelectorAll("tbody tr")].map(row => row.offsetHeight)),
}))))"""


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (400, True)])
def test_a_browser_shows_the_page_and_has_nothing_to_say(width: int, dark: bool, run: tuple[Path, str], tmp_path: Path) -> None:
    seen = look(run[0] / "report.html", tmp_path / "seen.png", width=width, dark=dark)
    assert seen.pixels.shape[1] == width
    assert not seen.is_blank()
    assert seen.console == []
    assert seen.requests == []
    # The paper at the edge is light, or dark.
    assert (np.median(seen.pixels[:, :8]) < 128) == dark


def test_the_look_finds_errors_requests_and_blank_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGE.format('<img src="http://example.invalid/a.png" alt=""><script>not_defined()</script>'))
    seen = look(page, tmp_path / "seen.png", width=400, height=400)
    assert seen.requests == ["http://example.invalid/a.png"]
    (line,) = seen.console
    assert "not_defined is not defined" in line
    page.write_text(PAGE.format(""))
    seen = look(page, tmp_path / "seen.png", width=400, height=400)
    assert seen.is_blank()
    assert seen.requests == seen.console == []


def test_no_wide_table_or_picture_widens_the_page_of_a_phone(run: tuple[Path, str], tmp_path: Path) -> None:
    """A script that is added to the page tells how wide it came to be. Chromium opens no window below 500 pixels."""
    text = (run[0] / "report.html").read_text()
    page = tmp_path / "page.html"
    page.write_text(
        text.replace("</body>", "<script>console.log(`${document.documentElement.scrollWidth} wide`)</script></body>")
    )
    (line,) = look(page, tmp_path / "seen.png", width=500).console
    assert '"500 wide"' in line


def test_no_table_is_wider_than_its_place_on_a_screen(run: tuple[Path, str], tmp_path: Path) -> None:
    """With every statistic there is, long names of layers and the longest hint; a script says how wide tables came to be."""
    run_dir = Path(shutil.copytree(run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "export")))
    (run_dir / "layers.csv").unlink()
    rows = {
        f"model.layers.{depth}.self_attn.{kind}_proj": {
            name: 0.0123456 * (place + depth) for place, name in enumerate(STATISTICS)
        }
        | {"input_clipped_share": 0.00012345, "scale_at_floor_share": 0.12345, "sibling_amax_ratio": 0.0123456}
        for depth in range(28)
        for kind in "qkv"
    }
    append_rows(run_dir / "layers.csv", 5, rows)
    for values in rows.values():
        del values["input_clipped_share"]
    append_rows(run_dir / "layers.csv", 9, rows)
    page = write_report(run_dir)
    page.write_text(page.read_text().replace("</body>", f"<script>{TABLES}</script></body>"))
    seen = look(page, tmp_path / "seen.png", width=1200, height=9000)
    (line,) = seen.console
    tables = json.loads(re.sub(r'^"|", source:.*', "", line))
    (worst,) = [table for table in tables if table["of"] == "the-ten-worst-layers"]
    assert worst["columns"] == 8
    # The picture has it, and rows are of a few lines.
    assert worst["bottom"] < seen.pixels.shape[0]
    assert worst["row"] < 200, worst
    assert not [table for table in tables if table["wide"] > table["place"]]


def test_the_page_refers_to_nothing_outside_of_it(run: tuple[Path, str]) -> None:
    text = (run[0] / "report.html").read_text()
    assert "<script" not in text
    assert not re.search(r"@import|<iframe|<object|<embed|<base|http-equiv", text)
    references = re.findall(r"""(?:src|href|data|action)\s*=\s*["']?([^"'\s>]*)""", text) + re.findall(r"url\(([^)]*)\)", text)
    assert references
    assert all(reference.startswith(("#", "data:")) for reference in references), references


def test_names_of_a_page_are_its_own(run: tuple[Path, str]) -> None:
    """Each name once, each reference to a name that is there, headings in order, and words for each picture."""
    text = (run[0] / "report.html").read_text()
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {(name, "") for name in names} | {
        ("", name) for name in names
    }
    assert text.count('<a href="#') == text.count("<h2>")
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert text.count("<svg") == len(re.findall(r'role="img" aria-label="[^"]{20,}"', text)) > 3
    assert '<html lang="en">' in text
