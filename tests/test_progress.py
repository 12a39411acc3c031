"""A bar is for a person: it is not in a log file, nor on other ranks than the first."""

import io
import sys

import pytest

from nvfp4_train.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("error_stream", "is_shown", "is_seen"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False), (io.StringIO, False, False)],
    ids=["terminal", "terminal of another rank", "log file", "log file of another rank"],
)
def test_it_is_shown_at_a_terminal_alone(
    error_stream: type[io.StringIO], is_shown: bool, is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = error_stream()
    monkeypatch.setattr(sys, "stderr", seen)
    assert list(progress_bar("calibration", is_shown=is_shown)([3, 1, 2])) == [3, 1, 2]
    assert bool(seen.getvalue()) == is_seen
    if is_seen:
        assert "calibration" in seen.getvalue()
        assert "/3" in seen.getvalue(), "of how many"


def test_an_iteration_without_a_known_end_is_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress_bar("export")(iter("ab"))) == ["a", "b"]
