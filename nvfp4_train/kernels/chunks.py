"""What a pass over all weights of a model walks: weights, the slots of their global scales, and tables of chunks.

A slot is what shares one global scale. A matrix has one slot, a 3-D weight [E, N, K] one per expert; weights of one group share
theirs. A chunk is a run of blocks of one slot that one program of a kernel takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from nvfp4_train.kernels.reference import BLOCK_SIZE


def num_slots_of(master: Tensor) -> int:
    """One for a matrix [N, K], one per expert for [E, N, K]."""
    return master.shape[0] if master.dim() == 3 else 1


def slots_of_groups(masters: Sequence[Tensor], groups: Sequence[int]) -> tuple[list[int], int]:
    """First slot of each master and the number of slots, from the group of each. Groups are numbered from 0.

    Raises ValueError where the masters of a group differ in their number of experts, or the numbers of groups do not fit.
    """
    if len(groups) != len(masters):
        raise ValueError(f"groups must have one number per master, {len(masters)}, got {len(groups)}")
    if min(groups, default=0) < 0:
        raise ValueError(f"groups must be numbered from 0, got {min(groups)}")
    num_slots: dict[int, int] = {}
    for master, group in zip(masters, groups, strict=True):
        expected, got = num_slots.setdefault(group, num_slots_of(master)), num_slots_of(master)
        if got != expected:
            raise ValueError(f"masters of group {group} must have equally many experts, got {expected} and {got}")
    *first, num_all = accumulate((num_slots.get(group, 0) for group in range(max(groups, default=-1) + 1)), initial=0)
    return [first[group] for group in groups], num_all


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Amax and global scale of every slot, on the device of the weights."""

    measured: Tensor
    """Amax of the step under way, int32 [slots]: the bits of a non-negative float32. Such bits sort like the floats, with NaN
    highest, so a maximum of integers is one of floats."""
    global_amax: Tensor
    """float32 [slots], of the last step."""
    global_scales: Tensor
    """s2, float32 [slots], of the last step."""

    @classmethod
    def make(cls, num_slots: int, device: torch.device) -> "Slots":
        return cls(
            measured=torch.zeros(num_slots, dtype=torch.int32, device=device),
            global_amax=torch.zeros(num_slots, device=device),
            global_scales=torch.ones(num_slots, device=device),
        )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a step reads and writes. A list of outputs that are not wanted is empty."""

    masters: list[Tensor]
    """[N, K] or [E, N, K], of one float dtype, contiguous."""
    first_slots: list[int]
    """Slot of each master, or of the first expert of each."""
    decoded: list[Tensor]
    """Shaped like the masters, of one float dtype."""
    packed: list[Tensor]
    """uint8 [..., K // 2]."""
    scales: list[Tensor]
    """float8_e4m3fn [..., K // 16]."""
    steps: list[Tensor] = field(default_factory=list)
    """int8 [..., K // 16], of a fitted rule: read, and written where they are chosen anew."""
    hessians: list[Tensor] = field(default_factory=list)
    """float32 [K // 16, 16, 16], or one for each expert, [E, K // 16, 16, 16]; masters may share one."""

    def __post_init__(self) -> None:
        self.check()

    @property
    def device(self) -> torch.device:
        return self.masters[0].device

    def check(self) -> None:
        """Raise ValueError where the tensors do not fit together, or no longer: their memory may have been exchanged."""
        if not self.decoded and not self.packed:
            raise ValueError("outputs are required: decoded, or packed and scales, got none")
        for name, dtypes in (
            ("masters", (torch.float32, torch.bfloat16)),
            ("decoded", (torch.float32, torch.bfloat16, torch.float16)),
            ("packed", (torch.uint8,)),
            ("scales", (torch.float8_e4m3fn,)),
            ("steps", (torch.int8,)),
            ("hessians", (torch.float32,)),
        ):
            tensors = getattr(self, name)
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise ValueError(f"{name} must share one dtype, got {', '.join(sorted({str(t.dtype) for t in tensors}))}")
            for index, tensor in enumerate(tensors):
                self._check(f"{name}[{index}]", tensor, dtypes)
        for name, divisor in (("decoded", 1), ("packed", 2), ("scales", BLOCK_SIZE), ("steps", BLOCK_SIZE)):
            if self._is_given(name):
                for index, (master, tensor) in enumerate(zip(self.masters, getattr(self, name), strict=True)):
                    required = (*master.shape[:-1], master.shape[-1] // divisor)
                    if tensor.shape != required:
                        raise ValueError(f"{name}[{index}] must have shape {required}, got {tuple(tensor.shape)}")
        if self._is_given("hessians"):
            for index, (master, hessian) in enumerate(zip(self.masters, self.hessians, strict=True)):
                shared = (master.shape[-1] // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
                allowed = [shared, (master.shape[0], *shared)] if master.dim() == 3 else [shared]
                if hessian.shape not in allowed:
                    raise ValueError(
                        f"hessians[{index}] must have shape {' or '.join(map(str, allowed))}, got {tuple(hessian.shape)}"
                    )

    def _is_given(self, name: str) -> bool:
        """Whether a list has tensors. Raises ValueError where it lacks some, or all that another list asks for."""
        tensors = getattr(self, name)
        partner = {"packed": "scales", "scales": "packed", "steps": "hessians", "hessians": "steps"}.get(name)
        if not tensors and (partner is None or not getattr(self, partner)):
            return False
        if len(tensors) != len(self.masters):
            raise ValueError(f"{name} must have one tensor per master, {len(self.masters)}, got {len(tensors)}")
        return True

    def _check(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be of {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} of shape {tuple(tensor.shape)}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on the device of the first master, {self.device}, got {tensor.device}")
        if name.startswith("masters") and (tensor.dim() not in (2, 3) or tensor.shape[-1] % BLOCK_SIZE):
            raise ValueError(
                f"{name} must be [N, K] or [E, N, K] with K a multiple of {BLOCK_SIZE}, got shape {tuple(tensor.shape)}"
            )

    def tensors(self) -> list[Tensor]:
        return [*self.masters, *self.decoded, *self.packed, *self.scales, *self.steps, *self.hessians]


def into_chunks(table: Tensor, steps: Sequence[int], blocks_per_chunk: int) -> Tensor:
    """Cut runs of blocks into chunks of at most blocks_per_chunk blocks.

    A row of the table (int64) is a run: its places in memory, as many as there are steps, its number of blocks, and its slot. A
    row of the result is a chunk, in the same columns. A place moves by its step from one block to the next.
    """
    num_blocks = table[:, len(steps)]
    num_chunks = (num_blocks + blocks_per_chunk - 1) // blocks_per_chunk
    first_chunk = num_chunks.cumsum(0) - num_chunks
    chunk = torch.arange(int(num_chunks.sum())) - first_chunk.repeat_interleave(num_chunks)
    table = table.repeat_interleave(num_chunks, dim=0)
    first_block = chunk * blocks_per_chunk
    table[:, : len(steps)] += first_block[:, None] * torch.tensor(steps)
    table[:, len(steps)] = (table[:, len(steps)] - first_block).clamp(max=blocks_per_chunk)
    return table


def table_of_addresses(weights: Weights, blocks_per_chunk: int) -> Tensor:
    """The chunks of all weights, int64 [chunks, 7] on the CPU.

    A row holds the addresses of the chunk in master, decoded weight, packed codes, scales and steps, 0 where there is none, its
    number of blocks and its slot. Raises ValueError where a tensor does not start on a 16-byte boundary.
    """
    # Name, tensors, elements per block.
    lists = (
        ("masters", weights.masters, BLOCK_SIZE),
        ("decoded", weights.decoded, BLOCK_SIZE),
        ("packed", weights.packed, BLOCK_SIZE // 2),
        ("scales", weights.scales, 1),
        ("steps", weights.steps, 1),
    )
    runs = [torch.empty(0, len(lists) + 2, dtype=torch.int64)]
    for index, (master, first_slot) in enumerate(zip(weights.masters, weights.first_slots, strict=True)):
        if master.numel() == 0:
            continue
        slots = torch.arange(num_slots_of(master))
        columns = torch.zeros(len(slots), len(lists) + 2, dtype=torch.int64)
        for column, (name, tensors, _) in enumerate(lists):
            if tensors:
                _check_aligned(f"{name}[{index}]", tensors[index])
                columns[:, column] = tensors[index].data_ptr() + slots * (tensors[index].nbytes // len(slots))
        columns[:, -2] = master.numel() // len(slots) // BLOCK_SIZE
        columns[:, -1] = first_slot + slots
        runs.append(columns)
    steps = [elements * tensors[0].element_size() if tensors else 0 for _, tensors, elements in lists]
    return into_chunks(torch.cat(runs), steps, blocks_per_chunk)


def table_of_searches(weights: Weights, rows_per_chunk: int, columns_per_chunk: int) -> Tensor:
    """The rectangles of blocks of all weights in which steps are chosen, int64 [chunks, 7] on the CPU.

    A row holds the addresses of the first block in master, steps and Hessian, the number of rows and of columns of blocks, the
    blocks of a whole row, and the slot. Neighbouring columns follow each other.
    """
    chunks = [torch.empty(0, 7, dtype=torch.int64)]
    of_masters = zip(weights.masters, weights.first_slots, weights.steps, weights.hessians, strict=True)
    for master, first_slot, steps, hessian in of_masters:
        if master.numel() == 0:
            continue
        num_rows, num_columns = steps.shape[-2:]
        starts = torch.arange(0, num_rows, rows_per_chunk), torch.arange(0, num_columns, columns_per_chunk)
        grid = torch.meshgrid(torch.arange(num_slots_of(master)), *starts, indexing="ij")
        expert, row, column = (index.flatten() for index in grid)
        block = (expert * num_rows + row) * num_columns + column
        block_of_hessian = column + (expert * num_columns if hessian.dim() == 4 else 0)
        columns = (
            master.data_ptr() + block * (BLOCK_SIZE * master.element_size()),
            steps.data_ptr() + block,
            hessian.data_ptr() + block_of_hessian * (BLOCK_SIZE**2 * hessian.element_size()),
            (num_rows - row).clamp(max=rows_per_chunk),
            (num_columns - column).clamp(max=columns_per_chunk),
            torch.full_like(block, num_columns),
            first_slot + expert,
        )
        chunks.append(torch.stack(columns, dim=1))
    return torch.cat(chunks)


def _check_aligned(name: str, tensor: Tensor) -> None:
    # Scales and steps are single bytes.
    if tensor.dtype not in (torch.float8_e4m3fn, torch.int8) and tensor.data_ptr() % 16:
        raise ValueError(f"{name} must start on a 16-byte boundary, got address {tensor.data_ptr()}")
