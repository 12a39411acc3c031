"""NVFP4 arithmetic for Triton kernels: that of `reference`, bit for bit, on TILE blocks at a time.

Layout. A quarter is a tensor [TILE, 4] with 4 of the 16 elements of each of TILE blocks. Four quarters a, b, c, d hold whole blocks,
and a thread holds all elements of a block. float32 quarters hold elements 0-3, 4-7, 8-11, 12-15. Quarters of a 16-bit dtype are
interleaved, IS_INTERLEAVED: 0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15. An octet is 8 consecutive elements: two quarters a, b.

Where the plain formula costs bandwidth, another that gives the same bits is used:

- Division. The IEEE quotient a / b is a * r, corrected once by fused multiply-adds, where r is 1 / b rounded once (Markstein's
  theorem). It holds while nothing over- or underflows; near the ends of fp32, a and b are multiplied by a power of two first.
- IS_SIMPLE, a path for a global scale that is a power of two far from the ends of fp32. Most steps are exact there.
- IS_NARROW, a path for values of a 16-bit dtype. They have at most 11 significant bits, so approximate quotients do.
- Rounding. Adding 2^22 times the power of two of a number, and subtracting it again, rounds the number to one mantissa bit, ties to
  even: E2M1. 2^20 leaves three bits: E4M3. No E4M3 instruction is used, since compute capability 8.0 has none.

Kernels are compiled with `enable_fp_fusion=False`: contracting a product and a sum into one rounding changes bits. `tl.fma` stands
where one rounding is wanted.
"""

import triton
import triton.language as tl

SIGN = tl.constexpr(-(2**31))
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def load_quarters(x_ptr, is_row, TILE: tl.constexpr, stride=1):
    """TILE blocks, each so many after the last, as four quarters, in the dtype of x_ptr or as pairs; `widen` makes float32 of them."""
    rows = tl.arange(0, TILE)[:, None]
    columns = tl.arange(0, 4)[None, :]
    mask = is_row[:, None]
    if x_ptr.dtype.element_ty == tl.float32:
        x_ptr += rows * (16 * stride) + columns
        a = tl.load(x_ptr, mask=mask, other=0.0)
        b = tl.load(x_ptr + 4, mask=mask, other=0.0)
        c = tl.load(x_ptr + 8, mask=mask, other=0.0)
        d = tl.load(x_ptr + 12, mask=mask, other=0.0)
    else:
        # 16-bit values are loaded in pairs, as int32. b and d are a and c again: `widen` takes their other halves.
        pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + rows * (8 * stride) + columns
        a = tl.load(pairs_ptr, mask=mask, other=0)
        c = tl.load(pairs_ptr + 4, mask=mask, other=0)
        b, d = a, c
    return a, b, c, d


@triton.jit
def load_octets(x_ptr, is_row, TILE: tl.constexpr):
    """`load_quarters` for TILE consecutive octets."""
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
    """Loaded quarters as float32. -0.0 becomes 0.0, so that zeros of either sign have code 0."""
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
    """Whether a pointer is to a 16-bit dtype."""
    return x_ptr.dtype.element_ty != tl.float32


@triton.jit
def store_quarters(out_ptr, a, b, c, d, is_row, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """Write the rows of quarters that exist, rounded to the dtype of out_ptr. IS_INTERLEAVED is about the quarters, not out_ptr."""
    first, second = tl.join(a, b), tl.join(c, d)
    if not IS_INTERLEAVED:
        first, second = tl.permute(first, (0, 2, 1)), tl.permute(second, (0, 2, 1))
    out_ptr += tl.arange(0, TILE)[:, None] * 16 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr, tl.reshape(first, [TILE, 8]).to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(out_ptr + 8, tl.reshape(second, [TILE, 8]).to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def store_octets(out_ptr, a, b, is_row, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """`store_quarters` for octets."""
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
    """The minimum, NaN if either is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """The maximum, NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_simple(scale):
    """Whether a positive global scale is a power of two far from the ends of fp32."""
    return (scale > 2.0**-60) & (scale < 2.0**60) & ((to_bits(scale) & 0x7FFFFF) == 0)


@triton.jit
def factor_of(scale):
    """A power of two by which to multiply dividends and divisors, so that a global scale and 448 times it are off the ends of fp32.

    The quotient stays the same. A dividend that over- or underflows has the code 7 or 0 in either case.
    """
    return tl.where(scale < 2.0**-50, 2.0**100, tl.where(scale > 2.0**50, 2.0**-100, 1.0))


@triton.jit
def newton_reciprocal(b):
    """1 / b by three Newton steps from a guess within 6 %, within an ulp. If b has at most 4 significant bits it is rounded once."""
    guess = from_bits(0x7EF311C3 - to_bits(b))
    guess = tl.fma(tl.fma(-b, guess, 1.0), guess, guess)
    guess = tl.fma(tl.fma(-b, guess, 1.0), guess, guess)
    return tl.fma(tl.fma(-b, guess, 1.0), guess, guess)


@triton.jit
def reciprocal(b):
    """1 / b rounded once, for b from 2^-125 to 2^125.5."""
    guess = newton_reciprocal(b)
    guess = tl.fma(tl.fma(-b, guess, 1.0), guess, guess)
    # Newton's steps give one significand wrong, an ulp low: that of all ones.
    return from_bits(to_bits(guess) + tl.where(((to_bits(b) + 1) & 0x7FFFFF) == 0, 1, 0))


@triton.jit
def divide(a, b, one_over_b):
    """a / b rounded once, given 1 / b rounded once. a must be finite, and a * 2^-24 must not underflow where bits matter."""
    quotient = a * one_over_b
    return tl.fma(tl.fma(quotient, -b, a), one_over_b, quotient)


@triton.jit
def block_amax(a, b, c, d):
    """Largest magnitude of each block, [TILE]; NaN if the block holds one."""
    return tl.reduce(larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d))), 1, larger)


@triton.jit
def _power_of_two(magnitude, LOWEST: tl.constexpr):
    """The largest power of two at or below each magnitude, at least LOWEST."""
    return tl.maximum(from_bits(to_bits(magnitude) & EXPONENT), LOWEST)


@triton.jit
def round_e4m3(t):
    """The nearest E4M3 value of each t in [0, 448], ties to even, as float32; NaN stays NaN."""
    power = _power_of_two(t, 2.0**-6)
    return tl.fma(power, -(2.0**20), tl.fma(power, 2.0**20, t))


@triton.jit
def e4m3_byte(value):
    """The byte of each float32 that is an E4M3 value >= 0 or NaN."""
    # 2^-120 is the difference of the exponent biases, 7 and 127. It makes subnormals of fp32 of subnormals of E4M3.
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
    """|x| / divisor of quarters, rounded once and at most an ulp above 6. Scales and divisors are [TILE, 1].

    A divisor is the scale, but 1 for a scale of 0.
    """
    one_over = newton_reciprocal(divisors) if IS_SIMPLE else reciprocal(divisors)
    # Saturating before the division keeps Inf out of it. The limit is rounded, hence the ulp.
    limit = 6.0 * scales
    a = divide(smaller(tl.abs(a), limit), divisors, one_over)
    b = divide(smaller(tl.abs(b), limit), divisors, one_over)
    c = divide(smaller(tl.abs(c), limit), divisors, one_over)
    d = divide(smaller(tl.abs(d), limit), divisors, one_over)
    return a, b, c, d


@triton.jit
def _coarse_quotients(x, scales):
    """128 + |x| / scale, rounded to a multiple of 2^-16, where x is narrow and scale an E4M3 value times a power of two.

    Such a quotient is a tie of two codes, and then exact here, or more than 2^-14 away from all ties.
    """
    return tl.fma(tl.abs(x), newton_reciprocal(scales), 128.0)


@triton.jit
def fake_quant(a, b, c, d, divisors, scales, factor, IS_SIMPLE: tl.constexpr, IS_NARROW: tl.constexpr):
    """Quarters, encoded and decoded under scales [TILE].

    Divisors are the scales, but 1 for a scale of 0. factor is `factor_of` the global scale or of each scale, unused if IS_SIMPLE.
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
    # Below 1 the grid is as fine as between 1 and 2.
    power = _power_of_two(quotients, 1.0)
    magnitudes = tl.fma(power, -(2.0**22), tl.fma(power, 2.0**22, quotients)) * scales
    return from_bits(to_bits(magnitudes) | (to_bits(x) & SIGN))


@triton.jit
def encode(a, b, c, d, scales, factor, IS_SIMPLE: tl.constexpr, IS_NARROW: tl.constexpr, TILE: tl.constexpr):
    """Signed codes of quarters under positive scales [TILE], eight to an int32: [TILE, 2]. factor is as in `fake_quant`."""
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
    """The bits of the float 2^23 + code, the code being 0 to 7, of each quotient q, given as OFFSET + q.

    The code is the least of 2q, 2 + q, 4 + q / 2 and 7, each rounded to an integer, ties to even. Adding 2^23 rounds so.
    """
    below_2 = to_bits(tl.fma(quotients, 2.0, 2.0**23 - 2 * OFFSET))
    below_4 = to_bits(quotients + (2.0**23 + 2 - OFFSET))
    below_6 = to_bits(tl.fma(quotients, 0.5, 2.0**23 + 4 - OFFSET / 2))
    return tl.minimum(tl.minimum(below_2, below_4), tl.minimum(below_6, 0x4B000007))


@triton.jit
def _pack(a, b, code_a, code_b, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """An int32 [TILE] of the eight codes of an octet a, b, with its signs. Codes come as `_codes` leaves them."""
    c0, c1, c2, c3, c4, c5, c6, c7 = split_octet(code_a, code_b, IS_INTERLEAVED, TILE)
    words = (c7 << 4) + c6
    words = (words << 4) + c5
    words = (words << 4) + c4
    words = (words << 4) + c3
    words = (words << 4) + c2
    words = (words << 4) + c1
    # 0x5000000 is minus the sum, over the eight places, of the bits of 2^23 that each code came with.
    words = (words << 4) + c0 + 0x5000000
    s0, s1, s2, s3, s4, s5, s6, s7 = split_octet(_top_four_bits(a), _top_four_bits(b), IS_INTERLEAVED, TILE)
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
    """The sign and three bits that `_pack` masks out: one shift, where the sign alone would take a shift and a mask."""
    return (x.to(tl.uint32, bitcast=True) >> 28).to(tl.int32, bitcast=True)


@triton.jit
def split_octet(a, b, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """An octet as eight tensors [TILE], in the order of its elements."""
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
    """float32 [TILE, 8] of TILE int32 of eight codes each, under one decode scale each."""
    columns = tl.arange(0, 8)[None, :]
    # The arithmetic shift leaves the sign in bit 31 and the magnitude in bits 24 to 22: an fp32 value 2^126 times too small.
    bits = ((words[:, None] << (28 - 4 * columns)) >> 6) & -0x7E400000
    return (from_bits(bits) * 2.0**126) * scales[:, None]


@triton.jit
def codes_of_products(x, factors):
    """Codes of |x| * factor, the product rounded once, as `_codes` leaves them. factors are [TILE, 1], and not NaN."""
    return _codes(tl.abs(x) * factors, 0.0)


@triton.jit
def pack_codes(a, b, c, d, code_a, code_b, code_c, code_d, IS_INTERLEAVED: tl.constexpr, TILE: tl.constexpr):
    """Codes of quarters with the signs of the quarters, eight to an int32: [TILE, 2]."""
    return tl.join(_pack(a, b, code_a, code_b, IS_INTERLEAVED, TILE), _pack(c, d, code_c, code_d, IS_INTERLEAVED, TILE))


@triton.jit
def decode_codes(x, codes, scales):
    """value(code) * scale with the sign of x, of codes as `_codes` leaves them. scales are [TILE, 1]."""
    # Shifted up, a code is an fp32 value 2^126 times too small, and the bits of 2^23 are gone.
    return from_bits((codes << 22) | (to_bits(x) & SIGN)) * 2.0**126 * scales
