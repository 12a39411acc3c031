"""One run, one folder: who is refused, and who is not."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nvfp4_train.errors import RunError
from nvfp4_train.run import lock
from nvfp4_train.run.lock import FILE, lock_folder


def hold(folder: Path, has_lock: Any) -> None:
    with lock_folder(folder, ["train.py", "+recipe=mine"]):
        has_lock.set()
        time.sleep(60)


@contextmanager
def holder(folder: Path) -> Iterator[Any]:
    """Another process that holds the folder."""
    context = multiprocessing.get_context("spawn")
    has_lock = context.Event()
    process = context.Process(target=hold, args=(folder, has_lock))
    process.start()
    try:
        assert has_lock.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_second_run_is_refused_at_once_and_a_killed_one_is_none(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        start = time.monotonic()
        with pytest.raises(
            RunError, match=rf"got {tmp_path}, where process {first.pid} on .* has run since .*: train.py \+recipe"
        ):
            lock_folder(tmp_path).__enter__()
        assert time.monotonic() - start < 1
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        assert (tmp_path / FILE).exists()
        with lock_folder(tmp_path):
            pass
    assert not (tmp_path / FILE).exists(), "the folder of a run that has ended holds its results alone"


def test_a_lock_file_that_was_deleted_under_a_second_run_is_not_taken_for_the_lock(tmp_path: Path) -> None:
    """The first run ends, and deletes the file, between the second one's opening and locking of it."""
    take, calls = lock._take, []

    def delete_first(descriptor: int, path: Path) -> None:
        take(descriptor, path)
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "_take", delete_first)
        with lock_folder(tmp_path):
            assert len(calls) == 2
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCH_S", 0.1)
    monkeypatch.setattr(lock, "WATCH_S", 0.5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("has_locks", [True, False], ids=["locks", "no locks"])
def test_a_run_on_another_host_is_known_by_its_signs_of_life(
    has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage may share files without locks. The other host is played by this one: a file that it wrote, and goes on to touch."""
    if not has_locks:

        def unsupported(*args: Any) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    path = tmp_path / FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(RunError, match="where process 7 on elsewhere has run"):
            lock_folder(tmp_path).__enter__()
    finally:
        ended.set()
        other.join()
    with lock_folder(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid(), "it showed no life, so it was killed"


@pytest.mark.usefixtures("quick")
def test_a_run_shows_signs_of_life(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        before = (tmp_path / FILE).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / FILE).stat().st_mtime_ns > before
