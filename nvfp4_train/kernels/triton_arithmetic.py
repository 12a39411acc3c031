"""NVFP4 arithmetic for Triton kernels: `reference`, bit for bit, on tiles [TILE, 16] that hold one block per row.

Where the plain formulation costs bandwidth, another that gives the same bits is used:

- Division. An IEEE quotient a / b is a * r with one correction by fused multiply-add, where r is 1 / b rounded once (Markstein).
  It holds while nothing under- or overflows, so each kernel asks once, of its global scale, and else divides by `tl.div_rn`.
- Rounding. Adding and subtracting 2^22 times its own power of two leaves a number one mantissa bit, ties to even, which is E2M1;
  with 2^20 it leaves three, which is E4M3. Of E4M3 hardware, which compute capability 8.0 has not, nothing is used.

Kernels are compiled with `enable_fp_fusion=False`: contracting a product and a sum into one rounding changes bits. `tl.fma`
stands where one rounding is wanted.
"""

import torch
import triton
import triton.language as tl

from nvfp4_train.kernels import reference

E4M3_MIN = tl.constexpr(reference.E4M3_MIN)
SIGN = tl.constexpr(-(2**31))
EXPONENT = tl.constexpr(0x7F800000)
LOWEST_ORDINARY = tl.constexpr(2.0**-60)
HIGHEST_ORDINARY = tl.constexpr(2.0**60)
LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def load_blocks(x_ptr, is_row, TILE: tl.constexpr):
    """TILE blocks in a row, as float32 [TILE, 16], with 0.0 for -0.0: a zero has code 0, of whichever sign."""
    rows = tl.arange(0, TILE)[:, None]
    if x_ptr.dtype.element_ty == tl.bfloat16:
        # Two elements an int32: widening takes one instruction each, against two for the odd one of a pair of bfloat16.
        pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + rows * 8 + tl.arange(0, 8)[None, :]
        pairs = tl.load(pairs_ptr, mask=is_row[:, None], other=0)
        x = tl.reshape(tl.join(from_bits(pairs << 16), from_bits(pairs & -0x10000)), [TILE, 16])
    else:
        x = tl.load(x_ptr + rows * 16 + tl.arange(0, 16)[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
    return x + 0.0


@triton.jit
def store_blocks(out_ptr, values, is_row, TILE: tl.constexpr):
    """Write [TILE, 16] in the dtype of out_ptr, where there is a row."""
    offsets = tl.arange(0, TILE)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def to_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def smaller(a, b):
    """The smaller one, or NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """The larger one, or NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal(b):
    """1 / b rounded once, for b in the ordinary range: a guess from the bits of b, within 6 %, and four Newton steps."""
    negative = -b
    bits = to_bits(b)
    guess = from_bits(0x7EF311C3 - bits)
    guess = tl.fma(tl.fma(negative, guess, 1.0), guess, guess)
    guess = tl.fma(tl.fma(negative, guess, 1.0), guess, guess)
    guess = tl.fma(tl.fma(negative, guess, 1.0), guess, guess)
    guess = tl.fma(tl.fma(negative, guess, 1.0), guess, guess)
    # Of all significands only that of all ones comes out wrong, an ulp low.
    return from_bits(to_bits(guess) + tl.where(((bits + 1) & 0x7FFFFF) == 0, 1, 0))


@triton.jit
def divide(a, b, one_over_b):
    """a / b rounded once, given 1 / b rounded once. Finite a; underflow of `a * 2^-24` is the caller's to exclude."""
    quotient = a * one_over_b
    return tl.fma(tl.fma(quotient, -b, a), one_over_b, quotient)


@triton.jit
def is_ordinary_scale(scale):
    """Whether block scales between 2^-9 and 448 times this scale keep every step of `divide` in range."""
    return (scale > LOWEST_ORDINARY) & (scale < HIGHEST_ORDINARY)


@triton.jit
def _power_of_two(magnitude, LOWEST: tl.constexpr):
    """The largest power of two that is not above each magnitude, but at least LOWEST."""
    return tl.maximum(from_bits(to_bits(magnitude) & EXPONENT), LOWEST)


@triton.jit
def round_e4m3(t):
    """The nearest E4M3 value of each t in [0, 448], ties to even, as float32; NaN stays NaN."""
    power = _power_of_two(t, 2.0**-6)
    return tl.fma(power, -(2.0**20), tl.fma(power, 2.0**20, t))


@triton.jit
def round_e2m1(magnitude):
    """The nearest E2M1 magnitude of each float32 in [0, 7), ties to even."""
    power = _power_of_two(magnitude, 1.0)
    return tl.fma(power, -(2.0**22), tl.fma(power, 2.0**22, magnitude))


@triton.jit
def encode_e2m1(magnitude):
    """The code 0..7 of each float32 in [0, 7)."""
    # The sum ends in round(magnitude / step), 0 to 4; twice its exponent counts the codes below; 3 cancels the bias, modulo 8.
    bits = to_bits(tl.fma(_power_of_two(magnitude, 1.0), 2.0**22 + 3, magnitude))
    return (bits + (bits >> 22)) & 7


@triton.jit
def e4m3_byte(value):
    """The byte of each float32 that is an E4M3 value >= 0 or NaN."""
    # 2^-120 moves E4M3's exponent bias onto that of fp32, subnormals included.
    byte = to_bits(value * 2.0**-120) >> 20
    return tl.where(value <= 448.0, byte, 0x7F).to(tl.uint8)


@triton.jit
def e4m3_value(byte):
    """float32 of each E4M3 byte."""
    byte = byte.to(tl.int32)
    magnitude = from_bits((byte & 0x7F) << 20) * 2.0**120
    magnitude = tl.where((byte & 0x7F) == 0x7F, float("nan"), magnitude)
    return from_bits(to_bits(magnitude) | ((byte << 24) & SIGN))


@triton.jit
def block_amax(x):
    """Largest magnitude of each row of x [TILE, 16], or NaN."""
    return tl.reduce(tl.abs(x), 1, larger)


@triton.jit
def block_scales(amax, s2, is_ordinary):
    """`reference.block_scales`."""
    if is_ordinary:
        # 4096 * s2 gives a scale above 448 as well, and keeps Inf out of the division.
        sixth = divide(smaller(amax, 4096.0 * s2), 6.0, 1.0 / 6.0)
        ratio = divide(sixth, s2, reciprocal(s2))
    else:
        ratio = tl.div_rn(tl.div_rn(amax, 6.0), s2)
    return round_e4m3(smaller(larger(ratio, E4M3_MIN), 448.0))


@triton.jit
def magnitudes(x, divisors, scales, is_ordinary):
    """|x| / divisor, saturated for E2M1: x [TILE, 16], scales [TILE] and divisors, which are scales with 1 for 0."""
    if is_ordinary:
        # Saturating before the division keeps Inf out of it. 6 * scale is rounded, so a quotient may be an ulp above 6.
        saturated = smaller(tl.abs(x), 6.0 * scales[:, None])
        quotient = divide(saturated, divisors[:, None], reciprocal(divisors)[:, None])
    else:
        quotient = smaller(tl.div_rn(tl.abs(x), tl.broadcast_to(divisors[:, None], x.shape)), 6.0)
    return quotient


@triton.jit
def fake_quant(x, divisors, scales, is_ordinary, sign_mask):
    """x [TILE, 16] on the grid of scales [TILE]; sign_mask is 0 where x_hat has no sign to take from x."""
    magnitude = round_e2m1(magnitudes(x, divisors, scales, is_ordinary)) * scales[:, None]
    return from_bits(to_bits(magnitude) | (to_bits(x) & sign_mask))


@triton.jit
def encode(x, scales, is_ordinary, TILE: tl.constexpr):
    """Signed codes of x [TILE, 16] under positive scales [TILE], eight to an int32: [TILE, 2]."""
    codes = encode_e2m1(magnitudes(x, scales, scales, is_ordinary)) | ((to_bits(x) >> 28) & 8)
    return tl.sum(tl.reshape(codes, [TILE, 2, 8]) << (4 * tl.arange(0, 8))[None, None, :], axis=2)


@triton.jit
def static_scales(amax, global_amax, IS_QUANTIZED: tl.constexpr):
    """`reference.static_scales`, and whether they are ordinary."""
    if IS_QUANTIZED:
        is_ordinary = global_amax < HIGHEST_ORDINARY
        if is_ordinary:
            sixth = divide(global_amax, 6.0, 1.0 / 6.0)
            multiplier = reciprocal(tl.where(sixth <= 2.0**-24, 1.0, sixth)) * 448.0
            inverse = reciprocal(multiplier)
            scales = divide(smaller(amax, LARGEST_FLOAT), 6.0, 1.0 / 6.0)
        else:
            multiplier = tl.div_rn(1.0, tl.div_rn(global_amax, 6.0)) * 448.0
            inverse = tl.div_rn(1.0, multiplier)
            scales = tl.div_rn(amax, 6.0)
        scales = round_e4m3(smaller(scales * multiplier, 448.0)) * inverse
    else:
        scales = tl.div_rn(amax, 6.0)
        is_ordinary = False
    return scales, is_ordinary
