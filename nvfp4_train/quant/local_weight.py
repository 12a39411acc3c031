"""The rows of a quantized weight that one rank alone owns. Measurements take them, so ranks share the work and none gathers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)

PIECE, PIECE_ON_GPU = 1 << 20, 1 << 22
"""Elements of a piece on a CPU, where they fit the caches, and on a GPU, where the launches of smaller pieces would take too long."""


def rows_per_rank(num_rows: int, num_ranks: int) -> int:
    """As torch.chunk and FSDP2 cut rows: each rank has so many, but for the last ones, which may have fewer or none."""
    return -(-num_rows // num_ranks)


def own_rows(num_rows: int, rank: int, num_ranks: int) -> slice:
    """One rank's part of rows that all ranks hold: ceil(num_rows / num_ranks) of them, fewer or none on the last ranks."""
    each = rows_per_rank(num_rows, num_ranks)
    return slice(rank * each, (rank + 1) * each)


class WeightSums(NamedTuple):
    """What is known of a weight once one pass has measured its rows, see `kernels.statistics_reference`. It is small."""

    sums: Tensor
    """Sums over rows and slots, float64 [NUM_SUMS]."""
    amax: Tensor
    """The largest magnitude of the rows of each slot, float32 [S]; 0 without rows."""
    global_amax: Tensor
    """As in `LocalWeight`."""
    has_siblings: bool
    """As in `LocalWeight`."""


# Not frozen: a look makes one for every weight, and a frozen one takes eight times as long to make.
@dataclass(eq=False, kw_only=True)
class LocalWeight:
    """Rows of one quantized weight, as the last update of the store left them.

    All ranks together have every row of the whole weight, each once. S is 1 for a linear, and the number of experts for experts. n may
    be 0. All tensors are on the device of the master. Change no attribute.
    """

    name: str
    """Name of the parameter."""
    slots: range
    """The S slots of the store that the rows belong to."""
    master: Tensor
    """[S, n, K]."""
    codes: Tensor
    """uint8 [S, n, K / 2], the even element in the low nibble."""
    block_scales: Tensor
    """float8_e4m3fn [S, n, K / 16]."""
    global_amax: Tensor
    """Amax of every slot of the whole weight, float32. Every rank knows it, whatever rows it has."""
    global_scale: Tensor
    """s2, float32 [S]."""
    first_row: int = 0
    """Index of the first of the n rows in its matrix [N, K]. Of the ranks that have a slot, one has its row 0."""
    has_siblings: bool = False
    """Whether other weights share the slots."""

    @cached_property
    def measured(self) -> WeightSums:
        """All that the built-in statistics need of the rows: measured once, when the first of them asks."""
        sums, amax = torch.ops.nvfp4.weight_sums(self.master, self.codes, self.block_scales, self.global_scale)
        return WeightSums(sums, amax, self.global_amax, self.has_siblings)

    def pieces(self) -> Iterator["LocalWeight"]:
        """The same rows in pieces [1, rows, K] of one slot and about `PIECE` elements, which bounds the memory of intermediates."""
        num_rows = max(1, (PIECE if self.master.is_cpu else PIECE_ON_GPU) // self.master.shape[-1])
        for slot in range(len(self.slots)):
            for start in range(0, self.master.shape[1], num_rows):
                part = slice(slot, slot + 1), slice(start, start + num_rows)
                yield LocalWeight(
                    name=self.name,
                    slots=self.slots[slot : slot + 1],
                    master=self.master[part],
                    codes=self.codes[part],
                    block_scales=self.block_scales[part],
                    global_amax=self.global_amax,
                    global_scale=self.global_scale[slot : slot + 1],
                    first_row=self.first_row + start,
                    has_siblings=self.has_siblings,
                )
