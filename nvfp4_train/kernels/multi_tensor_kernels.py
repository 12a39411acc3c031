"""The passes of `multi_tensor` over all weights in one Triton launch each.

A program takes a chunk, a row of `chunks.table_of_addresses`, and streams through its blocks. The maximum of a slot is an atomic
maximum of integers, so the order in which programs arrive changes nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import reference, triton_kernels, triton_search
from nvfp4_train.kernels import triton_arithmetic as arithmetic
from nvfp4_train.kernels import triton_scales as scale_arithmetic
from nvfp4_train.kernels.chunks import Slots, Weights, table_of_addresses, table_of_searches
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.kernels.triton_kernels import TILES, launch

TILE = 64
NUM_WARPS = 2
BLOCKS_PER_CHUNK = 512
"""8192 elements: small enough that the chunks of a 125M model fill a GPU evenly."""

PROGRAMS_PER_MULTIPROCESSOR = 16
"""Programs per SM of the pass over slots that moved. Most chunks have nothing left to do there, so a small grid loops over all."""

COLUMNS = tl.constexpr(7)
SEARCH_COLUMNS = tl.constexpr(7)
SHARD_COLUMNS = tl.constexpr(5)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _stream(
    source,
    decoded,
    words,
    bytes_ptr,
    steps_ptr,
    num_blocks,
    s2,
    FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    IS_SIMPLE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_MEASURED: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Measure or quantize a chunk. Returns the largest magnitude of each row of its tiles, [TILE]."""
    dtype: tl.constexpr = source.dtype.element_ty
    is_narrow: tl.constexpr = dtype != tl.float32
    rows = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.float32)
    for start in range(0, num_blocks, TILE):
        is_row = rows < num_blocks - start
        a, b, c, d = arithmetic.load_quarters(source + start * 16, is_row, TILE)
        a, b, c, d = arithmetic.widen(a, b, c, d, dtype)
        if IS_MEASURED:
            largest = arithmetic.larger(largest, arithmetic.block_amax(a, b, c, d))
        if IS_QUANTIZED:
            factor = arithmetic.factor_of(s2)
            steps = scale_arithmetic.load_steps(steps_ptr, start + rows, is_row)
            block_scales = scale_arithmetic.block_scales(a, b, c, d, s2, steps, FACTORS, STEPS, IS_SIMPLE, is_narrow)
            scales = block_scales * s2
            if IS_PACKED:
                codes = arithmetic.encode(a, b, c, d, scales, factor, IS_SIMPLE, is_narrow, TILE)
                offsets = (start + rows)[:, None] * 2 + tl.arange(0, 2)[None, :]
                tl.store(words + offsets, codes, mask=is_row[:, None])
                tl.store(bytes_ptr + start + rows, arithmetic.e4m3_byte(block_scales), mask=is_row)
            if decoded is not None:
                a, b, c, d = arithmetic.fake_quant(a, b, c, d, scales, scales, factor, IS_SIMPLE, is_narrow)
                arithmetic.store_quarters(decoded + start * 16, a, b, c, d, is_row, is_narrow, TILE)
    return largest


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
    IS_FITTED: tl.constexpr,
    FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    IS_MEASURED: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    ONLY_MOVED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Measure chunks, quantize them, or both. SOURCE is the dtype of masters, DECODED that of decoded weights or None."""
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        row = table_ptr + chunk * COLUMNS
        num_blocks = tl.load(row + 5).to(tl.int32)
        slot = tl.load(row + 6)
        if ONLY_MOVED:
            num_blocks = tl.where(tl.load(is_moved_ptr + slot) != 0, num_blocks, 0)
        source = tl.multiple_of(tl.load(row).to(tl.pointer_type(SOURCE)), 16)
        decoded = None
        if DECODED is not None:
            decoded = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DECODED)), 16)
        words = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 8)
        bytes_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
        steps_ptr = None
        if IS_FITTED:
            steps_ptr = tl.load(row + 4).to(tl.pointer_type(tl.int8))
        s2 = tl.load(scales_ptr + slot)
        # There is a loop for each kind of s2, because one loop with a branch inside would hold the registers of both kinds.
        if arithmetic.is_simple(s2):
            largest = _stream(
                source, decoded, words, bytes_ptr, steps_ptr, num_blocks, s2,
                FACTORS, STEPS, True, IS_PACKED, IS_MEASURED, IS_QUANTIZED, TILE,
            )  # fmt: skip
        else:
            largest = _stream(
                source, decoded, words, bytes_ptr, steps_ptr, num_blocks, s2,
                FACTORS, STEPS, False, IS_PACKED, IS_MEASURED, IS_QUANTIZED, TILE,
            )  # fmt: skip
        if IS_MEASURED:
            bits = arithmetic.to_bits(tl.reduce(largest, 0, arithmetic.larger))
            tl.atomic_max(measured_ptr + slot, bits, sem="relaxed")


@triton.jit
def choose_steps_kernel(table_ptr, scales_ptr, SOURCE: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr):
    """Choose steps in a rectangle of blocks, a row of `chunks.table_of_searches`. SOURCE is the dtype of masters."""
    row = table_ptr + tl.program_id(0) * SEARCH_COLUMNS
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(SOURCE)), 16)
    steps_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int8))
    hessian_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    num_rows = tl.load(row + 3).to(tl.int32)
    num_columns = tl.load(row + 4).to(tl.int32)
    blocks_per_row = tl.load(row + 5).to(tl.int32)
    s2 = tl.load(scales_ptr + tl.load(row + 6))
    triton_search.search(source, steps_ptr, hessian_ptr, s2, num_rows, num_columns, blocks_per_row, STEPS, TILE)


@triton.jit(do_not_specialize=["num_slots"])
def update_scales_kernel(
    measured_ptr, amax_ptr, scales_ptr, is_moved_ptr, num_slots: tl.int32,
    DIVISOR: tl.constexpr, IS_POW2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Global amax, s2 and whether the bits of s2 have moved, of each slot; and 0 as `measured`, for the next step."""
    slots = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = slots < num_slots
    bits = tl.load(measured_ptr + slots, mask=mask, other=0)
    amax = arithmetic.from_bits(bits)
    scales = scale_arithmetic.global_scales(amax, DIVISOR, IS_POW2)
    last = tl.load(scales_ptr + slots, mask=mask, other=1.0)
    tl.store(is_moved_ptr + slots, (arithmetic.to_bits(scales) != arithmetic.to_bits(last)).to(tl.int32), mask=mask)
    tl.store(scales_ptr + slots, scales, mask=mask)
    tl.store(amax_ptr + slots, amax, mask=mask)
    tl.store(measured_ptr + slots, tl.zeros([TILE], tl.int32), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["s2_ptr"])
def decode_shards_kernel(received_ptr, table_ptr, s2_ptr, out_ptr, TILE: tl.constexpr):
    """`reference.decode_shards`. A program takes a chunk, TILE words of eight codes at a time."""
    row = table_ptr + tl.program_id(0) * SHARD_COLUMNS
    words_ptr = (received_ptr + tl.multiple_of(tl.load(row), 16)).to(tl.pointer_type(tl.int32), bitcast=True)
    scales_ptr = received_ptr + tl.load(row + 1)
    out_ptr += tl.multiple_of(tl.load(row + 2), 16)
    num_words = tl.load(row + 3).to(tl.int32) * 2
    s2 = tl.load(s2_ptr + tl.load(row + 4))
    rows = tl.arange(0, TILE)
    for start in range(0, num_words, TILE):
        is_row = rows < num_words - start
        words = tl.load(words_ptr + start + rows, mask=is_row, other=0)
        scales = arithmetic.e4m3_value(tl.load(scales_ptr + start // 2 + rows // 2, mask=is_row, other=0))
        values = arithmetic.decode(words, scales * s2).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start * 8 + rows[:, None] * 8 + tl.arange(0, 8)[None, :], values, mask=is_row[:, None])


class TritonPasses:
    """One launch a pass; see `multi_tensor_reference.ReferencePasses`.

    With a power-of-two s2, `measure` also quantizes, under the last s2, and `quantize` only the slots whose s2 has moved since;
    unless all steps of a fitted rule are chosen in between.
    """

    def __init__(self, weights: Weights, slots: Slots, rule: ScaleRule) -> None:
        self.weights = weights
        self.slots = slots
        self.rule = rule
        self._is_moved = torch.zeros_like(slots.measured)
        self._tensors = weights.tensors()
        self._tabled: tuple[Any, ...] = ()
        """Dtype and addresses that the table was made of."""
        self._table = torch.empty(0, COLUMNS.value, dtype=torch.int64)
        self._searches = torch.empty(0, SEARCH_COLUMNS.value, dtype=torch.int64)
        """The table of `choose_steps`, as old as the other."""
        self._constants: dict[str, Any] = {}
        is_cuda = weights.device.type == "cuda"
        num_multiprocessors = torch.cuda.get_device_properties(weights.device).multi_processor_count if is_cuda else 1
        self._num_persistent = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors

    def measure(self, refit: bool = False) -> None:
        weights = self.weights
        # The dtype too: memory that masters of one dtype have left may be taken by masters of another.
        tabled = weights.masters[0].dtype, *map(Tensor.data_ptr, self._tensors)
        if tabled != self._tabled:
            weights.check()
            self._tabled = tabled
            self._table = table_of_addresses(weights, BLOCKS_PER_CHUNK).to(weights.device)
            if self.rule.is_fitted:
                table = table_of_searches(weights, triton_kernels.SEARCH_ROWS, triton_kernels.SEARCH_COLUMNS)
                self._searches = table.to(weights.device)
            self._constants = {
                "SOURCE": TRITON_DTYPES[weights.masters[0].dtype],
                "DECODED": TRITON_DTYPES[weights.decoded[0].dtype] if weights.decoded else None,
                "IS_PACKED": bool(weights.packed),
                "IS_FITTED": self.rule.is_fitted,
                "FACTORS": self.rule.factors,
                "STEPS": self.rule.steps,
            }
        is_quantized = self.rule.is_pow2 and not refit
        self._pass(self._table.shape[0], IS_MEASURED=True, IS_QUANTIZED=is_quantized, ONLY_MOVED=False)

    def update_scales(self) -> None:
        slots = self.slots
        num_slots = slots.measured.numel()
        args = slots.measured, slots.global_amax, slots.global_scales, self._is_moved, num_slots
        constants = {"DIVISOR": reference.FP4_MAX * self.rule.largest, "IS_POW2": self.rule.is_pow2, "TILE": 256}
        launch("update_scales", update_scales_kernel, -(-num_slots // 256), 4, slots.measured, args, constants)

    def choose_steps(self) -> None:
        num_programs = self._searches.shape[0]
        if num_programs == 0:
            return
        tile, num_warps = TILES["choose_steps"]
        args = self._searches, self.slots.global_scales
        constants = {"SOURCE": self._constants["SOURCE"], "STEPS": self.rule.steps, "TILE": tile}
        kernel, most_registers = choose_steps_kernel, triton_kernels.SEARCH_REGISTERS
        launch("search", kernel, num_programs, num_warps, self.slots.measured, args, constants, most_registers)

    def quantize(self, refit: bool = False) -> None:
        num_programs = self._table.shape[0]
        only_moved = self.rule.is_pow2 and not refit
        if only_moved:
            num_programs = min(self._num_persistent, num_programs)
        self._pass(num_programs, IS_MEASURED=False, IS_QUANTIZED=True, ONLY_MOVED=only_moved)

    def _pass(self, num_programs: int, **passed: bool) -> None:
        if num_programs == 0:
            return
        slots = self.slots
        args = self._table, slots.measured, slots.global_scales, self._is_moved, self._table.shape[0]
        constants = {**self._constants, **passed, "TILE": TILE}
        launch("whole_model", pass_kernel, num_programs, NUM_WARPS, slots.measured, args, constants)


def decode_shards(received: Tensor, table: Tensor, s2: Tensor, out: Tensor) -> None:
    """`reference.decode_shards` in one launch. Tensors start on 16-byte boundaries."""
    tile, num_warps = TILES["dequantize"]
    launch("decode_shards", decode_shards_kernel, table.shape[0], num_warps, out, (received, table, s2, out), {"TILE": tile})
