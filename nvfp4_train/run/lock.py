"""One run, one folder: a lock on the run folder that a second run is refused by, and that no killed run leaves behind.

The lock is one of the system on a file (POSIX), which ends with its process, however that ends, on local disks and on NFS. Storage that
shares files but not locks would let a second node in, so the holder also touches the file every few seconds. Whoever gets the lock, and
finds that another host wrote the file, watches it for a while before going on.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

try:
    import fcntl
except ImportError:
    # Windows: a second run is noticed by the touched file alone.
    fcntl = None  # type: ignore[assignment]

from nvfp4_train.errors import RunError

FILE = ".lock"
TOUCH_S = 2.0
"""Seconds between two signs of life."""
WATCH_S = 5 * TOUCH_S
"""Seconds without one after which a run on another host has ended."""


@contextmanager
def lock_folder(folder: Path, command: Sequence[str] = ()) -> Iterator[None]:
    """Hold a folder, which is made if need be, inside the context. Call it on one rank.

    Raises RunError, which names the other run, where one is in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    descriptor = _open_locked(path)
    try:
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": " ".join(command),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        ended = threading.Event()
        touching = threading.Thread(target=_touch, args=(descriptor, ended), name="run folder lock", daemon=True)
        touching.start()
        try:
            yield
        finally:
            ended.set()
            touching.join()
            path.unlink(missing_ok=True)
    finally:
        # Ends the lock.
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """A descriptor of the file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor, path)
            # A run that has just ended may have deleted the file that was opened here.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    is_locked = False
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except (BlockingIOError, PermissionError):
            raise _refusal(path.parent, _holder(descriptor, wait_s=1.0)) from None
        except OSError:
            # Some shared storage has no locks.
            pass
    holder = _holder(descriptor)
    is_of_this_host = holder.get("host") == socket.gethostname()
    if not holder or (is_locked and is_of_this_host):
        return
    print(f"{path.parent} was held on {holder.get('host')}: watching it for {WATCH_S:g} s for signs of life", flush=True)
    seen, until = os.fstat(descriptor).st_mtime_ns, time.monotonic() + WATCH_S
    while time.monotonic() < until:
        time.sleep(TOUCH_S / 4)
        # Opened anew: NFS shows another host's changes at an open.
        if not path.exists():
            return
        if path.stat().st_mtime_ns != seen:
            raise _refusal(path.parent, holder)


def _holder(descriptor: int, wait_s: float = 0.0) -> dict[str, Any]:
    """Who wrote the file; empty where nobody did. One that has just taken the lock is waited for."""
    until = time.monotonic() + wait_s
    while not (written := os.pread(descriptor, 1 << 16, 0)) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        return dict(json.loads(written or b"{}"))
    except (ValueError, TypeError):
        return {"host": "an unknown host"}


def _refusal(folder: Path, holder: dict[str, Any]) -> RunError:
    command = f": {shorten(holder['command'], 200, placeholder=' ...')}" if holder.get("command") else ""
    return RunError(
        f"run_dir must be a folder that no other run is in, got {folder}, where process {holder.get('pid', 'unknown')} on "
        f"{holder.get('host', 'an unknown host')} has run since {holder.get('since', 'an unknown time')}{command}; wait for its end, "
        "or set another run_dir"
    )


def _touch(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_S):
        with suppress(OSError):
            os.utime(descriptor)
