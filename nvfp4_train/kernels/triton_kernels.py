"""Every operation of `reference`, bit for bit, as one Triton kernel: the path that CUDA tensors take.

Kernels stream: a program takes TILE blocks of 16 elements, reads each byte once, writes each byte once, and keeps all else in
registers. A tensor is a flat run of blocks (the last dimension is a multiple of 16), so shapes play no part and a new shape
compiles nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import reference
from nvfp4_train.kernels import triton_arithmetic as arithmetic

TILES = {
    "block_amax": (128, 4),
    "amax": (128, 4),
    "max": (1024, 4),
    "fake_quant": (128, 4),
    "quantize": (128, 4),
    "static_scales": (256, 4),
    "static_fake_quant": (128, 4),
    "dequantize": (256, 4),
}
"""Blocks a program (for dequantize, words of eight codes) and warps a program, by operation."""

AMAX_TILES_PER_PROGRAM = 16


@triton.jit
def _place(num_blocks, TILE: tl.constexpr):
    """First block of this program, its rows, and which of them exist."""
    start = tl.program_id(0).to(tl.int64) * TILE
    rows = tl.arange(0, TILE)
    return start, rows, rows < tl.minimum(num_blocks - start, TILE).to(tl.int32)


# ---- kernels -----------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_blocks"])
def block_amax_kernel(x_ptr, amax_ptr, num_blocks: tl.int64, TILE: tl.constexpr):
    start, rows, is_row = _place(num_blocks, TILE)
    amax = arithmetic.block_amax_of_quarters(*arithmetic.load_quarters(x_ptr + start * 16, is_row, TILE))
    tl.store(amax_ptr + start + rows, amax, mask=is_row)


@triton.jit(do_not_specialize=["num_blocks"])
def amax_kernel(x_ptr, amax_ptr, partial_ptr, num_blocks: tl.int64, NUM_TILES: tl.constexpr, TILE: tl.constexpr):
    """Block amax, and the largest of NUM_TILES tiles."""
    first = tl.program_id(0).to(tl.int64) * (TILE * NUM_TILES)
    rows = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.float32)
    for tile in range(NUM_TILES):
        start = first + tile * TILE
        is_row = rows < tl.minimum(num_blocks - start, TILE).to(tl.int32)
        amax = arithmetic.block_amax_of_quarters(*arithmetic.load_quarters(x_ptr + start * 16, is_row, TILE))
        tl.store(amax_ptr + start + rows, amax, mask=is_row)
        largest = arithmetic.larger(largest, amax)
    tl.store(partial_ptr + tl.program_id(0), tl.reduce(largest, 0, arithmetic.larger))


@triton.jit(do_not_specialize=["num_values"])
def max_kernel(values_ptr, max_ptr, num_values: tl.int64, TILE: tl.constexpr):
    """The largest of non-negative values, or NaN; in one program."""
    offsets = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.float32)
    for start in range(0, num_values, TILE):
        values = tl.load(values_ptr + start + offsets, mask=start + offsets < num_values, other=0.0)
        largest = arithmetic.larger(largest, values)
    tl.store(max_ptr, tl.reduce(largest, 0, arithmetic.larger))


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["s2_ptr"])
def fake_quant_kernel(x_ptr, s2_ptr, out_ptr, num_blocks: tl.int64, TILE: tl.constexpr):
    start, _, is_row = _place(num_blocks, TILE)
    x = arithmetic.load_blocks(x_ptr + start * 16, is_row, TILE)
    s2 = tl.load(s2_ptr)
    regime = arithmetic.regime(s2)
    scales = arithmetic.block_scales(arithmetic.block_amax(x), s2, regime) * s2
    x_hat = arithmetic.fake_quant(x, scales, scales, regime, arithmetic.is_narrow(x_ptr))
    arithmetic.store_blocks(out_ptr + start * 16, x_hat, is_row, TILE)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["s2_ptr"])
def quantize_kernel(x_ptr, s2_ptr, words_ptr, scales_ptr, num_blocks: tl.int64, TILE: tl.constexpr):
    """Eight codes to an int32, so two words a block."""
    start, rows, is_row = _place(num_blocks, TILE)
    a, b, c, d = arithmetic.load_quarters(x_ptr + start * 16, is_row, TILE)
    s2 = tl.load(s2_ptr)
    regime = arithmetic.regime(s2)
    scales = arithmetic.block_scales(arithmetic.block_amax_of_quarters(a, b, c, d), s2, regime)
    words = arithmetic.encode_quarters(a, b, c, d, scales * s2, regime, arithmetic.is_narrow(x_ptr), TILE)
    tl.store(words_ptr + start * 2 + rows[:, None] * 2 + tl.arange(0, 2)[None, :], words, mask=is_row[:, None])
    tl.store(scales_ptr + start + rows, arithmetic.e4m3_byte(scales), mask=is_row)


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
    scales, _ = arithmetic.static_scales(amax, tl.load(global_amax_ptr).to(tl.float32), IS_QUANTIZED, IS_PRODUCT)
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
    x = arithmetic.load_blocks(x_ptr + start * 16, is_row, TILE)
    amax = tl.load(amax_ptr + start + rows, mask=is_row, other=0.0).to(tl.float32)
    scales, regime = arithmetic.static_scales(amax, tl.load(global_amax_ptr).to(tl.float32), IS_QUANTIZED, IS_PRODUCT)
    # A zero is +0.0 here, as Model Optimizer has it; a scale of zero makes a zero of every element.
    x_hat = arithmetic.fake_quant(x, tl.where(scales == 0.0, 1.0, scales), scales, regime, False) + 0.0
    arithmetic.store_blocks(out_ptr + start * 16, x_hat, is_row, TILE)


@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=["s2_ptr"])
def dequantize_kernel(
    words_ptr, scales_ptr, s2_ptr, out_ptr, num_words: tl.int64,
    WORDS_PER_SCALE: tl.constexpr, IS_E4M3: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """An int32 holds eight codes, which share a scale."""
    start = tl.program_id(0).to(tl.int64) * TILE
    rows = tl.arange(0, TILE)
    is_row = rows < tl.minimum(num_words - start, TILE).to(tl.int32)
    words = tl.load(words_ptr + start + rows, mask=is_row, other=0)
    if TILE % WORDS_PER_SCALE == 0:
        scales_ptr += start // WORDS_PER_SCALE + rows // WORDS_PER_SCALE
    else:
        scales_ptr += (start + rows) // WORDS_PER_SCALE
    scales = tl.load(scales_ptr, mask=is_row, other=0)
    scales = arithmetic.e4m3_value(scales) if IS_E4M3 else scales.to(tl.float32)
    scales *= tl.load(s2_ptr).to(tl.float32)
    columns = tl.arange(0, 8)[None, :]
    # Sign to bit 31, magnitude to bits 24..22, as the arithmetic shift leaves them; 2^126 makes up for the exponent bias.
    bits = ((words[:, None] << (28 - 4 * columns)) >> 6) & -0x7E400000
    values = (arithmetic.from_bits(bits) * 2.0**126) * scales[:, None]
    tl.store(out_ptr + start * 8 + rows[:, None] * 8 + columns, values.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


# ---- launchers: the signatures of `reference` --------------------------------------------------------------------------------


def block_amax(x: Tensor) -> Tensor:
    amax = x.new_empty(_block_shape(x), dtype=torch.float32)
    _launch("block_amax", block_amax_kernel, amax.numel(), x, _flat(x), amax)
    return amax


def amax(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.block_amax` and its maximum, in one pass over x."""
    block_amax = x.new_empty(_block_shape(x), dtype=torch.float32)
    if x.numel() == 0:
        return block_amax, x.new_zeros((), dtype=torch.float32)
    tiles = AMAX_TILES_PER_PROGRAM
    partial = x.new_empty(triton.cdiv(block_amax.numel(), TILES["amax"][0] * tiles), dtype=torch.float32)
    global_amax = x.new_empty((), dtype=torch.float32)
    _launch("amax", amax_kernel, block_amax.numel(), x, _flat(x), block_amax, partial, tiles=tiles, NUM_TILES=tiles)
    # All values in one program.
    _launch("max", max_kernel, partial.numel(), x, partial, global_amax, tiles=partial.numel())
    return block_amax, global_amax


def fake_quant(x: Tensor, s2: Tensor, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(x.shape, dtype=dtype)
    _launch("fake_quant", fake_quant_kernel, x.numel() // reference.BLOCK_SIZE, x, _flat(x), s2, out)
    return out


def quantize(x: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    scales = x.new_empty(_block_shape(x), dtype=torch.float8_e4m3fn)
    words = packed.view(-1).view(torch.int32)
    _launch("quantize", quantize_kernel, scales.numel(), x, _flat(x), s2, words, scales.view(torch.uint8))
    return packed, scales


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
    """`reference.static_fake_quant` of `reference.static_scales`, in one pass."""
    out = x.new_empty(x.shape, dtype=dtype)
    tensors = _flat(x), _flat(amax), global_amax, out
    _launch(
        "static_fake_quant",
        static_fake_quant_kernel,
        amax.numel(),
        x,
        *tensors,
        IS_QUANTIZED=quantize_block_scales,
        IS_PRODUCT=amax.is_cuda,
    )
    return out


def dequantize(packed: Tensor, scales: Tensor, s2: Tensor, dtype: torch.dtype) -> Tensor:
    out = packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype)
    if out.numel() == 0:
        return out
    block_size = out.shape[-1] // scales.shape[-1]
    if block_size % 8:
        return reference.dequantize(packed, scales, s2, dtype)
    words = _flat(packed).view(-1).view(torch.int32)
    is_e4m3 = scales.dtype == torch.float8_e4m3fn
    scales = _flat(scales.view(torch.uint8) if is_e4m3 else scales)
    tensors = words, scales, s2, out
    _launch("dequantize", dequantize_kernel, words.numel(), packed, *tensors, WORDS_PER_SCALE=block_size // 8, IS_E4M3=is_e4m3)
    return out


def _block_shape(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // reference.BLOCK_SIZE)


def _flat(x: Tensor) -> Tensor:
    """x, or a copy where x has gaps or starts off a 16-byte boundary, which 16-byte loads require."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _launch(operation: str, kernel, num_rows: int, x: Tensor, *args, tiles: int = 1, **constants) -> None:
    """Run a kernel over num_rows rows on the device of x, so many tiles a program."""
    if num_rows == 0:
        return
    tile, num_warps = TILES[operation]
    grid = (triton.cdiv(num_rows, tile * tiles),)
    constants |= {"TILE": tile, "num_warps": num_warps, "enable_fp_fusion": False}
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, num_rows, **constants)
    else:
        kernel[grid](*args, num_rows, **constants)
