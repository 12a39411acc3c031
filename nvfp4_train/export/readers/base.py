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
    """Reads a format of NVFP4 folders. The name of a quantized weight's part is what follows `MODULE.` on disk."""

    marker: str
    """The part that only quantized modules have."""
    codes: str
    block_scales: str
    stored_scale: str
    """The global scale, in whatever way the format stores it."""
    stored_input_scale: str | None = None
    """The global scale of a linear's input, float32 in whatever way the format stores it. None where it knows of none."""
    input_scale_shape: tuple[int, ...] = (1,)

    def parts(self, num_rows: int, num_columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """safetensors dtype and shape of every part of a weight."""

    def check_config(self, folder: Path, config: Mapping[str, Any]) -> Callable[[str], bool]:
        """Check the config of a folder; `config` is its config.json. Returns a function from the name of a module to whether a loader
        takes it for quantized.

        Raises ExportError under `config` or `scheme`.
        """

    def packages(self) -> list[str]:
        """Packages of others, with their versions, that `check_config` has asked."""
        return []

    def quantizes_inputs(self, config: Mapping[str, Any]) -> bool:
        """Whether a loader quantizes the inputs of quantized modules. `config` has been checked."""
        return False

    def global_scale(self, stored_scale: np.float32) -> np.float32:
        """s2, of the global scale as the format stores it. A format from which folders are converted defines it."""
        raise NotImplementedError

    def input_scale(self, stored_input_scale: np.float32) -> np.float32:
        """1 / g, of the global scale of an input as the format stores it. A format that quantizes inputs defines it."""
        raise NotImplementedError

    def encode_input(self, x: np.ndarray, stored_input_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of codes [T, K / 2] and of block scales [T, K / 16] that a loader makes of the input float32 [T, K] of a module. A
        format that quantizes inputs defines it.
        """
        raise NotImplementedError

    def decode(self, codes: np.ndarray, block_scales: np.ndarray, stored_scale: np.float32) -> np.ndarray:
        """Decode bytes of codes [M, K / 2] and of block scales [M, K / 16] under the stored scale to float32 [M, K]."""
