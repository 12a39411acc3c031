"""Progress is for a person: a bar at a terminal, a line a minute in a log file, and nothing on other ranks than the first."""

import io
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from nvfp4_train import progress as module
from nvfp4_train.progress import progress, progress_bar

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, time
from tqdm.auto import tqdm
from nvfp4_train import progress
progress.LINE_EVERY_S = 0.2
progress.tame_other_bars(is_shown="rank 0" in sys.argv)
with progress.progress("verifying", total=16_000_000_000, unit="B", is_shown="rank 0" in sys.argv) as bar:
    for _ in range(8):
        time.sleep(0.1)
        bar.advance(2_000_000_000)
    bar.note("all equal")
for _ in tqdm(range(8), desc="Tokenizing"):
    time.sleep(0.1)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("error_stream", "term", "is_shown", "is_seen"),
    [
        (Terminal, "xterm", True, True),
        (Terminal, "dumb", True, False),
        (Terminal, "xterm", False, False),
        (io.StringIO, "xterm", True, False),
        (io.StringIO, "xterm", False, False),
    ],
    ids=["terminal", "dumb terminal", "terminal of another rank", "log file", "log file of another rank"],
)
def test_a_short_phase_is_shown_at_a_terminal_alone(
    error_stream: type[io.StringIO], term: str, is_shown: bool, is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = error_stream()
    monkeypatch.setattr(sys, "stderr", seen)
    monkeypatch.setenv("TERM", term)
    assert list(progress_bar("calibration", is_shown=is_shown)([3, 1, 2])) == [3, 1, 2]
    assert bool(seen.getvalue()) == is_seen
    if is_seen:
        assert "calibration" in seen.getvalue()
        assert "/3" in seen.getvalue(), "of how many"


def test_an_iteration_without_a_known_end_is_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress_bar("export")(iter("ab"))) == ["a", "b"]


@pytest.mark.parametrize(("total", "says"), [(8, "of 8 files"), (None, "of ? files"), (800_000, "of 800k files")])
def test_a_line_says_how_much_is_left(total: int | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.05)
    with progress("exporting", total=total, unit="files") as bar:
        bar.note("shard 3")
        for _ in range(4):
            time.sleep(0.03)
            bar.advance()
    lines = log.getvalue().splitlines()
    assert 1 <= len(lines) <= 2, lines
    assert lines[0].startswith("exporting: ")
    assert says in lines[0]
    assert lines[0].endswith(" left, shard 3")


def run_at(terminal: bool, rank: str, **environment: str) -> str:
    """What the script writes to stderr, a terminal or a pipe."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (24, 100))
    command = [sys.executable, "-c", SCRIPT, rank]
    with subprocess.Popen(command, stderr=writer, cwd=ROOT, env=os.environ | environment) as process:
        os.close(writer)
        seen = b""
        try:
            while part := os.read(reader, 4096):
                seen += part
        except OSError:
            # Linux ends a terminal that nobody writes to any more with an error.
            pass
        assert process.wait() == 0
    os.close(reader)
    return seen.decode()


def test_bars_of_other_packages_follow_the_same_rules() -> None:
    bars = run_at(True, "rank 0", TERM="xterm")
    assert "\r" in bars
    assert "verifying" in bars
    assert "Tokenizing" in bars
    for terminal, term in ((False, "xterm"), (True, "dumb")):
        lines = run_at(terminal, "rank 0", TERM=term).split("\n")
        texts = [line.strip() for line in lines if line.strip()]
        assert 2 <= len(texts) <= 8, texts
        assert {text.split(":")[0] for text in texts} == {"verifying", "Tokenizing"}
        assert all(text.endswith(" left") for text in texts), texts
    assert run_at(True, "rank 1", TERM="xterm") == ""
