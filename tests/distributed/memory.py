"""Peak memory of a process, as Linux counts it."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")
# Values from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def status(field: str) -> int:
    """Bytes."""
    (line,) = (line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def return_freed_memory() -> None:
    """From now on freed tensors go back to the system at once, so that resident memory is live memory.

    Call it before the first tensor is made: glibc raises its thresholds when large blocks are freed, and keeps those in a heap.
    """
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        if not libc.mallopt(parameter, 1 << 16):
            raise OSError(f"mallopt({parameter}) failed")
    libc.malloc_trim(0)


def peak_growth(function: Callable[[], Any]) -> int:
    """By how many bytes the resident memory grew at most while the function ran; needs `return_freed_memory` before."""
    # Start the peak anew.
    (PROCESS / "clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before
