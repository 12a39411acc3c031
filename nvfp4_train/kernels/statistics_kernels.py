"""The sums of `statistics_reference` as one Triton launch a weight, which reads masters, codes and scales once.

A program takes every so many-th tile of a slot and writes partial sums of its own, which one reduction adds up. So there are no
atomic additions, and sums of floats have one order. A tile is TILE blocks [TILE, 2, 8]: a word, an int32, has the codes of 8 elements.
Counts are those of the reference to the last one. Squares are added up in fp32 within a block, in float64 beyond it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import reference, statistics_reference
from nvfp4_train.kernels import triton_arithmetic as arithmetic
from nvfp4_train.kernels import triton_scales as scale_arithmetic
from nvfp4_train.kernels.triton_kernels import launch

TILE, NUM_WARPS = 128, 4
"""Blocks and warps of a program: a block for each thread, so that no thread repeats what another one adds to a histogram."""
PROGRAMS = 1056
"""Most programs of a launch: 8 for each of 132 multiprocessors."""

CODES = tl.constexpr(statistics_reference.CODES.start)
SIGNAL, NOISE = tl.constexpr(statistics_reference.SIGNAL), tl.constexpr(statistics_reference.NOISE)
BELOW_FLOOR = tl.constexpr(statistics_reference.BELOW_FLOOR)
OTHER_SCALE = tl.constexpr(statistics_reference.OTHER_SCALE)
UNDERFLOW, ZERO = tl.constexpr(statistics_reference.UNDERFLOW), tl.constexpr(statistics_reference.ZERO)
EDGE, LOG2_S2 = tl.constexpr(statistics_reference.EDGE), tl.constexpr(statistics_reference.LOG2_S2)
SLOTS, NUM_SUMS = tl.constexpr(statistics_reference.SLOTS), tl.constexpr(statistics_reference.NUM_SUMS)
EDGE_WIDTH = tl.constexpr(statistics_reference.EDGE_WIDTH)
UNDERFLOW_DIVISOR = tl.constexpr(statistics_reference.UNDERFLOW_DIVISOR)
E4M3_MIN = tl.constexpr(reference.E4M3_MIN)

FLIPS, OSCILLATIONS = tl.constexpr(statistics_reference.FLIPS), tl.constexpr(statistics_reference.OSCILLATIONS)
QUANTIZED_CHANGE = tl.constexpr(statistics_reference.QUANTIZED_CHANGE)
MASTER_CHANGE = tl.constexpr(statistics_reference.MASTER_CHANGE)
ELEMENTS, SCALE_CHANGES = tl.constexpr(statistics_reference.ELEMENTS), tl.constexpr(statistics_reference.SCALE_CHANGES)
CHANGE_SLOTS, NUM_CHANGES = tl.constexpr(statistics_reference.CHANGE_SLOTS), tl.constexpr(statistics_reference.NUM_CHANGES)


# ---- parts of kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_blocks(x_ptr, blocks, is_row):
    """float32 [TILE, 2, 8] of the blocks at these indices, zeros where there is no row."""
    halves, columns = tl.arange(0, 2)[None, :, None], tl.arange(0, 8)[None, None, :]
    offsets = blocks[:, None, None] * 16 + halves * 8 + columns
    return tl.load(x_ptr + offsets, mask=is_row[:, None, None], other=0.0).to(tl.float32)


@triton.jit
def _words_at(codes_ptr, blocks):
    """Pointers [TILE, 2] to the words of blocks."""
    return codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + blocks[:, None] * 2 + tl.arange(0, 2)[None, :]


@triton.jit
def _decode(words, scales):
    """float32 [TILE, 2, 8] of words [TILE, 2] under decode scales [TILE], as `arithmetic.decode` has it."""
    shifts = 28 - 4 * tl.arange(0, 8)[None, None, :]
    bits = ((words[:, :, None] << shifts) >> 6) & -0x7E400000
    return (arithmetic.from_bits(bits) * 2.0**126) * scales[:, None, None]


@triton.jit
def _sum_of_blocks(x):
    """Sums over each block of [TILE, 2, 8]: [TILE]."""
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def _near_an_edge(quotients):
    """Whether |w| / s is near an edge. Edges lie in the middle of steps of the grid, which are as `arithmetic` rounds to it."""
    # From 6 on there are no edges, though the formula has some.
    quotients = tl.minimum(quotients, 6.0)
    step = 0.5 * tl.maximum(arithmetic.from_bits(arithmetic.to_bits(quotients) & arithmetic.EXPONENT), 1.0)
    # A float32 around this number is a multiple of the step.
    offset = step * (1.5 * 2.0**23)
    edges = tl.fma(step, 0.5, (tl.fma(step, -0.5, quotients) + offset) - offset)
    return tl.abs(quotients - edges) <= edges * EDGE_WIDTH


@triton.jit
def _count_codes(words, TILE: tl.constexpr):
    """Counts of each code in words [TILE, 2]: int32 [2 TILE, 8], of code c in the low half, of code c + 8 in the high half."""
    words = tl.reshape(words, [TILE * 2])[:, None]
    # Of a code whose magnitude is c nothing is left, so that adding 7 does not set its sign bit.
    rest = ((words & 0x77777777) ^ (tl.arange(0, 8)[None, :] * 0x11111111)) + 0x77777777
    is_equal = (rest ^ -1) & -0x77777778
    return _count_signs(is_equal & (words ^ -1)) | (_count_signs(is_equal & words) << 16)


@triton.jit
def _count_signs(bits):
    """How many of the sign bits of eight codes are set; others are not."""
    # The product adds up all eight in the highest code, where up to 8 has room.
    lowest = bits.to(tl.uint32, bitcast=True) >> 3
    return ((lowest * 0x11111111) >> 28).to(tl.int32)


@triton.jit
def _without_negative_zeros(words):
    """Codes by value, eight to a word: a code 8, which is -0, becomes 0."""
    magnitudes = words & 0x77777777
    # Adding 7 sets the sign bit of a code whose magnitude is not zero, and carries nothing over.
    return magnitudes | (words & (magnitudes + 0x77777777) & -0x77777778)


@triton.jit
def _differing(a, b):
    """The sign bit of each code that differs, of words of codes by value."""
    bits = a ^ b
    return (((bits & 0x77777777) + 0x77777777) | bits) & -0x77777778


# ---- kernels -----------------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["master_stride", "codes_stride", "scales_stride", "num_blocks", "num_tiles", "programs_per_slot"],
    do_not_specialize_on_alignment=["s2_ptr"],
)
def weight_sums_kernel(
    master_ptr, codes_ptr, scales_ptr, s2_ptr, sums_ptr, amax_ptr,
    master_stride: tl.int64, codes_stride: tl.int64, scales_stride: tl.int64,
    num_blocks: tl.int64, num_tiles: tl.int32, programs_per_slot: tl.int32, TILE: tl.constexpr,
):  # fmt: skip
    """`statistics_reference.weight_sums`, one row of sums and one amax a program. Strides are from slot to slot, in blocks."""
    program = tl.program_id(0)
    slot, first_tile = program // programs_per_slot, program % programs_per_slot
    s2 = tl.load(s2_ptr + slot)
    master_block = slot.to(tl.int64) * master_stride
    codes_block = slot.to(tl.int64) * codes_stride
    scales_block = slot.to(tl.int64) * scales_stride
    rows = tl.arange(0, TILE)
    # Squares are taken in units of s2, where they stay within fp32.
    one_over_s2 = tl.div_rn(1.0, s2)
    by_byte, by_code = tl.zeros([256], tl.int32), tl.zeros([TILE * 2, 8], tl.int32)
    signal, noise = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    below_floor, other_scale = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    underflow, zero, edge = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    largest = tl.zeros([TILE], tl.float32)
    num_missing = 0
    block = first_tile.to(tl.int64) * TILE
    for _ in range(first_tile, num_tiles, programs_per_slot):
        num_rows = tl.minimum(num_blocks - block, TILE).to(tl.int32)
        num_missing += TILE - num_rows
        is_row = rows < num_rows
        x = _load_blocks(master_ptr + (master_block + block) * 16, rows, is_row)
        words = tl.load(_words_at(codes_ptr + (codes_block + block) * 8, rows), mask=is_row[:, None], other=0)
        byte = tl.load(scales_ptr + scales_block + block + rows, mask=is_row, other=0).to(tl.int32)
        magnitudes = tl.abs(x)
        amax = tl.reduce(tl.reduce(magnitudes, 2, arithmetic.larger), 1, arithmetic.larger)
        largest = arithmetic.larger(largest, amax)
        block_scales = arithmetic.e4m3_value(byte)
        ratio, by_max_rule = scale_arithmetic.max_rule(amax, s2)
        below_floor += (is_row & (ratio < E4M3_MIN)).to(tl.int32)
        is_other = (by_max_rule != block_scales) & (block_scales == block_scales)
        other_scale += (is_row & is_other).to(tl.int32)
        is_underflow = magnitudes < tl.div_rn(amax, UNDERFLOW_DIVISOR)[:, None, None]
        # A row that does not exist has a scale of 0, and 0 * inf is near nothing.
        is_edge = _near_an_edge(magnitudes * tl.div_rn(1.0, block_scales * s2)[:, None, None])
        # Three counts of up to 16 in one sum.
        is_zero = magnitudes == 0.0
        counts = _sum_of_blocks(is_underflow.to(tl.int32) + (is_zero.to(tl.int32) << 8) + (is_edge.to(tl.int32) << 16))
        underflow += counts & 255
        zero += (counts >> 8) & 255
        edge += counts >> 16
        x *= one_over_s2
        error = x - _decode(words, block_scales)
        signal += _sum_of_blocks(x * x).to(tl.float64)
        noise += _sum_of_blocks(error * error).to(tl.float64)
        by_byte += tl.histogram(byte, 256, mask=is_row)
        by_code += _count_codes(words, TILE)
        block += programs_per_slot * TILE
    sums_ptr += program.to(tl.int64) * NUM_SUMS
    tl.store(sums_ptr + tl.arange(0, 256), by_byte.to(tl.float64))
    codes = tl.arange(0, 8)
    positive, negative = tl.sum(by_code & 0xFFFF, 0), tl.sum((by_code >> 16) & 0xFFFF, 0)
    # Rows that do not exist were counted as zeros, of the codes as of the elements.
    tl.store(sums_ptr + CODES + codes, (positive - tl.where(codes == 0, num_missing * 16, 0)).to(tl.float64))
    tl.store(sums_ptr + CODES + 8 + codes, negative.to(tl.float64))
    num_zero_codes = tl.sum(tl.where(codes == 0, positive + negative, 0), 0)
    square_of_s2 = s2.to(tl.float64) * s2.to(tl.float64)
    tl.store(sums_ptr + SIGNAL, tl.sum(signal, 0) * square_of_s2)
    tl.store(sums_ptr + NOISE, tl.sum(noise, 0) * square_of_s2)
    tl.store(sums_ptr + BELOW_FLOOR, tl.sum(below_floor, 0).to(tl.float64))
    tl.store(sums_ptr + OTHER_SCALE, tl.sum(other_scale, 0).to(tl.float64))
    tl.store(sums_ptr + UNDERFLOW, tl.sum(underflow, 0).to(tl.float64))
    tl.store(sums_ptr + ZERO, (num_zero_codes - tl.sum(zero, 0)).to(tl.float64))
    tl.store(sums_ptr + EDGE, tl.sum(edge, 0).to(tl.float64))
    is_first = first_tile == 0
    tl.store(sums_ptr + LOG2_S2, tl.where(is_first, tl.log2(s2.to(tl.float64)), 0.0))
    tl.store(sums_ptr + SLOTS, is_first.to(tl.float64))
    tl.store(amax_ptr + program, tl.reduce(largest, 0, arithmetic.larger))


@triton.jit(
    do_not_specialize=[
        "master_slot", "master_row", "codes_slot", "codes_row", "scales_slot", "scales_row",
        "blocks_per_row", "num_blocks", "num_tiles", "programs_per_slot", "is_new_window",
    ],
    do_not_specialize_on_alignment=["s2_ptr", "now_codes_ptr", "now_scales_ptr"],
)  # fmt: skip
def weight_changes_kernel(
    now_master_ptr, now_codes_ptr, now_scales_ptr, s2_ptr,
    last_master_ptr, last_codes_ptr, last_scales_ptr, last_s2_ptr, before_ptr, sums_ptr,
    master_slot: tl.int64, master_row: tl.int64, codes_slot: tl.int64, codes_row: tl.int64,
    scales_slot: tl.int64, scales_row: tl.int64, blocks_per_row: tl.int32,
    num_blocks: tl.int64, num_tiles: tl.int32, programs_per_slot: tl.int32, is_new_window: tl.int32, TILE: tl.constexpr,
):  # fmt: skip
    """`statistics_reference.weight_changes` but for the new last_s2, one row of sums a program.

    Strides are from slot to slot and from row to row, in blocks. What is kept is contiguous.
    """
    program = tl.program_id(0)
    slot, first_tile = program // programs_per_slot, program % programs_per_slot
    s2, last_s2 = tl.load(s2_ptr + slot), tl.load(last_s2_ptr + slot)
    slot = slot.to(tl.int64)
    flips, oscillations = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    elements = tl.zeros([TILE], tl.int32)
    of_quantized, of_master = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    blocks = first_tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    for _ in range(first_tile, num_tiles, programs_per_slot):
        is_row = blocks < num_blocks
        row, column = blocks // blocks_per_row, blocks % blocks_per_row
        kept = slot * num_blocks + blocks
        x = _load_blocks(now_master_ptr, slot * master_slot + row * master_row + column, is_row)
        last_x = _load_blocks(last_master_ptr, kept, is_row)
        of_master += _sum_of_blocks(tl.abs(x - last_x)).to(tl.float64)
        now_at = _words_at(now_codes_ptr, slot * codes_slot + row * codes_row + column)
        last_at, before_at = _words_at(last_codes_ptr, kept), _words_at(before_ptr, kept)
        now, last = tl.load(now_at, mask=is_row[:, None], other=0), tl.load(last_at, mask=is_row[:, None], other=0)
        before = tl.load(before_at, mask=is_row[:, None] & (is_new_window == 0), other=0)
        before = tl.where(is_new_window == 0, before, last)
        byte = tl.load(now_scales_ptr + slot * scales_slot + row * scales_row + column, mask=is_row, other=0)
        last_byte = tl.load(last_scales_ptr + kept, mask=is_row, other=0)
        decoded = _decode(now, arithmetic.e4m3_value(byte) * s2)
        last_decoded = _decode(last, arithmetic.e4m3_value(last_byte) * last_s2)
        of_quantized += _sum_of_blocks(tl.abs(decoded - last_decoded)).to(tl.float64)
        now_value = _without_negative_zeros(now)
        is_flip = _differing(now_value, _without_negative_zeros(last))
        is_back = is_flip & (_differing(now_value, _without_negative_zeros(before)) ^ -1)
        flips += tl.sum(_count_signs(is_flip), 1)
        oscillations += tl.sum(_count_signs(is_back), 1)
        elements += is_row.to(tl.int32) * 16
        # All four bits of each code that flipped.
        flipped = ((is_flip.to(tl.uint32, bitcast=True) >> 3) * 15).to(tl.int32, bitcast=True)
        tl.store(before_at, (last & flipped) | (before & (flipped ^ -1)), mask=is_row[:, None])
        tl.store(last_at, now, mask=is_row[:, None])
        tl.store(last_scales_ptr + kept, byte, mask=is_row)
        halves, columns = tl.arange(0, 2)[None, :, None], tl.arange(0, 8)[None, None, :]
        offsets = kept[:, None, None] * 16 + halves * 8 + columns
        tl.store(last_master_ptr + offsets, x.to(last_master_ptr.dtype.element_ty), mask=is_row[:, None, None])
        blocks += programs_per_slot * TILE
    sums_ptr += program.to(tl.int64) * NUM_CHANGES
    tl.store(sums_ptr + FLIPS, tl.sum(flips, 0).to(tl.float64))
    tl.store(sums_ptr + OSCILLATIONS, tl.sum(oscillations, 0).to(tl.float64))
    tl.store(sums_ptr + QUANTIZED_CHANGE, tl.sum(of_quantized, 0))
    tl.store(sums_ptr + MASTER_CHANGE, tl.sum(of_master, 0))
    tl.store(sums_ptr + ELEMENTS, tl.sum(elements, 0).to(tl.float64))
    is_first = first_tile == 0
    tl.store(sums_ptr + SCALE_CHANGES, (is_first & (s2 != last_s2)).to(tl.float64))
    tl.store(sums_ptr + CHANGE_SLOTS, is_first.to(tl.float64))


# ---- launchers ---------------------------------------------------------------------------------------------------------------


def weight_sums(master: Tensor, codes: Tensor, block_scales: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    """`statistics_reference.weight_sums`. Slots may lie apart; the rows of a slot are contiguous, or are copied."""
    num_slots, num_rows, columns = master.shape
    num_blocks = num_rows * columns // reference.BLOCK_SIZE
    if num_slots * num_blocks == 0:
        return master.new_zeros(statistics_reference.NUM_SUMS, dtype=torch.float64), master.new_zeros(num_slots).float()
    num_tiles, programs_per_slot = _programs(num_slots, num_blocks)
    # As bytes, since Triton has no E4M3 type on compute capability 8.0.
    parts = _by_slot(master), _by_slot(codes), _by_slot(block_scales.view(torch.uint8))
    strides = [part.stride(0) // size for part, size in zip(parts, (16, 8, 1), strict=True)]
    sums = master.new_empty((num_slots * programs_per_slot, statistics_reference.NUM_SUMS), dtype=torch.float64)
    amax = master.new_empty((num_slots, programs_per_slot), dtype=torch.float32)
    args = (*parts, s2, sums, amax, *strides, num_blocks, num_tiles, programs_per_slot)
    launch("weight_sums", weight_sums_kernel, len(sums), NUM_WARPS, master, args, {"TILE": TILE})
    return sums.sum(0), amax.amax(1)


def weight_changes(
    master: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    s2: Tensor,
    last_master: Tensor,
    last_codes: Tensor,
    last_scales: Tensor,
    last_s2: Tensor,
    codes_before: Tensor,
    is_new_window: bool,
) -> Tensor:
    """`statistics_reference.weight_changes`. Slots and rows may lie apart; the elements of a row are contiguous."""
    num_slots, num_rows, columns = master.shape
    blocks_per_row = columns // reference.BLOCK_SIZE
    num_blocks = num_rows * blocks_per_row
    if num_slots * num_blocks == 0:
        return master.new_zeros(statistics_reference.NUM_CHANGES, dtype=torch.float64)
    num_tiles, programs_per_slot = _programs(num_slots, num_blocks)
    # The compiler takes masters for aligned; rows of codes begin anywhere.
    master = master if master.data_ptr() % 16 == 0 else master.clone(memory_format=torch.contiguous_format)
    now = master, codes, block_scales.view(torch.uint8)
    strides = [part.stride(dim) // size for part, size in zip(now, (16, 8, 1), strict=True) for dim in (0, 1)]
    sums = master.new_empty((num_slots * programs_per_slot, statistics_reference.NUM_CHANGES), dtype=torch.float64)
    last = last_master, last_codes, last_scales.view(torch.uint8), last_s2, codes_before
    args = (*now, s2, *last, sums, *strides, blocks_per_row, num_blocks, num_tiles, programs_per_slot, int(is_new_window))
    launch("weight_changes", weight_changes_kernel, len(sums), NUM_WARPS, master, args, {"TILE": TILE})
    last_s2.copy_(s2)
    return sums.sum(0)


def _programs(num_slots: int, num_blocks: int) -> tuple[int, int]:
    """Tiles and programs of each slot."""
    num_tiles = -(-num_blocks // TILE)
    return num_tiles, max(1, min(num_tiles, PROGRAMS // num_slots))


def _by_slot(x: Tensor) -> Tensor:
    """x [S, n, ..], or a copy where the rows of a slot are not contiguous or do not start on a 16-byte boundary."""
    is_contiguous = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    if is_contiguous and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
