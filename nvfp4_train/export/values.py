"""Compares the tensors of an exported folder with the expected ones bit for bit, on all cores.

A reader decodes every pair of a byte of codes and a block scale once, under each global scale. With that table, a weight is decoded by
one look-up for two values.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from nvfp4_train.export.phases import Bar
from nvfp4_train.export.readers.base import ExportError, Reader
from nvfp4_train.export.readers.disk import StoredTensor, to_bf16_bits
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.parallel import in_threads

READ_ELEMENTS = 1 << 21
"""Elements of a piece, which a thread reads at once. Reading in pieces keeps memory small next to the largest matrix."""
DECODED_ELEMENTS = 1 << 19
"""Elements that are decoded at once; the intermediate results fit into a core's cache."""
CODES_OF_BLOCK = BLOCK_SIZE // 2

Decode = Callable[[np.ndarray, np.ndarray, np.float32], np.ndarray]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor to compare."""

    tensor: str
    num_bytes: int
    """On disk."""
    count_wrong: Callable[[], int]
    """How many values differ. Called in a thread."""
    message: str
    """What to say of the tensor; {} stands for the number of wrong values."""


def compare(pieces: Iterable[Piece], bar: Bar) -> None:
    """Compare all pieces; those of a tensor follow each other. Raises ExportError for the first tensor that differs."""
    wrong, last = 0, None
    for piece, count in in_threads(lambda piece: (piece, piece.count_wrong()), pieces):
        if last is not None and piece.tensor != last.tensor:
            _refuse(last, wrong)
        wrong += count
        last = piece
        bar.advance(piece.num_bytes)
    if last is not None:
        _refuse(last, wrong)


def _refuse(piece: Piece, wrong: int) -> None:
    if wrong:
        raise ExportError(f"values: {piece.tensor} {piece.message.format(wrong)}")


def plain_pieces(key: str, stored: StoredTensor, expected: np.ndarray, elements: int | None = None) -> Iterator[Piece]:
    """Of a tensor whose bytes, uint8 [num_bytes], have to be the expected ones; `elements` of two bytes each make a piece."""

    def count_wrong(first: int, last: int) -> int:
        got = np.fromfile(stored.path, np.uint8, last - first, offset=stored.start + first)
        return int(not np.array_equal(got, expected[first:last]))

    step = 2 * (elements or READ_ELEMENTS)
    for first in range(0, stored.num_bytes, step):
        last = min(first + step, stored.num_bytes)
        yield Piece(key, last - first, partial(count_wrong, first, last), "differs from the expected weight")


@dataclass(frozen=True)
class Packed:
    """A quantized weight on disk."""

    reader: Reader
    codes: StoredTensor
    block_scales: StoredTensor
    stored_scale: np.float32
    elements: int | None = None
    """Elements of a piece; None for `READ_ELEMENTS`."""

    def rows(self, first: int, count: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Some rows, in parts of `DECODED_ELEMENTS`: their place, and what `decode` takes."""
        codes, scales = self.codes.bytes(first, count), self.block_scales.bytes(first, count)
        step = max(1, min(DECODED_ELEMENTS, self.elements or READ_ELEMENTS) // (2 * codes.shape[1]))
        for row in range(0, count, step):
            part = slice(row, min(row + step, count))
            yield slice(first + part.start, first + part.stop), codes[part], scales[part]

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows of every piece."""
        num_rows, row_bytes = self.codes.shape
        step = max(1, (self.elements or READ_ELEMENTS) // (2 * row_bytes))
        for first in range(0, num_rows, step):
            yield first, min(step, num_rows - first)

    def decode(self, codes: np.ndarray, scales: np.ndarray, factor: float = 1) -> np.ndarray:
        """Bits of the bf16 [M, K] nearest to the decoded values times `factor`, as uint16."""
        # One index a byte of codes: the block's scale, and the byte.
        index = scales.astype(np.intp)[..., None] << 8 | codes.reshape(*scales.shape, CODES_OF_BLOCK)
        table = decoding_table(self.reader.decode, self.stored_scale.tobytes(), factor)
        return table.take(index.reshape(len(codes), -1), mode="wrap").view(np.uint16)

    def decode_all(self) -> np.ndarray:
        """Bits of the whole weight in bf16, uint16 [N, K]."""
        bits = np.empty((self.codes.shape[0], 2 * self.codes.shape[1]), np.uint16)

        def fill(piece: tuple[int, int]) -> None:
            for rows, codes, scales in self.rows(*piece):
                bits[rows] = self.decode(codes, scales)

        for _ in in_threads(fill, self.row_ranges()):
            pass
        return bits

    def pieces(self, module: str, expected: np.ndarray) -> Iterator[Piece]:
        """To compare with the expected bits, uint16 [N, K]."""
        message = f"decodes to {{}} of {expected.size} values that differ from the expected weight"
        for first, count in self.row_ranges():
            num_bytes = count * (self.codes.shape[1] + self.block_scales.shape[1])
            yield Piece(module, num_bytes, partial(self._count_wrong, first, count, expected), message)

    def _count_wrong(self, first: int, count: int, expected: np.ndarray) -> int:
        wrong = 0
        for rows, codes, scales in self.rows(first, count):
            is_wrong = self.decode(codes, scales) != expected[rows]
            if is_wrong.any() and np.frexp(self.stored_scale)[0] != 0.5:
                # 1 / s2 is rounded on disk: the bf16 beside is right where the exact product lies next to the boundary of both.
                for factor in (1 - 2.0**-21, 1 + 2.0**-21):
                    is_wrong &= self.decode(codes, scales, factor) != expected[rows]
            wrong += int(np.count_nonzero(is_wrong))
        return wrong


@lru_cache(maxsize=16)
def decoding_table(decode: Decode, stored_scale: bytes, factor: float) -> np.ndarray:
    """By a reader's `decode`: the bf16 bits of both codes of a byte under a block scale, uint32 [65536], at scale << 8 | byte.

    Entries of block scales that are not finite mean nothing.
    """
    every_byte = np.arange(256, dtype=np.uint8)
    codes = np.tile(every_byte, (256, 1))
    block_scales = np.repeat(every_byte[:, None], 256 // CODES_OF_BLOCK, axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = decode(codes, block_scales, np.frombuffer(stored_scale, np.float32)[0]) * np.float32(factor)
    return to_bf16_bits(decoded).view(np.uint32).reshape(-1)


def is_same(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors on disk have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    pieces = zip(first.pieces(READ_ELEMENTS), second.pieces(READ_ELEMENTS), strict=True)
    return all(np.array_equal(a, b) for (_, a), (_, b) in pieces)
