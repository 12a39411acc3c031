"""Every operation of `reference`, bit for bit, as one Triton kernel: the path that CUDA tensors take.

Kernels stream: a program takes TILE blocks of 16 elements, reads each byte once, writes each byte once, and keeps all else in
registers. A tensor is a flat run of blocks, since its last dimension is a multiple of 16. So shapes play no part, and a new shape
compiles nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import reference, triton_search
from nvfp4_train.kernels import triton_arithmetic as arithmetic
from nvfp4_train.kernels import triton_scales as scale_arithmetic
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES

TILES = {
    "block_amax": (512, 16),
    "fake_quant": (64, 2),
    "quantize": (128, 4),
    "choose_steps": (64, 2),
    "static_scales": (256, 4),
    "static_fake_quant": (64, 2),
    "static_fake_quant_octets": (128, 2),
    "dequantize": (256, 4),
}
"""Rows and warps per program, by operation. A row is a block of 16 elements, except for 8 elements in the last two."""

SEARCH_ROWS, SEARCH_COLUMNS = 512, 4
"""Rows and columns of blocks for which one program chooses steps."""
SEARCH_REGISTERS = 168
"""Most registers of a thread that chooses steps: 12 warps share a multiprocessor then. The compiler takes 228 if it may."""

TILES_PER_PROGRAM = {"quantize": (4, 4096)}
"""Operations whose programs loop over tiles: most tiles per program, and fewest programs at which one gets a second tile."""


@triton.jit
def _place(num_rows, TILE: tl.constexpr):
    """First row of this program's tile, the rows of a tile, and which of them exist. A row is a block, an octet or a word."""
    start = tl.program_id(0).to(tl.int64) * TILE
    rows = tl.arange(0, TILE)
    return start, rows, rows < tl.minimum(num_rows - start, TILE).to(tl.int32)


@triton.jit
def _load(x_ptr, start, is_row, TILE: tl.constexpr):
    """Quarters of the blocks from `start` on, as float32."""
    a, b, c, d = arithmetic.load_quarters(x_ptr + start * 16, is_row, TILE)
    return arithmetic.widen(a, b, c, d, x_ptr.dtype.element_ty)


# ---- kernels -----------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_blocks"])
def block_amax_kernel(x_ptr, amax_ptr, num_blocks: tl.int64, TILE: tl.constexpr):
    start, rows, is_row = _place(num_blocks, TILE)
    a, b, c, d = _load(x_ptr, start, is_row, TILE)
    tl.store(amax_ptr + start + rows, arithmetic.block_amax(a, b, c, d), mask=is_row)


@triton.jit
def _fake_quant_tile(
    a, b, c, d, s2, steps, out_ptr, is_row,
    FACTORS: tl.constexpr, STEPS: tl.constexpr, IS_SIMPLE: tl.constexpr, IS_NARROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    scales = scale_arithmetic.block_scales(a, b, c, d, s2, steps, FACTORS, STEPS, IS_SIMPLE, IS_NARROW) * s2
    a, b, c, d = arithmetic.fake_quant(a, b, c, d, scales, scales, arithmetic.factor_of(s2), IS_SIMPLE, IS_NARROW)
    arithmetic.store_quarters(out_ptr, a, b, c, d, is_row, IS_NARROW, TILE)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["s2_ptr"])
def fake_quant_kernel(
    x_ptr, s2_ptr, steps_ptr, out_ptr, num_blocks: tl.int64, FACTORS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr
):
    """`reference.fake_quant`. steps_ptr is None unless the rule is fitted."""
    start, rows, is_row = _place(num_blocks, TILE)
    a, b, c, d = _load(x_ptr, start, is_row, TILE)
    steps = scale_arithmetic.load_steps(steps_ptr, start + rows, is_row)
    out_ptr += start * 16
    s2 = tl.load(s2_ptr)
    is_narrow: tl.constexpr = arithmetic.is_narrow(x_ptr)
    if arithmetic.is_simple(s2):
        _fake_quant_tile(a, b, c, d, s2, steps, out_ptr, is_row, FACTORS, STEPS, True, is_narrow, TILE)
    else:
        _fake_quant_tile(a, b, c, d, s2, steps, out_ptr, is_row, FACTORS, STEPS, False, is_narrow, TILE)


@triton.jit
def _quantize_tile(
    a, b, c, d, s2, steps_ptr, start, is_row, words_ptr, bytes_ptr,
    FACTORS: tl.constexpr, STEPS: tl.constexpr, IS_SIMPLE: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, TILE)
    is_narrow: tl.constexpr = dtype != tl.float32
    a, b, c, d = arithmetic.widen(a, b, c, d, dtype)
    steps = scale_arithmetic.load_steps(steps_ptr, start + rows, is_row)
    scales = scale_arithmetic.block_scales(a, b, c, d, s2, steps, FACTORS, STEPS, IS_SIMPLE, is_narrow)
    words = arithmetic.encode(a, b, c, d, scales * s2, arithmetic.factor_of(s2), IS_SIMPLE, is_narrow, TILE)
    tl.store(words_ptr + start * 2 + rows[:, None] * 2 + tl.arange(0, 2)[None, :], words, mask=is_row[:, None])
    tl.store(bytes_ptr + start + rows, arithmetic.e4m3_byte(scales), mask=is_row)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks"], do_not_specialize_on_alignment=["s2_ptr"])
def quantize_kernel(
    x_ptr, s2_ptr, steps_ptr, packed_ptr, scales_ptr, num_tiles: tl.int32, num_blocks: tl.int64,
    FACTORS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`reference.quantize`. A word is an int32 of eight codes, two to a block. steps_ptr is None unless the rule is fitted.

    There is a loop for each kind of s2, because one loop with a branch inside would hold the registers of both kinds.
    """
    first = tl.program_id(0).to(tl.int64) * (num_tiles * TILE)
    rows = tl.arange(0, TILE)
    s2 = tl.load(s2_ptr)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if arithmetic.is_simple(s2):
        is_row = rows < tl.minimum(num_blocks - first, TILE).to(tl.int32)
        a, b, c, d = arithmetic.load_quarters(x_ptr + first * 16, is_row, TILE)
        for tile in range(num_tiles):
            start = first + tile * TILE
            # The next tile is loaded while this one is computed.
            is_next_row = rows < tl.minimum(num_blocks - start - TILE, (num_tiles - 1 - tile) * TILE).to(tl.int32)
            next_a, next_b, next_c, next_d = arithmetic.load_quarters(x_ptr + (start + TILE) * 16, is_next_row, TILE)
            _quantize_tile(a, b, c, d, s2, steps_ptr, start, is_row, words_ptr, scales_ptr, FACTORS, STEPS, True, dtype, TILE)
            a, b, c, d, is_row = next_a, next_b, next_c, next_d, is_next_row
    else:
        for tile in range(num_tiles):
            start = first + tile * TILE
            is_row = rows < tl.minimum(num_blocks - start, TILE).to(tl.int32)
            a, b, c, d = arithmetic.load_quarters(x_ptr + start * 16, is_row, TILE)
            _quantize_tile(a, b, c, d, s2, steps_ptr, start, is_row, words_ptr, scales_ptr, FACTORS, STEPS, False, dtype, TILE)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["global_amax_ptr"])
def static_scales_kernel(
    amax_ptr,
    global_amax_ptr,
    scales_ptr,
    num_blocks: tl.int64,
    IS_QUANTIZED: tl.constexpr,
    IS_PRODUCT: tl.constexpr,
    TILE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    amax = tl.load(amax_ptr + offsets, mask=offsets < num_blocks, other=0.0).to(tl.float32)
    scales = scale_arithmetic.static_scales(amax, tl.load(global_amax_ptr).to(tl.float32), IS_QUANTIZED, IS_PRODUCT)
    tl.store(scales_ptr + offsets, scales, mask=offsets < num_blocks)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["global_amax_ptr"])
def static_fake_quant_kernel(
    x_ptr,
    amax_ptr,
    global_amax_ptr,
    out_ptr,
    num_blocks: tl.int64,
    IS_QUANTIZED: tl.constexpr,
    IS_PRODUCT: tl.constexpr,
    TILE: tl.constexpr,
):
    start, rows, is_row = _place(num_blocks, TILE)
    a, b, c, d = _load(x_ptr, start, is_row, TILE)
    amax = tl.load(amax_ptr + start + rows, mask=is_row, other=0.0).to(tl.float32)
    scales = scale_arithmetic.static_scales(amax, tl.load(global_amax_ptr).to(tl.float32), IS_QUANTIZED, IS_PRODUCT)
    divisors = tl.where(scales == 0.0, 1.0, scales)
    factor = arithmetic.factor_of(divisors)[:, None]
    a, b, c, d = arithmetic.fake_quant(a, b, c, d, divisors, scales, factor, False, arithmetic.is_narrow(x_ptr))
    # Adding 0.0 makes every zero +0.0, as in Model Optimizer. Under a scale of zero all elements are zeros.
    a, b, c, d = a + 0.0, b + 0.0, c + 0.0, d + 0.0
    arithmetic.store_quarters(out_ptr + start * 16, a, b, c, d, is_row, arithmetic.is_narrow(x_ptr), TILE)


@triton.jit(do_not_specialize=["num_octets"], do_not_specialize_on_alignment=["global_amax_ptr"])
def static_fake_quant_octets_kernel(
    x_ptr,
    amax_ptr,
    global_amax_ptr,
    out_ptr,
    num_octets: tl.int64,
    OCTETS_PER_SCALE: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    IS_PRODUCT: tl.constexpr,
    TILE: tl.constexpr,
):
    """`static_fake_quant_kernel` for blocks of any multiple of 8 elements: a row is an octet, which has one scale."""
    start, rows, is_row = _place(num_octets, TILE)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    a, b = arithmetic.load_octets(x_ptr + start * 8, is_row, TILE)
    # Half a block: the other half of these results is not computed, since nothing uses it.
    a, b, _, _ = arithmetic.widen(a, b, a, b, dtype)
    amax = tl.load(amax_ptr + _scale_offsets(start, rows, OCTETS_PER_SCALE, TILE), mask=is_row, other=0.0).to(tl.float32)
    scales = scale_arithmetic.static_scales(amax, tl.load(global_amax_ptr).to(tl.float32), IS_QUANTIZED, IS_PRODUCT)
    divisors = tl.where(scales == 0.0, 1.0, scales)
    factor = arithmetic.factor_of(divisors)[:, None]
    a, b, _, _ = arithmetic.fake_quant(a, b, a, b, divisors, scales, factor, False, arithmetic.is_narrow(x_ptr))
    arithmetic.store_octets(out_ptr + start * 8, a + 0.0, b + 0.0, is_row, arithmetic.is_narrow(x_ptr), TILE)


@triton.jit
def _scale_offsets(start, rows, ROWS_PER_SCALE: tl.constexpr, TILE: tl.constexpr):
    """Index of the scale of each row, where ROWS_PER_SCALE consecutive rows share one."""
    if TILE % ROWS_PER_SCALE == 0:
        # This form has no division of 64-bit integers per row.
        offsets = start // ROWS_PER_SCALE + rows // ROWS_PER_SCALE
    else:
        offsets = (start + rows) // ROWS_PER_SCALE
    return offsets


@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=["s2_ptr"])
def dequantize_kernel(
    packed_ptr, scales_ptr, s2_ptr, out_ptr, num_words: tl.int64,
    WORDS_PER_SCALE: tl.constexpr, IS_E4M3: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`reference.dequantize`. A row is a word, an int32 of eight codes, which share a scale."""
    start, rows, is_row = _place(num_words, TILE)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    words = tl.load(words_ptr + start + rows, mask=is_row, other=0)
    scales = tl.load(scales_ptr + _scale_offsets(start, rows, WORDS_PER_SCALE, TILE), mask=is_row, other=0)
    scales = arithmetic.e4m3_value(scales) if IS_E4M3 else scales.to(tl.float32)
    scales *= tl.load(s2_ptr).to(tl.float32)
    values = arithmetic.decode(words, scales).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start * 8 + rows[:, None] * 8 + tl.arange(0, 8)[None, :], values, mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_rows", "blocks_per_row"], do_not_specialize_on_alignment=["s2_ptr"])
def choose_steps_kernel(
    x_ptr, s2_ptr, hessian_ptr, steps_ptr, blocks_per_row: tl.int32, num_rows: tl.int64,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`reference.choose_steps`. A program takes ROWS x COLUMNS blocks; programs that follow each other take neighbouring columns."""
    num_across = tl.cdiv(blocks_per_row, COLUMNS)
    row = (tl.program_id(0) // num_across).to(tl.int64) * ROWS
    column = tl.program_id(0) % num_across * COLUMNS
    num_rows = tl.minimum(num_rows - row, ROWS).to(tl.int32)
    block = row * blocks_per_row + column
    triton_search.search(
        x_ptr + block * 16, steps_ptr + block, hessian_ptr + column * 256, tl.load(s2_ptr),
        num_rows, tl.minimum(blocks_per_row - column, COLUMNS), blocks_per_row, STEPS, TILE,
    )  # fmt: skip


# ---- launchers: the signatures of the operators ------------------------------------------------------------------------------


def block_amax(x: Tensor) -> Tensor:
    amax = x.new_empty(_block_shape(x), dtype=torch.float32)
    _launch("block_amax", block_amax_kernel, amax.numel(), x, _flat(x), amax)
    return amax


def fake_quant(x: Tensor, s2: Tensor, dtype: torch.dtype, block_scale: str = "max", steps: Tensor | None = None) -> Tensor:
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    tensors = _flat(x), s2, None if steps is None else _flat(steps), out
    _launch("fake_quant", fake_quant_kernel, x.numel() // reference.BLOCK_SIZE, x, *tensors, **_candidates(block_scale))
    return out


def quantize(x: Tensor, s2: Tensor, block_scale: str = "max", steps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    scales = x.new_empty(_block_shape(x), dtype=torch.float8_e4m3fn)
    num_blocks = x.numel() // reference.BLOCK_SIZE
    num_tiles = _tiles_per_program("quantize", num_blocks)
    # The kernel writes scales as bytes, since Triton has no E4M3 type on compute capability 8.0.
    tensors = _flat(x), s2, None if steps is None else _flat(steps), packed, scales.view(torch.uint8), num_tiles
    _launch("quantize", quantize_kernel, num_blocks, x, *tensors, num_tiles=num_tiles, **_candidates(block_scale))
    return packed, scales


def choose_steps(x: Tensor, s2: Tensor, hessian: Tensor, block_scale: str) -> Tensor:
    steps = x.new_empty(_block_shape(x), dtype=torch.int8)
    if steps.numel() == 0:
        return steps
    blocks_per_row = steps.shape[-1]
    num_rows = steps.numel() // blocks_per_row
    tile, num_warps = TILES["choose_steps"]
    num_programs = _cdiv(num_rows, SEARCH_ROWS) * _cdiv(blocks_per_row, SEARCH_COLUMNS)
    args = _flat(x), s2, _flat(hessian), steps, blocks_per_row, num_rows
    constants = {
        "STEPS": BLOCK_SCALE_RULES[block_scale].steps, "ROWS": SEARCH_ROWS, "COLUMNS": SEARCH_COLUMNS, "TILE": tile,
    }  # fmt: skip
    launch("choose_steps", choose_steps_kernel, num_programs, num_warps, x, args, constants, SEARCH_REGISTERS)
    return steps


def static_scales(amax: Tensor, global_amax: Tensor, quantize_block_scales: bool = True) -> Tensor:
    scales = amax.new_empty(amax.shape, dtype=torch.float32)
    tensors = _flat(amax), global_amax, scales
    _launch(
        "static_scales",
        static_scales_kernel,
        amax.numel(),
        amax,
        *tensors,
        IS_QUANTIZED=quantize_block_scales,
        IS_PRODUCT=amax.is_cuda,
    )
    return scales


def static_fake_quant(x: Tensor, amax: Tensor, global_amax: Tensor, quantize_block_scales: bool, dtype: torch.dtype) -> Tensor:
    """`reference.static_fake_quant` of `reference.static_scales`, in one pass for blocks of a multiple of 8 elements."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    block_size = x.numel() // amax.numel()
    tensors = _flat(x), _flat(amax), global_amax, out
    constants: dict[str, Any] = {"IS_QUANTIZED": quantize_block_scales, "IS_PRODUCT": amax.is_cuda}
    if block_size == reference.BLOCK_SIZE:
        _launch("static_fake_quant", static_fake_quant_kernel, amax.numel(), x, *tensors, **constants)
    elif block_size % 8 == 0:
        constants = {"OCTETS_PER_SCALE": block_size // 8, **constants}
        _launch("static_fake_quant_octets", static_fake_quant_octets_kernel, x.numel() // 8, x, *tensors, **constants)
    else:
        with torch.no_grad():
            scales = reference.static_scales(amax, global_amax, quantize_block_scales)
            return reference.static_fake_quant(x, scales, dtype)
    return out


def dequantize(packed: Tensor, scales: Tensor, s2: Tensor, dtype: torch.dtype) -> Tensor:
    out = packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype)
    if out.numel() == 0:
        return out
    block_size = out.shape[-1] // scales.shape[-1]
    if block_size % 8:
        with torch.no_grad():
            return reference.dequantize(packed, scales, s2, dtype)
    is_e4m3 = scales.dtype == torch.float8_e4m3fn
    tensors = _flat(packed), _flat(scales.view(torch.uint8) if is_e4m3 else scales), s2, out
    num_words = out.numel() // 8
    _launch("dequantize", dequantize_kernel, num_words, out, *tensors, WORDS_PER_SCALE=block_size // 8, IS_E4M3=is_e4m3)
    return out


def _candidates(block_scale: str) -> dict[str, Any]:
    rule = BLOCK_SCALE_RULES[block_scale]
    return {"FACTORS": rule.factors, "STEPS": rule.steps}


def _cdiv(a: int, b: int) -> int:
    # triton.cdiv takes a microsecond.
    return -(-a // b)


def _block_shape(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // reference.BLOCK_SIZE)


def _flat(x: Tensor) -> Tensor:
    """x, or a copy where x is not contiguous or does not start on a 16-byte boundary, which 16-byte loads require."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _tiles_per_program(operation: str, num_rows: int) -> int:
    most, num_programs = TILES_PER_PROGRAM[operation]
    return max(1, min(most, num_rows // (TILES[operation][0] * num_programs)))


def _launch(operation: str, kernel, num_rows: int, x: Tensor, *args, num_tiles: int = 1, **constants) -> None:
    """Run a kernel over num_rows rows on the device of x, num_tiles tiles per program."""
    if num_rows == 0:
        return
    tile, num_warps = TILES[operation]
    constants["TILE"] = tile
    launch(operation, kernel, _cdiv(num_rows, tile * num_tiles), num_warps, x, (*args, num_rows), constants)


_compiled: dict[tuple, Any] = {}


def launch(
    name: str,
    kernel,
    num_programs: int,
    num_warps: int,
    x: Tensor,
    args: tuple,
    constants: dict[str, Any],
    most_registers: int | None = None,
) -> None:
    """Run a kernel on the device of x. Constants are in the order of its parameters; tensors start on 16-byte boundaries.

    most_registers limits those of a thread, where the compiler would take more than serve.

    A compiled kernel depends on the constants and on the dtypes of the tensors alone. It is kept and called without Triton's own
    look-up, which takes longer than a small kernel runs.
    """
    device = x.get_device()
    if x.is_cuda and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(name, kernel, num_programs, num_warps, x, args, constants, most_registers)
        return
    grid = (num_programs, 1, 1)
    key = (name, device, *constants.values(), *[arg.dtype for arg in args if isinstance(arg, Tensor)])
    compiled = _compiled.get(key)
    if compiled is None:
        # The interpreter compiles nothing and returns None.
        options = {"num_warps": num_warps, "enable_fp_fusion": False, "maxnreg": most_registers}
        _compiled[key] = kernel[grid](*args, **constants, **options)
    else:
        compiled[grid](*args, *constants.values())
