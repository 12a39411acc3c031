"""NVFP4 quantization of all weights of a model at once, with the global amax of siblings found in the same step.

A step measures every master, takes the maximum per slot (a slot is what shares one s2), lets the caller take it over ranks too,
derives s2, and quantizes every master: into decoded weights, into packed codes and scales, or into both. It launches three kernels,
waits for nothing, and after the first step allocates nothing. Pointers and sizes sit in a table on the device.

With a power-of-two s2 the masters are read once: they are measured and quantized under the last s2 in one pass, and only slots
whose s2 moved are quantized again, which the device decides. The result is that of two passes, bit for bit.

CUDA tensors take the kernels of `multi_tensor_kernels`, CPU tensors the plain PyTorch of `reference`.
"""

import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule


def slots_of_groups(masters: Sequence[Tensor], groups: Sequence[int]) -> tuple[list[int], int]:
    """First slot of each master and the number of slots, from the sibling group of each.

    A 2-D master has one slot, a 3-D master [E, N, K] one per expert; masters of one group share theirs. Groups are numbered from 0.
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


def num_slots_of(master: Tensor) -> int:
    """One for a matrix [N, K], one per expert for [E, N, K]."""
    return master.shape[0] if master.dim() == 3 else 1


def into_chunks(table: Tensor, steps: Sequence[int], blocks_per_chunk: int) -> Tensor:
    """Cut runs of blocks: int64 rows (places..., number of blocks, slot) to rows of at most blocks_per_chunk blocks each.

    A place moves by its step with every block.
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


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a step reads and writes; a list that is not wanted is empty."""

    masters: list[Tensor]
    """[N, K] or [E, N, K], of one float dtype, contiguous."""
    first_slots: list[int]
    """Slot of each master, or of the first expert of each."""
    decoded: list[Tensor]
    """Like the masters, of one float dtype."""
    packed: list[Tensor]
    """uint8 [..., K // 2]."""
    scales: list[Tensor]
    """float8_e4m3fn [..., K // 16]."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError where the tensors do not fit together, or not any longer: their memory may have been exchanged."""
        if not self.decoded and not self.packed:
            raise ValueError("outputs are required: decoded, or packed and scales, got none")
        for name, dtypes in (
            ("masters", (torch.float32, torch.bfloat16)),
            ("decoded", (torch.float32, torch.bfloat16, torch.float16)),
            ("packed", (torch.uint8,)),
            ("scales", (torch.float8_e4m3fn,)),
        ):
            tensors = getattr(self, name)
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise ValueError(f"{name} must share one dtype, got {', '.join(sorted({str(t.dtype) for t in tensors}))}")
            for index, tensor in enumerate(tensors):
                self._check(f"{name}[{index}]", tensor, dtypes)
        for name, divisor in (("decoded", 1), ("packed", 2), ("scales", 16)):
            outputs = getattr(self, name)
            if not outputs and (name == "decoded" or not self.packed and not self.scales):
                continue
            if len(outputs) != len(self.masters):
                raise ValueError(f"{name} must have one tensor per master, {len(self.masters)}, got {len(outputs)}")
            for index, (master, output) in enumerate(zip(self.masters, outputs, strict=True)):
                required = (*master.shape[:-1], master.shape[-1] // divisor)
                if output.shape != required:
                    raise ValueError(f"{name}[{index}] must have shape {required}, got {tuple(output.shape)}")

    def _check(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be of {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} of shape {tuple(tensor.shape)}")
        if tensor.device != self.masters[0].device:
            raise ValueError(f"{name} must be on the device of the first master, {self.masters[0].device}, got {tensor.device}")
        if name.startswith("masters") and (tensor.dim() not in (2, 3) or tensor.shape[-1] % reference.BLOCK_SIZE):
            raise ValueError(f"{name} must be [N, K] or [E, N, K] with K a multiple of 16, got shape {tuple(tensor.shape)}")

    def tensors(self) -> list[Tensor]:
        return [*self.masters, *self.decoded, *self.packed, *self.scales]


class MultiTensorQuantizer:
    """Quantizes many masters by `step()`; see the module's docstring.

    Give `first_slots` and `num_slots` as `slots_of_groups` returns them; with experts sharded over ranks, the slots of the local
    ones. Memory of a tensor may move between steps, and the dtype of all masters may change; shapes and strides may not.
    """

    def __init__(
        self,
        masters: Sequence[Tensor],
        first_slots: Sequence[int],
        num_slots: int,
        *,
        decoded: Sequence[Tensor] = (),
        packed: Sequence[Tensor] = (),
        scales: Sequence[Tensor] = (),
        rule: ScaleRule = MAX_RULE,
    ) -> None:
        if not masters:
            raise ValueError("masters must not be empty, got no tensor")
        if len(first_slots) != len(masters):
            raise ValueError(f"first_slots must have one slot per master, {len(masters)}, got {len(first_slots)}")
        self.weights = Weights(
            masters=list(masters),
            first_slots=list(first_slots),
            decoded=list(decoded),
            packed=list(packed),
            scales=list(scales),
        )
        for master, slot in zip(masters, first_slots, strict=True):
            last = slot + num_slots_of(master)
            if slot < 0 or last > num_slots:
                raise ValueError(f"slots of a master must lie within num_slots={num_slots}, got {slot} to {last - 1}")
        device = masters[0].device
        self.rule = rule
        self.measured = torch.zeros(num_slots, dtype=torch.int32, device=device)
        """Bits of the largest magnitude per slot of the step under way, whose integer order is theirs, with NaN on top."""
        self.global_amax = torch.zeros(num_slots, device=device)
        """float32 [num_slots], of the last step."""
        self.global_scales = torch.ones(num_slots, device=device)
        """s2, float32 [num_slots], of the last step."""
        # Were they to hold this one, all memory would stay with a store that is gone, until Python looks for cycles.
        self._passes = self._passes_class()(weakref.proxy(self))

    def _passes_class(self) -> "type[ReferencePasses]":
        if self.weights.masters[0].is_cuda:
            # Imported here: on Windows and macOS there is no Triton to import.
            return importlib.import_module("nvfp4_train.kernels.multi_tensor_kernels").TritonPasses
        return ReferencePasses

    @torch.no_grad()
    def step(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Quantize every master into its outputs and update `global_amax` and `global_scales`.

        `reduce` is called on `measured` once the local masters are measured. Where masters are sharded or replicated over ranks,
        it is to replace it, in place, by its maximum over them: an all_reduce(MAX).
        NaN and Inf end up in both. The codes of such a slot mean nothing then, and a NaN may have either sign bit: these bits
        differ between CPU and CUDA.
        """
        with torch.cuda.device_of(self.measured):
            self._passes.measure()
            if reduce is not None:
                reduce(self.measured)
            self._passes.update_scales()
            self._passes.quantize()


class ReferencePasses:
    """The three passes in plain PyTorch, each master on its own."""

    def __init__(self, quantizer: MultiTensorQuantizer) -> None:
        self.quantizer = quantizer

    def measure(self) -> None:
        for master, slots in self._masters():
            amax = reference.block_amax(master).flatten(1).amax(1)
            bits = amax.view(torch.int32) if master.dim() == 3 else amax.max().reshape(1).view(torch.int32)
            # A NaN may come with a sign bit.
            slots.copy_(torch.maximum(slots, bits & 0x7FFFFFFF))

    def update_scales(self) -> None:
        quantizer = self.quantizer
        quantizer.global_amax.copy_(quantizer.measured.view(torch.float32))
        quantizer.global_scales.copy_(reference.global_scale(quantizer.global_amax, quantizer.rule))
        quantizer.measured.zero_()

    def quantize(self) -> None:
        weights, rule = self.quantizer.weights, self.quantizer.rule
        for index, (master, slot) in enumerate(zip(weights.masters, weights.first_slots, strict=True)):
            if master.numel() == 0:
                continue
            num_slots = num_slots_of(master)
            s2 = self.quantizer.global_scales[slot : slot + num_slots].reshape(-1, *[1] * (master.dim() - 1))
            if weights.decoded:
                weights.decoded[index].copy_(reference.fake_quant(master, s2, weights.decoded[index].dtype, rule))
            if weights.packed:
                packed, scales = reference.quantize(master, s2, rule)
                weights.packed[index].copy_(packed)
                weights.scales[index].copy_(scales)

    def _masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        weights = self.quantizer.weights
        for master, slot in zip(weights.masters, weights.first_slots, strict=True):
            if master.numel():
                yield master, self.quantizer.measured[slot : slot + num_slots_of(master)]
