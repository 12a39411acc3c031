"""Several tensors, sharded by rows, as one tensor of bytes per rank.

A rank has ceil(N / ranks) rows of each tensor [N, ...]; the last ranks have fewer, and pad them to that number. Its bytes are the
packed codes of its rows, quantized weight after quantized weight, then their scales, and then its rows of everything else in bf16.
Side by side, the bytes of all ranks are what a gather of one tensor receives; `unpack` turns them into the whole tensors, which lie
one after the other in one tensor.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels.multi_tensor import into_chunks
from nvfp4_train.kernels.reference import BLOCK_SIZE

ALIGNMENT = 16
"""Bytes, of every run of codes and of scales, and of every whole tensor: what the kernels read and write at a time."""

BLOCKS_PER_CHUNK = 1024
"""Of what one program decodes: 16384 elements."""

UNPACKED = torch.bfloat16
"""Of whole tensors, and of rows that are not quantized."""

decode_shards = torch.ops.nvfp4.decode_shards.default


class PackedShards:
    """Where the rows of tensors of the given shapes lie: `quantized` ones [N, K] with K a multiple of 16, and `others` [N, ...]."""

    def __init__(self, quantized: Sequence[Sequence[int]], others: Sequence[Sequence[int]], num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._quantized = [tuple(shape) for shape in quantized]
        self._others = [tuple(shape) for shape in others]
        self._quantized_rows = [self._rows_of(shape) for shape in self._quantized]
        self._other_rows = [self._rows_of(shape) for shape in self._others]
        num_quantized = [math.prod(shape) for shape in self._quantized_rows]
        self._num_others = [math.prod(shape) for shape in self._other_rows]

        starts = _starts([size // divisor for divisor in (2, BLOCK_SIZE) for size in num_quantized], ALIGNMENT)
        self._codes_at, self._scales_at = starts[: len(quantized)], starts[len(quantized) : -1]
        self._others_at = starts[-1]
        # Rows of the others stand side by side, so that one operation takes them all apart.
        self.num_bytes = _aligned(self._others_at + UNPACKED.itemsize * sum(self._num_others), ALIGNMENT)
        """Of one rank."""
        sizes = [math.prod(shape) for shape in self._quantized] + [num_ranks * size for size in self._num_others]
        *self._wholes_at, self.num_elements = _starts(sizes, ALIGNMENT // UNPACKED.itemsize)
        """Of all whole tensors, with the padding of the others."""

    def codes(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: uint8 [ceil(N / ranks), K // 2] of each quantized weight."""
        return self._quantized_views(shard, self._codes_at, 2)

    def scales(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: float8_e4m3fn [ceil(N / ranks), K // 16] of each quantized weight."""
        return [view.view(torch.float8_e4m3fn) for view in self._quantized_views(shard, self._scales_at, BLOCK_SIZE)]

    def rows(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: bf16 [ceil(N / ranks), ...] of each of the others."""
        rows = self._rows_of_others(shard.view(1, -1)).view(-1).split(self._num_others)
        return [view.view(shape) for view, shape in zip(rows, self._other_rows, strict=True)]

    def wholes(self, out: Tensor) -> list[Tensor]:
        """Views of what `unpack` writes, bf16 [num_elements]: the quantized weights and the others, in their shapes."""
        shapes = [*self._quantized, *self._others]
        return [out[start : start + math.prod(shape)].view(shape) for start, shape in zip(self._wholes_at, shapes, strict=True)]

    def padded_others(self, out: Tensor) -> list[Tensor]:
        """Views of what `unpack` writes: bf16 [ranks, elements of a rank], of each of the others."""
        starts = self._wholes_at[len(self._quantized) :]
        return [
            out[start : start + self.num_ranks * size].view(self.num_ranks, size)
            for start, size in zip(starts, self._num_others, strict=True)
        ]

    def table(self, slots: Sequence[int]) -> Tensor:
        """The table for `unpack`, from the slot of each quantized weight; on the CPU. Padding is left out."""
        rows_of_table = []
        for index, ((num_rows, columns), slot) in enumerate(zip(self._quantized, slots, strict=True)):
            shard_rows = self._quantized_rows[index][0]
            first_element = self._wholes_at[index]
            for rank in range(self.num_ranks):
                num_blocks = max(0, min(shard_rows, num_rows - rank * shard_rows)) * columns // BLOCK_SIZE
                start = rank * self.num_bytes
                rows_of_table.append(
                    (start + self._codes_at[index], start + self._scales_at[index], first_element, num_blocks, slot)
                )
                first_element += num_blocks * BLOCK_SIZE
        table = torch.tensor(rows_of_table, dtype=torch.int64).view(-1, 5)
        return into_chunks(table, (BLOCK_SIZE // 2, 1, BLOCK_SIZE), BLOCKS_PER_CHUNK)

    def unpack(self, received: Tensor, table: Tensor, s2: Tensor, out: Tensor, padded_others: list[Tensor]) -> None:
        """Write the whole tensors into `out`, from the bytes of all ranks (uint8), `table` and s2 (float32 [slots]).

        `padded_others` are the views of `out` of that name.
        """
        if self._quantized:
            decode_shards(received, table, s2, out)
        if padded_others:
            rows = self._rows_of_others(received.view(self.num_ranks, -1))
            torch.split_with_sizes_copy(rows, self._num_others, dim=1, out=padded_others)

    def _rows_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-(-shape[0] // self.num_ranks), *shape[1:])

    def _quantized_views(self, shard: Tensor, starts: list[int], divisor: int) -> list[Tensor]:
        shapes = [(rows, columns // divisor) for rows, columns in self._quantized_rows]
        return [shard[at : at + shape[0] * shape[1]].view(shape) for at, shape in zip(starts, shapes, strict=True)]

    def _rows_of_others(self, shards: Tensor) -> Tensor:
        """bf16 [ranks, elements] of uint8 [ranks, num_bytes]."""
        end = self._others_at + UNPACKED.itemsize * sum(self._num_others)
        return shards[:, self._others_at : end].view(UNPACKED)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _starts(sizes: Sequence[int], alignment: int) -> list[int]:
    """Where runs of these sizes start, one behind the other on the boundary that follows, and where the next one would."""
    return list(accumulate((_aligned(size, alignment) for size in sizes), initial=0))
