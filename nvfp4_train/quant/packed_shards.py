"""Several tensors, sharded by rows, as one tensor of bytes per rank.

A rank has ceil(N / ranks) rows of each tensor [N, ...]; the last ranks have fewer, and pad them to that number. A rank's bytes are
the packed codes of its rows of every quantized weight, then their scales, then its rows of the unquantized tensors in bf16 or fp32.
One all-gather receives the bytes of all ranks side by side. `unpack` turns them into the whole tensors, which lie one after the
other in one tensor of that dtype.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels.chunks import into_chunks
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.local_weight import rows_per_rank

ALIGNMENT = 16
"""Alignment in bytes of all buffers, because kernels load and store 16 bytes at once."""

BLOCKS_PER_CHUNK = 1024
"""Blocks that one program decodes: 16384 elements."""

decode_shards = torch.ops.nvfp4.decode_shards.default


class PackedShards:
    """The layout of a rank's bytes, for tensors of the shapes `quantized`, [N, K] or [E, N, K] with K a multiple of 16, and
    `unquantized`, [N, ...]. All are sharded along their first dimension.

    `dtype` is that of whole tensors and of unquantized rows.
    """

    def __init__(
        self,
        quantized: Sequence[Sequence[int]],
        unquantized: Sequence[Sequence[int]],
        num_ranks: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.num_ranks = num_ranks
        self.dtype = dtype
        self._quantized = [tuple(shape) for shape in quantized]
        self._unquantized = [tuple(shape) for shape in unquantized]
        self._quantized_rows = [self._rows_of(shape) for shape in self._quantized]
        self._unquantized_rows = [self._rows_of(shape) for shape in self._unquantized]
        num_quantized = [math.prod(shape) for shape in self._quantized_rows]
        self._num_unquantized = [math.prod(shape) for shape in self._unquantized_rows]

        starts = _starts([size // divisor for divisor in (2, BLOCK_SIZE) for size in num_quantized], ALIGNMENT)
        self._codes_at, self._scales_at = starts[: len(quantized)], starts[len(quantized) : -1]
        self._unquantized_at = starts[-1]
        # Unquantized rows have no gaps between tensors, so that one operation splits them all.
        self.num_bytes = _aligned(self._unquantized_at + self.dtype.itemsize * sum(self._num_unquantized), ALIGNMENT)
        """Bytes of one rank."""
        sizes = [math.prod(shape) for shape in self._quantized] + [num_ranks * size for size in self._num_unquantized]
        *self._whole_at, self.num_elements = _starts(sizes, ALIGNMENT // self.dtype.itemsize)
        """Elements of all whole tensors, with the padding of the unquantized ones."""

    def codes(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: uint8 [ceil(N / ranks), .., K // 2] of each quantized weight."""
        return self._quantized_views(shard, self._codes_at, 2)

    def scales(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: float8_e4m3fn [ceil(N / ranks), .., K // 16] of each quantized weight."""
        return [view.view(torch.float8_e4m3fn) for view in self._quantized_views(shard, self._scales_at, BLOCK_SIZE)]

    def rows(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: [ceil(N / ranks), ...] of each unquantized tensor."""
        rows = self._flat_unquantized(shard.view(1, -1)).view(-1).split(self._num_unquantized)
        return [view.view(shape) for view, shape in zip(rows, self._unquantized_rows, strict=True)]

    def whole_tensors(self, out: Tensor) -> list[Tensor]:
        """Views of what `unpack` writes, [num_elements]: the quantized weights and the unquantized tensors, in their shapes."""
        shapes = [*self._quantized, *self._unquantized]
        return [out[start : start + math.prod(shape)].view(shape) for start, shape in zip(self._whole_at, shapes, strict=True)]

    def padded_unquantized(self, out: Tensor) -> list[Tensor]:
        """Views of what `unpack` writes: [ranks, elements of a rank], of each unquantized tensor."""
        starts = self._whole_at[len(self._quantized) :]
        return [
            out[start : start + self.num_ranks * size].view(self.num_ranks, size)
            for start, size in zip(starts, self._num_unquantized, strict=True)
        ]

    def table(self, slots: Sequence[int], place: Callable[[int, int], int] | None = None) -> Tensor:
        """The table for `unpack`, on the CPU. `slots` has the first slot of each quantized weight. Padding is left out.

        `place(index of the weight, rank)` is the element of the output at which these rows begin. By default the weights are whole,
        as in `whole_tensors`.
        """
        rows_of_table = []
        for index, (shape, first_slot) in enumerate(zip(self._quantized, slots, strict=True)):
            num_rows, shard_rows, elements_of_row = shape[0], self._quantized_rows[index][0], math.prod(shape[1:])
            for rank in range(self.num_ranks):
                first_row = min(rank * shard_rows, num_rows)
                element = self._whole_at[index] + first_row * elements_of_row if place is None else place(index, rank)
                own_rows = min(shard_rows, num_rows - first_row)
                codes, scales = (rank * self.num_bytes + start[index] for start in (self._codes_at, self._scales_at))
                # Rows of a matrix have one slot, those of [E, N, K] are experts with a slot each.
                is_experts = len(shape) == 3
                num_blocks = (1 if is_experts else own_rows) * elements_of_row // BLOCK_SIZE
                for expert in range(own_rows if is_experts else 1):
                    block = expert * num_blocks
                    slot = first_slot + (first_row + expert if is_experts else 0)
                    rows_of_table.append(
                        (codes + block * BLOCK_SIZE // 2, scales + block, element + block * BLOCK_SIZE, num_blocks, slot)
                    )
        table = torch.tensor(rows_of_table, dtype=torch.int64).view(-1, 5)
        return into_chunks(table, (BLOCK_SIZE // 2, 1, BLOCK_SIZE), BLOCKS_PER_CHUNK)

    def unpack(self, received: Tensor, table: Tensor, s2: Tensor, out: Tensor, padded_unquantized: list[Tensor]) -> None:
        """Write the whole tensors into `out`, from the bytes of all ranks (uint8), `table` and s2 (float32 [slots]).

        `padded_unquantized` are the views that the method of that name gives of `out`.
        """
        if self._quantized:
            decode_shards(received, table, s2, out)
        if padded_unquantized:
            rows = self._flat_unquantized(received.view(self.num_ranks, -1))
            torch.split_with_sizes_copy(rows, self._num_unquantized, dim=1, out=padded_unquantized)

    def _rows_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (rows_per_rank(shape[0], self.num_ranks), *shape[1:])

    def _quantized_views(self, shard: Tensor, starts: list[int], divisor: int) -> list[Tensor]:
        shapes = [(*rows, columns // divisor) for *rows, columns in self._quantized_rows]
        return [shard[at : at + math.prod(shape)].view(shape) for at, shape in zip(starts, shapes, strict=True)]

    def _flat_unquantized(self, shards: Tensor) -> Tensor:
        """Unquantized elements [ranks, elements of a rank] of uint8 [ranks, num_bytes]."""
        end = self._unquantized_at + self.dtype.itemsize * sum(self._num_unquantized)
        return shards[:, self._unquantized_at : end].view(self.dtype)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _starts(sizes: Sequence[int], alignment: int) -> list[int]:
    """Starts of runs of these sizes, one after the other at multiples of `alignment`, and the start that a further run would have."""
    return list(accumulate((_aligned(size, alignment) for size in sizes), initial=0))
