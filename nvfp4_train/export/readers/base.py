"""What a reader has to know of a format to check a folder and decode its weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class ExportError(ValueError):
    """An exported folder that a reader would reject or decode to other weights. Begins with the name of the failed check."""


def require(check: str, condition: bool, message: str) -> None:
    """Raise ExportError unless the condition holds."""
    if not condition:
        raise ExportError(f"{check}: {message}")


class Reader(Protocol):
    """A format of NVFP4 folders. Parts of a quantized weight are named as behind `MODULE.` on disk."""

    marker: str
    """The part that quantized modules alone have."""
    codes: str
    block_scales: str
    stored_scale: str
    """The global scale, in whatever way the format stores it."""

    def parts(self, num_rows: int, num_columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """safetensors dtype and shape of every part of a weight."""

    def check_config(self, folder: Path, config: Mapping[str, Any]) -> Callable[[str], bool]:
        """Check the config of a folder, `config.json` given. Returns whether a loader takes a module of some name for quantized.

        Raises ExportError under `config` or `scheme`.
        """

    def decode(self, codes: np.ndarray, block_scales: np.ndarray, stored_scale: np.float32) -> np.ndarray:
        """float32 [M, K] of bytes of codes [M, K / 2], bytes of block scales [M, K / 16], and the stored scale."""
