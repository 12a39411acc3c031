"""docs/ builds as a site without a warning, no link is broken, and a browser that opens it fetches nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import DOCS, PAGES, ROOT, name_of


class Page(HTMLParser):
    """The anchors, links and resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a":
            self.links += [given["href"]] if "href" in given else []
        else:
            self.resources += [given[name] for name in ("src", "href", "data", "poster", "action") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # A proxy that refuses: what would fetch, fails.
    offline = os.environ | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, env=offline,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_is_built_and_reached_from_the_first(site: Path, built: dict[Path, Page]) -> None:
    of_pages = {(site / name_of(page)).with_suffix(".html") for page in PAGES}
    assert of_pages <= built.keys()
    first = built[site / "index.html"]
    assert of_pages <= {(site / urlsplit(link).path).resolve() for link in first.links} | {site / "index.html"}


def test_no_link_is_broken(site: Path, built: dict[Path, Page]) -> None:
    num_checked, broken = 0, []
    for path, page in built.items():
        # Only the page for addresses that do not exist has links from the root of a server.
        if path.name == "404.html":
            continue
        for link in [*page.links, *page.resources]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in built[target].anchors):
                broken.append(f"{path.name}: {link}")
            num_checked += 1
    assert not broken
    assert num_checked > 300


def test_nothing_is_fetched_from_another_host(site: Path, built: dict[Path, Page]) -> None:
    elsewhere = [link for page in built.values() for link in page.resources if urlsplit(link).netloc]
    assert not elsewhere
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", path.read_text()), path.name


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[two](two.md), [three](#three)\n")
    config = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[0]
    (tmp_path / "mkdocs.yml").write_text(config + "\nnav:\n  - index.md\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "two.md" in result.stderr
    assert "#three" in result.stderr


def test_the_readme_points_to_pages_that_exist() -> None:
    linked = re.findall(r"\]\((docs/.*?)\)", (ROOT / "README.md").read_text())
    assert len(linked) >= 5
    assert all((ROOT / path).is_file() for path in linked)
    assert DOCS / "index.md" in {ROOT / path for path in linked}
