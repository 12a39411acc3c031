"""NVFP4 arithmetic for Triton kernels: `reference`, bit for bit, on TILE blocks at a time.

Where the plain formulation costs bandwidth, another that gives the same bits is used:

- Division. An IEEE quotient a / b is a * r with one correction by fused multiply-add, where r is 1 / b rounded once (Markstein).
  It holds while nothing under- or overflows; towards the ends of fp32 both are moved by a power of two first.
- A global scale that is a power of two makes most steps exact, and is taken on a path of its own: IS_SIMPLE.
- Rounding. Adding and subtracting 2^22 times its own power of two leaves a number one mantissa bit, ties to even, which is E2M1;
  with 2^20 it leaves three, which is E4M3. Of E4M3 hardware, which compute capability 8.0 has not, nothing is used.

Kernels are compiled with `enable_fp_fusion=False`: contracting a product and a sum into one rounding changes bits. `tl.fma`
stands where one rounding is wanted.
"""

import triton
import triton.language as tl

SIGN = tl.constexpr(-(2**31))
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def load_quarters(x_ptr, is_row, TILE: tl.constexpr):
    """TILE blocks in a row as four times [TILE, 4], in such a way that a thread holds all of a block; see `widen`."""
    rows = tl.arange(0, TILE)[:, None]
    columns = tl.arange(0, 4)[None, :]
    mask = is_row[:, None]
    if x_ptr.dtype.element_ty == tl.float32:
        x_ptr += rows * 16 + columns
        a = tl.load(x_ptr, mask=mask, other=0.0)
        b = tl.load(x_ptr + 4, mask=mask, other=0.0)
        c = tl.load(x_ptr + 8, mask=mask, other=0.0)
        d = tl.load(x_ptr + 12, mask=mask, other=0.0)
    else:
        # Two elements an int32; what a quarter repeats costs nothing.
        pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + rows * 8 + columns
        a = tl.load(pairs_ptr, mask=mask, other=0)
        c = tl.load(pairs_ptr + 4, mask=mask, other=0)
        b, d = a, c
    return a, b, c, d


@triton.jit
def load_octets(x_ptr, is_row, TILE: tl.constexpr):
    """`load_quarters` for TILE consecutive octets of 8 elements, which have two quarters."""
    rows = tl.arange(0, TILE)[:, None]
    columns = tl.arange(0, 4)[None, :]
    mask = is_row[:, None]
    if x_ptr.dtype.element_ty == tl.float32:
        x_ptr += rows * 8 + columns
        a = tl.load(x_ptr, mask=mask, other=0.0)
        b = tl.load(x_ptr + 4, mask=mask, other=0.0)
    else:
        pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + rows * 4 + columns
        a = tl.load(pairs_ptr, mask=mask, other=0)
        b = a
    return a, b


@triton.jit
def widen(a, b, c, d, dtype: tl.constexpr):
    """`load_quarters` as float32, with 0.0 for -0.0: a zero has code 0, of whichever sign.

    Of 16-bit dtypes: elements 0, 2, 4, 6; 1, 3, 5, 7; 8, 10, 12, 14; 9, 11, 13, 15. Of float32: 0 to 3, 4 to 7 and so on.
    """
    if dtype == tl.bfloat16:
        a, b, c, d = from_bits(a << 16), from_bits(b & -0x10000), from_bits(c << 16), from_bits(d & -0x10000)
    elif dtype == tl.float16:
        a, b, c, d = _widen_half(a), _widen_half(b >> 16), _widen_half(c), _widen_half(d >> 16)
    return a + 0.0, b + 0.0, c + 0.0, d + 0.0


@triton.jit
def _widen_half(bits):
    """float32 of the float16 in the low half of an int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.constexpr_function
def is_narrow(x_ptr):
    """Whether a pointer is to a 16-bit dtype, so that values have at most 11 significant bits."""
    return x_ptr.dtype.element_ty != tl.float32


@triton.jit
def store_quarters(out_ptr, a, b, c, d, is_row, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """Write quarters in the dtype of out_ptr, where there is a row; IS_INTERLEAVED as `widen` leaves 16-bit dtypes."""
    first, second = tl.join(a, b), tl.join(c, d)
    if not IS_INTERLEAVED:
        first, second = tl.permute(first, (0, 2, 1)), tl.permute(second, (0, 2, 1))
    out_ptr += tl.arange(0, TILE)[:, None] * 16 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr, tl.reshape(first, [TILE, 8]).to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(out_ptr + 8, tl.reshape(second, [TILE, 8]).to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def store_octets(out_ptr, a, b, is_row, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """`store_quarters` for rows of 8 elements, one after the other."""
    values = tl.join(a, b) if IS_INTERLEAVED else tl.permute(tl.join(a, b), (0, 2, 1))
    out_ptr += tl.arange(0, TILE)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr, tl.reshape(values, [TILE, 8]).to(out_ptr.dtype.element_ty), mask=is_row[:, None])


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
def is_simple(scale):
    """Whether a positive global scale is a power of two far from the ends of fp32."""
    return (scale > 2.0**-60) & (scale < 2.0**60) & ((to_bits(scale) & 0x7FFFFF) == 0)


@triton.jit
def factor_of(scale):
    """The power of two that moves a global scale, with block scales from 2^-6 to 448 times it, off the ends of fp32.

    A quotient is the same when dividend and divisor have moved; what the dividend loses at the ends no code could tell.
    """
    return tl.where(scale < 2.0**-50, 2.0**100, tl.where(scale > 2.0**50, 2.0**-100, 1.0))


@triton.jit
def _newton(b):
    """1 / b to 24 bits: a guess from the bits of b, within 6 %, and three Newton steps. Rounded once if b is an E4M3 value."""
    guess = from_bits(0x7EF311C3 - to_bits(b))
    guess = tl.fma(tl.fma(-b, guess, 1.0), guess, guess)
    guess = tl.fma(tl.fma(-b, guess, 1.0), guess, guess)
    return tl.fma(tl.fma(-b, guess, 1.0), guess, guess)


@triton.jit
def reciprocal(b):
    """1 / b rounded once, for b from 2^-125 to 2^125.5."""
    guess = _newton(b)
    guess = tl.fma(tl.fma(-b, guess, 1.0), guess, guess)
    # Of all significands only that of all ones comes out wrong, an ulp low.
    return from_bits(to_bits(guess) + tl.where(((to_bits(b) + 1) & 0x7FFFFF) == 0, 1, 0))


@triton.jit
def divide(a, b, one_over_b):
    """a / b rounded once, given 1 / b rounded once. Finite a; underflow of `a * 2^-24` is the caller's to exclude."""
    quotient = a * one_over_b
    return tl.fma(tl.fma(quotient, -b, a), one_over_b, quotient)


@triton.jit
def block_amax(a, b, c, d):
    """Largest magnitude of each block, [TILE], or NaN."""
    return tl.reduce(larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d))), 1, larger)


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
def _exact_quotients(a, b, c, d, divisors, scales, IS_SIMPLE: tl.constexpr):
    """|x| / divisor rounded once, in [0, 7), of quarters: scales and divisors [TILE, 1], the latter with 1 for 0."""
    one_over = _newton(divisors) if IS_SIMPLE else reciprocal(divisors)
    # Saturating before the division keeps Inf out of it. The limit is rounded, so a quotient may be an ulp above 6.
    limit = 6.0 * scales
    a = divide(smaller(tl.abs(a), limit), divisors, one_over)
    b = divide(smaller(tl.abs(b), limit), divisors, one_over)
    c = divide(smaller(tl.abs(c), limit), divisors, one_over)
    d = divide(smaller(tl.abs(d), limit), divisors, one_over)
    return a, b, c, d


@triton.jit
def _coarse_quotients(x, scales):
    """128 + |x| / scale to 16 fractional bits: x of at most 11 significant bits, scales an E4M3 value times a power of two.

    Such a quotient either is a tie of two codes, and exact here, or misses all of them by more than 2^-14.
    """
    return tl.fma(tl.abs(x), _newton(scales), 128.0)


@triton.jit
def fake_quant(a, b, c, d, divisors, scales, factor, IS_SIMPLE: tl.constexpr, IS_NARROW: tl.constexpr):
    """Quarters on the grid of scales [TILE], signs included. IS_NARROW: they were of a 16-bit dtype.

    Divisors are the scales with 1 for 0; factor is that of the global scale, or one per block, and 1 if IS_SIMPLE.
    """
    divisors = divisors[:, None]
    scales = scales[:, None]
    if IS_SIMPLE and IS_NARROW:
        q_a = smaller(_coarse_quotients(a, scales) - 128.0, 6.0)
        q_b = smaller(_coarse_quotients(b, scales) - 128.0, 6.0)
        q_c = smaller(_coarse_quotients(c, scales) - 128.0, 6.0)
        q_d = smaller(_coarse_quotients(d, scales) - 128.0, 6.0)
    elif IS_SIMPLE:
        q_a, q_b, q_c, q_d = _exact_quotients(a, b, c, d, divisors, scales, True)
    else:
        a, b, c, d = a * factor, b * factor, c * factor, d * factor
        q_a, q_b, q_c, q_d = _exact_quotients(a, b, c, d, divisors * factor, scales * factor, False)
    return _on_grid(a, q_a, scales), _on_grid(b, q_b, scales), _on_grid(c, q_c, scales), _on_grid(d, q_d, scales)


@triton.jit
def _on_grid(x, quotients, scales):
    """The nearest E2M1 value of each quotient in [0, 7), times its scale, with the sign of x."""
    # A power of two times 2^22 leaves one mantissa bit.
    power = _power_of_two(quotients, 1.0)
    magnitudes = tl.fma(power, -(2.0**22), tl.fma(power, 2.0**22, quotients)) * scales
    return from_bits(to_bits(magnitudes) | (to_bits(x) & SIGN))


@triton.jit
def encode(a, b, c, d, scales, factor, IS_SIMPLE: tl.constexpr, IS_NARROW: tl.constexpr, TILE: tl.constexpr):
    """Signed codes of quarters under positive scales [TILE], eight to an int32: [TILE, 2]. As for `fake_quant`."""
    scales = scales[:, None]
    offset: tl.constexpr = 128.0 if IS_SIMPLE and IS_NARROW else 0.0
    if IS_SIMPLE and IS_NARROW:
        q_a, q_b = _coarse_quotients(a, scales), _coarse_quotients(b, scales)
        q_c, q_d = _coarse_quotients(c, scales), _coarse_quotients(d, scales)
    elif IS_SIMPLE:
        q_a, q_b, q_c, q_d = _exact_quotients(a, b, c, d, scales, scales, True)
    else:
        a, b, c, d = a * factor, b * factor, c * factor, d * factor
        q_a, q_b, q_c, q_d = _exact_quotients(a, b, c, d, scales * factor, scales * factor, False)
    first = _pack(a, b, _codes(q_a, offset), _codes(q_b, offset), IS_NARROW, TILE)
    second = _pack(c, d, _codes(q_c, offset), _codes(q_d, offset), IS_NARROW, TILE)
    return tl.join(first, second)


@triton.jit
def _codes(quotients, OFFSET: tl.constexpr):
    """Bits of 2^23 + code, 0 to 7, of each OFFSET + quotient.

    The code is the least of 2q, 2 + q, 4 + q / 2 and 7, each rounded to an integer, ties to even, which adding 2^23 does.
    """
    below_2 = to_bits(tl.fma(quotients, 2.0, 2.0**23 - 2 * OFFSET))
    below_4 = to_bits(quotients + (2.0**23 + 2 - OFFSET))
    below_6 = to_bits(tl.fma(quotients, 0.5, 2.0**23 + 4 - OFFSET / 2))
    return tl.minimum(tl.minimum(below_2, below_4), tl.minimum(below_6, 0x4B000007))


@triton.jit
def _pack(a, b, code_a, code_b, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """An int32 [TILE] of eight codes with the signs of a and b, two quarters that are neighbours."""
    c0, c1, c2, c3, c4, c5, c6, c7 = _columns(code_a, code_b, IS_INTERLEAVED, TILE)
    words = (c7 << 4) + c6
    words = (words << 4) + c5
    words = (words << 4) + c4
    words = (words << 4) + c3
    words = (words << 4) + c2
    words = (words << 4) + c1
    # Each code came with the bits of 2^23, of whose sum over the eight places this is the negative.
    words = (words << 4) + c0 + 0x5000000
    s0, s1, s2, s3, s4, s5, s6, s7 = _columns(_top_four_bits(a), _top_four_bits(b), IS_INTERLEAVED, TILE)
    signs = (s7 << 4) | s6
    signs = (signs << 4) | s5
    signs = (signs << 4) | s4
    signs = (signs << 4) | s3
    signs = (signs << 4) | s2
    signs = (signs << 4) | s1
    signs = (signs << 4) | s0
    return (words & 0x77777777) | (signs & -0x77777778)


@triton.jit
def _top_four_bits(x):
    """Sign and three bits that do not matter: all four shift into place in one instruction."""
    return (x.to(tl.uint32, bitcast=True) >> 28).to(tl.int32, bitcast=True)


@triton.jit
def _columns(a, b, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """Two quarters [TILE, 4] as eight times [TILE], in the order of the elements."""
    a02, a13 = tl.split(tl.reshape(a, [TILE, 2, 2]))
    b02, b13 = tl.split(tl.reshape(b, [TILE, 2, 2]))
    a0, a2 = tl.split(a02)
    a1, a3 = tl.split(a13)
    b0, b2 = tl.split(b02)
    b1, b3 = tl.split(b13)
    if IS_INTERLEAVED:
        columns = a0, b0, a1, b1, a2, b2, a3, b3
    else:
        columns = a0, a1, a2, a3, b0, b1, b2, b3
    return columns


@triton.jit
def decode(words, scales):
    """float32 [TILE, 8] of TILE int32, each of eight codes under one decode scale."""
    columns = tl.arange(0, 8)[None, :]
    # Sign to bit 31, magnitude to bits 24..22, as the arithmetic shift leaves them; 2^126 makes up for the exponent bias.
    bits = ((words[:, None] << (28 - 4 * columns)) >> 6) & -0x7E400000
    return (from_bits(bits) * 2.0**126) * scales[:, None]
