"""Several quantized weights, sharded by rows, as one tensor of bytes per rank.

A rank has ceil(N / ranks) rows of each weight [N, K]; the last ranks have fewer, and pad them to that number. Its bytes are the
packed codes of its rows, weight after weight, and then their scales. Side by side, the bytes of all ranks are what a gather of one
tensor receives; one launch of `decode_shards` turns them into the whole weights, which lie one after the other in one tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nvfp4_train.kernels.multi_tensor import into_chunks
from nvfp4_train.kernels.reference import BLOCK_SIZE

ALIGNMENT = 16
"""Bytes, of every run of codes and of scales: what the kernels read and write at a time."""

BLOCKS_PER_CHUNK = 1024
"""Of what one program decodes: 16384 elements."""


class PackedShards:
    """Where the rows of weights of the given shapes lie; K is a multiple of 16."""

    def __init__(self, shapes: Sequence[Sequence[int]], num_ranks: int) -> None:
        self.shapes = [(rows, columns) for rows, columns in shapes]
        self.num_ranks = num_ranks
        self._shard_shapes = [(-(-rows // num_ranks), columns) for rows, columns in self.shapes]
        sizes = [rows * columns // divisor for divisor in (2, BLOCK_SIZE) for rows, columns in self._shard_shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        self._codes_at, self._scales_at = starts[: len(shapes)], starts[len(shapes) : -1]
        self.num_bytes = starts[-1]
        """Of one rank."""
        self.num_elements = sum(rows * columns for rows, columns in self.shapes)
        """Of all weights."""

    def codes(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: uint8 [ceil(N / ranks), K // 2] of each weight."""
        return self._views(shard, self._codes_at, 2)

    def scales(self, shard: Tensor) -> list[Tensor]:
        """Views of one rank's bytes: float8_e4m3fn [ceil(N / ranks), K // 16] of each weight."""
        return [view.view(torch.float8_e4m3fn) for view in self._views(shard, self._scales_at, BLOCK_SIZE)]

    def weights(self, decoded: Tensor) -> list[Tensor]:
        """Views [N, K] of the decoded tensor, which has num_elements elements."""
        runs = decoded.split([rows * columns for rows, columns in self.shapes])
        return [run.view(shape) for run, shape in zip(runs, self.shapes, strict=True)]

    def table(self, slots: Sequence[int]) -> Tensor:
        """The table for `decode_shards`, from the slot of each weight; on the CPU. Padding is left out."""
        rows_of_table = []
        first_element = 0
        for index, ((num_rows, columns), slot) in enumerate(zip(self.shapes, slots, strict=True)):
            shard_rows = self._shard_shapes[index][0]
            for rank in range(self.num_ranks):
                num_blocks = max(0, min(shard_rows, num_rows - rank * shard_rows)) * columns // BLOCK_SIZE
                start = rank * self.num_bytes
                rows_of_table.append(
                    (start + self._codes_at[index], start + self._scales_at[index], first_element, num_blocks, slot)
                )
                first_element += num_blocks * BLOCK_SIZE
        return into_chunks(torch.tensor(rows_of_table), (BLOCK_SIZE // 2, 1, BLOCK_SIZE), BLOCKS_PER_CHUNK)

    def _views(self, shard: Tensor, starts: list[int], divisor: int) -> list[Tensor]:
        shapes = [(rows, columns // divisor) for rows, columns in self._shard_shapes]
        return [shard[at : at + shape[0] * shape[1]].view(shape) for at, shape in zip(starts, shapes, strict=True)]
