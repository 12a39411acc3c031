"""The pages of docs/extend/ do what they say: in a copy of the repository with their files, commands run and checks hold."""

import contextlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks, commands
from running import SMALL, forked_python, train_environment

PAGES = {page.stem: page for page in sorted((DOCS / "extend").glob("*.md"))}
AT_THE_END = "at the end of "
SHORT = ("trainer.max_steps=3", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "quant.start_step=0")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files of all pages."""
    folder = tmp_path_factory.mktemp("extended")
    for part in ("nvfp4_train", "launch", "configs", "recipes"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for page in PAGES.values():
        for block in blocks(page):
            if not block.title:
                continue
            path = folder / block.title.removeprefix(AT_THE_END)
            assert path.exists() == block.title.startswith(AT_THE_END), f"{page}: {block.title}"
            with path.open("a") as file:
                file.write(block.text)
    return folder


def test_there_is_a_page_for_each_kind() -> None:
    assert set(PAGES) == {"rule", "loss", "format", "statistic"}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_one_file_and_looks_at_what_came_of_it(name: str) -> None:
    found = blocks(PAGES[name])
    assert sum(bool(block.title) for block in found) == 1, "one file, or one entry"
    assert [block.language for block in found] == ["python", "sh", "python"]
    assert "assert " in found[-1].text
    assert len(PAGES[name].read_text().splitlines()) <= 46


@pytest.mark.parametrize("name", PAGES)
def test_a_page_does_what_it_says(name: str, repository: Path) -> None:
    python, server = forked_python(repository)
    for command in commands(PAGES[name]):
        interpreter, launcher, *options = shlex.split(command)
        assert interpreter == "python"
        result = subprocess.run(
            [python, repository / launcher, *options, *SMALL, *SHORT],
            capture_output=True, text=True, cwd=repository, env=train_environment(package=repository) | server,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    check = blocks(PAGES[name])[-1]
    with contextlib.chdir(repository):
        exec(compile(check.text, str(PAGES[name]), "exec"), {})
