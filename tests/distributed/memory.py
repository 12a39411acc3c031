"""Peak memory of a process, as Linux counts it."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")


def status(field: str) -> int:
    """Bytes."""
    (line,) = (line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def peak_growth(function: Callable[[], Any]) -> int:
    """By how many bytes the resident memory grew at most while the function ran."""
    # Every freed tensor goes back to the system at once (M_MMAP_THRESHOLD of 64 KiB), so that live memory is what is counted.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    # Start the peak anew.
    (PROCESS / "clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before
