"""The passes of `multi_tensor` over all weights in one Triton launch each.

A weight is cut into chunks of blocks that share one s2. The table has a row per chunk: addresses of the chunk in master, decoded
weight, packed codes and scales, its number of blocks and its slot. A program takes a chunk and streams through it. The maximum of
a slot is an atomic maximum of integers, so the order in which programs arrive changes nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import reference
from nvfp4_train.kernels import triton_arithmetic as arithmetic

TILE = 128
NUM_WARPS = {"decoded": 8, "packed": 4}
BLOCKS_PER_CHUNK = 2048
"""32768 elements: small enough that those of a 125M model fill a GPU evenly."""

PROGRAMS_PER_MULTIPROCESSOR = 8
"""Of the pass that finds most chunks done."""

COLUMNS = tl.constexpr(6)
SMALLEST_GLOBAL_AMAX = tl.constexpr(reference.SMALLEST_GLOBAL_AMAX)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["num_chunks"])
def pass_kernel(
    table_ptr,
    measured_ptr,
    scales_ptr,
    is_moved_ptr,
    num_chunks: tl.int32,
    SOURCE: tl.constexpr,
    DECODED: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_MEASURED: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    ONLY_MOVED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Measure chunks, quantize them, or both; DECODED is a dtype or None."""
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        row = table_ptr + chunk * COLUMNS
        num_blocks = tl.load(row + 4).to(tl.int32)
        slot = tl.load(row + 5)
        if ONLY_MOVED:
            num_blocks = tl.where(tl.load(is_moved_ptr + slot) != 0, num_blocks, 0)
        source = tl.multiple_of(tl.load(row).to(tl.pointer_type(SOURCE)), 16)
        s2 = tl.load(scales_ptr + slot)
        regime = arithmetic.regime(s2)
        IS_NARROW: tl.constexpr = arithmetic.is_narrow(source)
        if DECODED is not None:
            decoded = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DECODED)), 16)
        if IS_PACKED:
            words = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 8)
            bytes_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
        rows = tl.arange(0, TILE)
        largest = tl.zeros([TILE], tl.float32)
        for start in range(0, num_blocks, TILE):
            is_row = rows < num_blocks - start
            if DECODED is not None:
                x = arithmetic.load_blocks(source + start * 16, is_row, TILE)
                amax = arithmetic.block_amax(x)
                if IS_QUANTIZED:
                    scales = arithmetic.block_scales(amax, s2, regime) * s2
                    x_hat = arithmetic.fake_quant(x, scales, scales, regime, IS_NARROW)
                    arithmetic.store_blocks(decoded + start * 16, x_hat, is_row, TILE)
            if IS_PACKED:
                a, b, c, d = arithmetic.load_quarters(source + start * 16, is_row, TILE)
                amax = arithmetic.block_amax_of_quarters(a, b, c, d)
                if IS_QUANTIZED:
                    scales = arithmetic.block_scales(amax, s2, regime)
                    codes = arithmetic.encode_quarters(a, b, c, d, scales * s2, regime, IS_NARROW, TILE)
                    offsets = (start + rows)[:, None] * 2 + tl.arange(0, 2)[None, :]
                    tl.store(words + offsets, codes, mask=is_row[:, None])
                    tl.store(bytes_ptr + start + rows, arithmetic.e4m3_byte(scales), mask=is_row)
            if IS_MEASURED:
                largest = arithmetic.larger(largest, amax)
        if IS_MEASURED:
            bits = arithmetic.to_bits(tl.reduce(largest, 0, arithmetic.larger))
            tl.atomic_max(measured_ptr + slot, bits, sem="relaxed")


@triton.jit(do_not_specialize=["num_slots"])
def update_scales_kernel(
    measured_ptr, amax_ptr, scales_ptr, is_moved_ptr, num_slots: tl.int32, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr
):
    """`reference.global_scale` of each slot, whether its bits changed, and 0 to measure the next step from."""
    slots = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = slots < num_slots
    bits = tl.load(measured_ptr + slots, mask=mask, other=0)
    amax = arithmetic.from_bits(bits)
    if POWER_OF_TWO:
        # 2688 is 1.3125 * 2^11, and 0x280000 the mantissa of 1.3125.
        exponent = (bits >> 23) - 11 + tl.where((bits & 0x7FFFFF) > 0x280000, 1, 0)
        scales = arithmetic.from_bits(tl.minimum(tl.maximum(exponent, 1), 254) << 23)
        scales = tl.where(bits < arithmetic.EXPONENT, scales, amax)
    else:
        scales = tl.div_rn(amax, 2688.0)
    scales = tl.where(amax < SMALLEST_GLOBAL_AMAX, 1.0, scales)
    last = tl.load(scales_ptr + slots, mask=mask, other=1.0)
    tl.store(is_moved_ptr + slots, (arithmetic.to_bits(scales) != arithmetic.to_bits(last)).to(tl.int32), mask=mask)
    tl.store(scales_ptr + slots, scales, mask=mask)
    tl.store(amax_ptr + slots, amax, mask=mask)
    tl.store(measured_ptr + slots, tl.zeros([TILE], tl.int32), mask=mask)


class TritonPasses:
    """One launch a pass. With a power-of-two s2, `measure` also quantizes, under the last s2."""

    def __init__(self, quantizer) -> None:
        self.quantizer = quantizer
        weights = quantizer.weights
        self._is_moved = torch.zeros_like(quantizer.measured)
        self._addresses: tuple[int, ...] = ()
        self._table = torch.empty(0, COLUMNS.value, dtype=torch.int64)
        self._constants = {
            "SOURCE": TRITON_DTYPES[weights.masters[0].dtype],
            "DECODED": TRITON_DTYPES[weights.decoded[0].dtype] if weights.decoded else None,
            "IS_PACKED": bool(weights.packed),
            "TILE": TILE,
            "num_warps": NUM_WARPS["packed" if weights.packed else "decoded"],
            "enable_fp_fusion": False,
        }
        device = weights.masters[0].device
        num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._num_persistent = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors

    def measure(self) -> None:
        addresses = tuple(map(Tensor.data_ptr, self.quantizer.weights.tensors()))
        if addresses != self._addresses:
            self._addresses = addresses
            self._table = chunk_table(self.quantizer.weights).to(self.quantizer.measured.device)
        self._pass(self._table.shape[0], IS_MEASURED=True, IS_QUANTIZED=self.quantizer.power_of_two, ONLY_MOVED=False)

    def update_scales(self) -> None:
        quantizer = self.quantizer
        num_slots = quantizer.measured.numel()
        tensors = quantizer.measured, quantizer.global_amax, quantizer.global_scales, self._is_moved
        update_scales_kernel[(triton.cdiv(num_slots, 256),)](
            *tensors, num_slots, POWER_OF_TWO=quantizer.power_of_two, TILE=256, enable_fp_fusion=False
        )

    def quantize(self) -> None:
        is_pow2 = self.quantizer.power_of_two
        num_programs = min(self._num_persistent, self._table.shape[0]) if is_pow2 else self._table.shape[0]
        self._pass(num_programs, IS_MEASURED=False, IS_QUANTIZED=True, ONLY_MOVED=is_pow2)

    def _pass(self, num_programs: int, **constants: bool) -> None:
        if num_programs == 0:
            return
        quantizer = self.quantizer
        tensors = self._table, quantizer.measured, quantizer.global_scales, self._is_moved
        pass_kernel[(num_programs,)](*tensors, self._table.shape[0], **self._constants, **constants)


def chunk_table(weights) -> Tensor:
    """int64 [chunks, 6] on the CPU, one row per chunk; address 0 stands for an output that is not wanted."""
    segments = [torch.empty(0, COLUMNS.value, dtype=torch.int64)]
    lists = weights.masters, weights.decoded, weights.packed, weights.scales
    for index, (master, slot) in enumerate(zip(weights.masters, weights.first_slots, strict=True)):
        if master.numel() == 0:
            continue
        segment = torch.arange(master.shape[0] if master.dim() == 3 else 1)
        columns = torch.zeros(len(segment), COLUMNS.value, dtype=torch.int64)
        for column, tensors in enumerate(lists):
            if tensors:
                _check_aligned(tensors[index])
                columns[:, column] = tensors[index].data_ptr() + segment * (tensors[index].nbytes // len(segment))
        columns[:, 4] = master.numel() // len(segment) // reference.BLOCK_SIZE
        columns[:, 5] = slot + segment
        segments.append(columns)
    table = torch.cat(segments)
    num_chunks = (table[:, 4] + BLOCKS_PER_CHUNK - 1) // BLOCKS_PER_CHUNK
    first_chunk = num_chunks.cumsum(0) - num_chunks
    chunk = torch.arange(int(num_chunks.sum())) - first_chunk.repeat_interleave(num_chunks)
    table = table.repeat_interleave(num_chunks, dim=0)
    first_block = chunk * BLOCKS_PER_CHUNK
    elements_per_block = reference.BLOCK_SIZE, reference.BLOCK_SIZE, reference.BLOCK_SIZE // 2, 1
    for column, (tensors, num_elements) in enumerate(zip(lists, elements_per_block, strict=True)):
        if tensors:
            table[:, column] += first_block * (num_elements * tensors[0].element_size())
    table[:, 4] = (table[:, 4] - first_block).clamp(max=BLOCKS_PER_CHUNK)
    return table


def _check_aligned(tensor: Tensor) -> None:
    if tensor.dtype != torch.float8_e4m3fn and tensor.data_ptr() % 16:
        raise ValueError(
            f"memory must start on a 16-byte boundary, got address {tensor.data_ptr()} for shape {tuple(tensor.shape)}"
        )
