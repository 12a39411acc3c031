"""safetensors files and NVFP4 bytes in NumPy, with tables of its own."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}

PIECE_BYTES = 1 << 24
"""Of a tensor that is compared with another."""

E2M1_TABLE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _e4m3_value(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 0xF, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    magnitude = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -magnitude if byte & 0x80 else magnitude


E4M3_TABLE = np.array([_e4m3_value(byte) for byte in range(256)], np.float32)


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of a tensor lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def bytes(self, first_row: int = 0, num_rows: int | None = None) -> np.ndarray:
        """The bytes, uint8, of the whole tensor or of some of its rows, [num_rows, bytes of a row]."""
        if num_rows is None:
            return np.fromfile(self.path, np.uint8, self.num_bytes, offset=self.start)
        row = self.num_bytes // self.shape[0]
        data = np.fromfile(self.path, np.uint8, num_rows * row, offset=self.start + first_row * row)
        return data.reshape(num_rows, row)

    def pieces(self, piece_bytes: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The tensor's bytes in pieces, uint8, one after the other, each with its place."""
        for first in range(0, self.num_bytes, piece_bytes):
            last = min(first + piece_bytes, self.num_bytes)
            yield slice(first, last), np.fromfile(self.path, np.uint8, last - first, offset=self.start + first)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. ValueError where the file is not one, or its parts do not fill it exactly."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        header_bytes = struct.unpack("<Q", length)[0] if len(length) == 8 else file_bytes
        if header_bytes > file_bytes - 8:
            raise ValueError(f"{path.name} is cut off in its header")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    data_start = 8 + header_bytes
    if header.pop("__metadata__", None) != {"format": "pt"}:
        raise ValueError(f'{path.name} must have the metadata {{"format": "pt"}}')
    tensors = {}
    filled = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if begin != filled or end - begin != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"{path.name} has offsets {begin}:{end} for {name}, which do not fit its {entry['dtype']} {shape}")
        filled = end
        tensors[name] = StoredTensor(path, entry["dtype"], shape, data_start + begin, end - begin)
    if data_start + filled != file_bytes:
        raise ValueError(f"{path.name} has {file_bytes} bytes, its header describes {data_start + filled}")
    return tensors


def decode_rows(packed: np.ndarray, decode_scales: np.ndarray) -> np.ndarray:
    """Bytes of codes [M, K / 2] and float32 decode scales [M, K / 16] -> float32 [M, K]."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return E2M1_TABLE[codes] * np.repeat(decode_scales, 16, axis=1)


def encode_input_rows(x: np.ndarray, divisor: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """What serving engines make of an input float32 [M, K] under its global scale: bytes of codes [M, K / 2] and scales [M, K / 16].

    scale = E4M3(min(448, divisor * (amax * fp32(1 / 6)))) and code = E2M1(x * (divisor / scale)), each operation rounded in float32.
    """
    blocks = x.reshape(len(x), -1, 16)
    magnitudes = np.abs(blocks)
    with np.errstate(over="ignore", under="ignore"):
        ratio = divisor * (magnitudes.max(-1) * np.float32(1 / 6))
        scales = _nearest(E4M3_TABLE[:0x7F], ratio)
        values = E4M3_TABLE[scales][..., None]
        factors = np.divide(divisor, values, out=np.zeros_like(values), where=values > 0)
        codes = _nearest(E2M1_TABLE[:8], magnitudes * factors)
    codes = (codes | (blocks < 0) * (values > 0) * 8).reshape(x.shape).astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales.astype(np.uint8)


def _nearest(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index in an ascending table of the value nearest to each x >= 0, of the even one of two as near. Saturates."""
    midpoints = (table[1:] + table[:-1]) / 2
    index = np.searchsorted(midpoints, x)
    is_tie = midpoints[np.minimum(index, len(midpoints) - 1)] == x
    return index + (is_tie & (index % 2 == 1))


def to_bf16_bits(x: np.ndarray) -> np.ndarray:
    """The nearest bf16, ties to even, of each finite float32: its bits as uint16."""
    bits = x.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
