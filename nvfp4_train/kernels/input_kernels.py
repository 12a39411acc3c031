"""Inputs of linears as they are served, in one Triton launch: block amax, scale and codes, and the decoded input beside them.

The bits are those of `reference.quantize_input`. Two of its steps are written otherwise: g / scale is 1 / scale, rounded once, times
the power of two g, and a decoded value is made of its code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import reference
from nvfp4_train.kernels import triton_arithmetic as arithmetic
from nvfp4_train.kernels.triton_kernels import _flat, _load, _place, launch

TILE = 64
"""Blocks of 16 elements to a program."""
NUM_WARPS = 2


@triton.jit
def _scales(a, b, c, d, input_scale):
    """Block scales of quarters, [TILE], and g / scale, 1 for a scale of 0."""
    # 1 / input_scale: the exponent of a power of two, negated.
    g = arithmetic.from_bits(0x7F000000 - arithmetic.to_bits(input_scale))
    ratio = g * (arithmetic.block_amax(a, b, c, d) * (1.0 / 6.0))
    scales = arithmetic.round_e4m3(arithmetic.smaller(ratio, 448.0))
    return scales, g * arithmetic.reciprocal(tl.where(scales == 0.0, 1.0, scales))


@triton.jit
def _quantize(x_ptr, input_scale, start, is_row, TILE: tl.constexpr):
    """The quarters of a tile, zero where the block scale is, their codes, and the block scales."""
    a, b, c, d = _load(x_ptr, start, is_row, TILE)
    scales, factors = _scales(a, b, c, d, input_scale)
    is_zero, factors = (scales == 0.0)[:, None], factors[:, None]
    a, b, c, d = tl.where(is_zero, 0.0, a), tl.where(is_zero, 0.0, b), tl.where(is_zero, 0.0, c), tl.where(is_zero, 0.0, d)
    code_a, code_b = arithmetic.codes_of_products(a, factors), arithmetic.codes_of_products(b, factors)
    code_c, code_d = arithmetic.codes_of_products(c, factors), arithmetic.codes_of_products(d, factors)
    return a, b, c, d, code_a, code_b, code_c, code_d, scales


@triton.jit
def _store_decoded(
    out_ptr, a, b, c, d, code_a, code_b, code_c, code_d, scales, is_row, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    scales = scales[:, None]
    a, b = arithmetic.decode_codes(a, code_a, scales), arithmetic.decode_codes(b, code_b, scales)
    c, d = arithmetic.decode_codes(c, code_c, scales), arithmetic.decode_codes(d, code_d, scales)
    arithmetic.store_quarters(out_ptr, a, b, c, d, is_row, IS_INTERLEAVED, TILE)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["input_scale_ptr"])
def quantize_input_kernel(
    x_ptr, input_scale_ptr, out_ptr, packed_ptr, scales_ptr, num_blocks: tl.int64, TILE: tl.constexpr
):  # fmt: skip
    """`reference.quantize_input`, and what it decodes to. A word is an int32 of eight codes, two to a block."""
    start, rows, is_row = _place(num_blocks, TILE)
    input_scale = tl.load(input_scale_ptr)
    is_narrow: tl.constexpr = arithmetic.is_narrow(x_ptr)
    a, b, c, d, code_a, code_b, code_c, code_d, scales = _quantize(x_ptr, input_scale, start, is_row, TILE)
    # Codes go first: between the two stores of decoded values there may be little else, or bandwidth falls.
    words = arithmetic.pack_codes(a, b, c, d, code_a, code_b, code_c, code_d, is_narrow, TILE)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + start * 2
    tl.store(words_ptr + rows[:, None] * 2 + tl.arange(0, 2)[None, :], words, mask=is_row[:, None])
    tl.store(scales_ptr + start + rows, arithmetic.e4m3_byte(scales), mask=is_row)
    _store_decoded(
        out_ptr + start * 16, a, b, c, d, code_a, code_b, code_c, code_d, scales * input_scale, is_row, is_narrow, TILE
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["input_scale_ptr"])
def fake_quant_input_kernel(x_ptr, input_scale_ptr, out_ptr, num_blocks: tl.int64, TILE: tl.constexpr):
    """`reference.fake_quant_input`."""
    start, _, is_row = _place(num_blocks, TILE)
    input_scale = tl.load(input_scale_ptr)
    a, b, c, d, code_a, code_b, code_c, code_d, scales = _quantize(x_ptr, input_scale, start, is_row, TILE)
    _store_decoded(
        out_ptr + start * 16, a, b, c, d, code_a, code_b, code_c, code_d, scales * input_scale, is_row,
        arithmetic.is_narrow(x_ptr), TILE,
    )  # fmt: skip


def quantize_input(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_hat = torch.empty_like(x, memory_format=torch.contiguous_format)
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    scales = x.new_empty((*x.shape[:-1], x.shape[-1] // reference.BLOCK_SIZE), dtype=torch.float8_e4m3fn)
    # As bytes, since Triton has no E4M3 type on compute capability 8.0.
    _launch("quantize_input", quantize_input_kernel, x, input_scale, x_hat, packed, scales.view(torch.uint8))
    return x_hat, packed, scales


def fake_quant_input(x: Tensor, input_scale: Tensor) -> Tensor:
    x_hat = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch("fake_quant_input", fake_quant_input_kernel, x, input_scale, x_hat)
    return x_hat


def _launch(name: str, kernel, x: Tensor, input_scale: Tensor, *outputs: Tensor) -> None:
    num_blocks = x.numel() // reference.BLOCK_SIZE
    if num_blocks:
        args = (_flat(x), input_scale, *outputs, num_blocks)
        launch(name, kernel, -(-num_blocks // TILE), NUM_WARPS, x, args, {"TILE": TILE})
