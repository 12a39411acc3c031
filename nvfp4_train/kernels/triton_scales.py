"""Global, block and decode scales for Triton kernels: those of `reference`, bit for bit, on TILE blocks at a time."""

import triton
import triton.language as tl

from nvfp4_train.kernels import reference
from nvfp4_train.kernels import triton_arithmetic as arithmetic

E4M3_MIN = tl.constexpr(reference.E4M3_MIN)
E4M3_MAX = tl.constexpr(reference.E4M3_MAX)
SMALLEST_GLOBAL_AMAX = tl.constexpr(reference.SMALLEST_GLOBAL_AMAX)
MANTISSA = tl.constexpr(0x7FFFFF)


@triton.jit
def global_scales(amax, DIVISOR: tl.constexpr, IS_POW2: tl.constexpr):
    """`reference.global_scale` of each amax [TILE]. DIVISOR is 6 * rule.largest."""
    divisor = tl.full(amax.shape, DIVISOR, tl.float32)
    if IS_POW2:
        bits, divisor_bits = arithmetic.to_bits(amax), arithmetic.to_bits(divisor)
        is_above = (bits & MANTISSA) > (divisor_bits & MANTISSA)
        exponent = (bits >> 23) - (divisor_bits >> 23) + 127 + is_above.to(tl.int32)
        scales = arithmetic.from_bits(tl.minimum(tl.maximum(exponent, 1), 254) << 23)
        scales = tl.where(bits < arithmetic.EXPONENT, scales, amax)
    else:
        scales = tl.div_rn(amax, divisor)
    return tl.where(amax < SMALLEST_GLOBAL_AMAX, 1.0, scales)


@triton.jit
def block_scales(
    a, b, c, d, s2, steps,
    FACTORS: tl.constexpr, STEPS: tl.constexpr, IS_SIMPLE: tl.constexpr, IS_NARROW: tl.constexpr,
):  # fmt: skip
    """`reference.block_scales` of quarters, under the factors and steps of a rule, or a fitted rule's steps [TILE] if not None.

    IS_NARROW: the quarters were of a 16-bit dtype.
    """
    ratio = _ratio(arithmetic.block_amax(a, b, c, d), s2, IS_SIMPLE)
    first = _candidate(ratio, FACTORS[0])
    scales = first
    if steps is not None:
        scales = _or_nan(neighbour(first, steps), first)
    elif len(FACTORS) * len(STEPS) > 1:
        if len(STEPS) > 1:
            scales = _or_nan(neighbour(first, STEPS[0]), first)
        a, b = _in_units_of(s2, a, IS_SIMPLE), _in_units_of(s2, b, IS_SIMPLE)
        c, d = _in_units_of(s2, c, IS_SIMPLE), _in_units_of(s2, d, IS_SIMPLE)
        least = _squared_error(a, b, c, d, scales, IS_SIMPLE and IS_NARROW, IS_NARROW)
        # A loop, in which comparisons pick the factor: unrolled, a rule of many candidates takes half a minute to compile.
        for index in range(1, len(FACTORS) * len(STEPS)):
            if len(STEPS) > 1:
                candidate = neighbour(first, STEPS[0] - index)
            else:
                factor = FACTORS[1]
                for other in tl.static_range(2, len(FACTORS)):
                    factor = tl.where(index == other, FACTORS[other], factor)
                candidate = _candidate(ratio, factor)
            error = _squared_error(a, b, c, d, candidate, IS_SIMPLE and IS_NARROW, IS_NARROW)
            is_better = error < least
            scales = tl.where(is_better, candidate, scales)
            least = tl.where(is_better, error, least)
    return scales


@triton.jit
def _ratio(amax, s2, IS_SIMPLE: tl.constexpr):
    """amax / 6 / s2, rounded as `reference.block_scales` rounds it, for results from 2^-10 to 2^13, or NaN.

    Smaller results are below 2^-10 and larger ones, Inf included, above 2^13. That is enough: factors are from 1/16 to 16, so
    candidates of either kind end at a limit, 2^-6 or 448.
    """
    if IS_SIMPLE:
        # The limit keeps Inf out of the division.
        ratio = arithmetic.divide(arithmetic.smaller(amax, 2.0**20 * s2), 6.0, 1.0 / 6.0) * _inverse(s2)
    else:
        factor = arithmetic.factor_of(s2)
        moved = s2 * factor
        amax = arithmetic.smaller(amax * factor, 2.0**20 * moved)
        # A subnormal amax / 6 is rounded to a multiple of 2^-149, which is 2^-49 here: a sum with 2^-26 is rounded so.
        offset = tl.where(amax < tl.where(factor > 1.0, 6 * 2.0**-26, 0.0), 2.0**-26, 0.0)
        sixth = tl.fma(amax, 1.0 / 6.0, offset)
        # Divided as in `divide`, but the product is rounded by itself, so that at a tie it is exactly half a unit.
        sixth = (tl.fma(sixth - offset, -6.0, amax) * (1.0 / 6.0) + sixth) - offset
        ratio = arithmetic.divide(sixth, moved, arithmetic.reciprocal(moved))
    return ratio


@triton.jit
def max_rule(amax, s2):
    """amax / 6 / s2 of each block amax [TILE], see `_ratio`, and the block scale under the rule max."""
    ratio = _ratio(amax, s2, False)
    return ratio, _candidate(ratio, 1.0)


@triton.jit
def in_units_of_s2(a, b, c, d, s2, IS_SIMPLE: tl.constexpr):
    """The block scales of quarters under the rule max, [TILE], and the quarters in units of s2."""
    scales = _candidate(_ratio(arithmetic.block_amax(a, b, c, d), s2, IS_SIMPLE), 1.0)
    a, b = _in_units_of(s2, a, IS_SIMPLE), _in_units_of(s2, b, IS_SIMPLE)
    c, d = _in_units_of(s2, c, IS_SIMPLE), _in_units_of(s2, d, IS_SIMPLE)
    return scales, a, b, c, d


@triton.jit
def _candidate(ratio, factor):
    return arithmetic.round_e4m3(arithmetic.smaller(arithmetic.larger(ratio * factor, E4M3_MIN), E4M3_MAX))


@triton.jit
def load_steps(steps_ptr, offsets, is_row):
    """Steps [TILE] of a fitted rule as int32, or None where there is no pointer."""
    steps = None
    if steps_ptr is not None:
        steps = tl.load(steps_ptr + offsets, mask=is_row, other=0).to(tl.int32)
    return steps


@triton.jit
def neighbour(scales, steps):
    """`reference.neighbour` of block scales [TILE] but NaN, of which it is anything: see `_or_nan`."""
    # Neighbouring E4M3 values from 2^-6 on are 2^20 apart in the bits of float32.
    moved = arithmetic.from_bits(arithmetic.to_bits(scales) + (steps << 20))
    return tl.minimum(tl.maximum(moved, E4M3_MIN), E4M3_MAX)


@triton.jit
def _or_nan(values, scales):
    """The values, but NaN where the block scales are NaN."""
    return tl.where(scales <= E4M3_MAX, values, float("nan"))


@triton.jit
def _inverse(s2):
    """1 / s2 of a power of two amid the range of fp32: exact."""
    return arithmetic.from_bits(0x7F000000 - arithmetic.to_bits(s2))


@triton.jit
def _in_units_of(s2, x, IS_SIMPLE: tl.constexpr):
    """x / s2, rounded once, subnormal and infinite quotients included."""
    return x * _inverse(s2) if IS_SIMPLE else tl.div_rn(x, s2)


@triton.jit
def _squared_error(a, b, c, d, scales, IS_NARROW: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """`reference.squared_error` of quarters in units of s2, [TILE].

    IS_NARROW: their values have at most 11 significant bits. IS_INTERLEAVED: their elements are in the order of a 16-bit dtype.
    """
    # Block scales alone: E4M3 values, so this is the simple path whatever s2 is.
    a_hat, b_hat, c_hat, d_hat = arithmetic.fake_quant(a, b, c, d, scales, scales, 1.0, True, IS_NARROW)
    a, b, c, d = a_hat - a, b_hat - b, c_hat - c, d_hat - d
    a, b, c, d = a * a, b * b, c * c, d * d
    if IS_INTERLEAVED:
        first, second = _sum_of_four(a + b), _sum_of_four(c + d)
    else:
        first, second = _sum_of_four(a) + _sum_of_four(b), _sum_of_four(c) + _sum_of_four(d)
    return first + second


@triton.jit
def _sum_of_four(x):
    """(x0 + x1) + (x2 + x3) of the columns of [TILE, 4]: [TILE]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    first, second = tl.split(even + odd)
    return first + second


@triton.jit
def _sixth(amax, IS_PRODUCT: tl.constexpr):
    """amax / 6: by an IEEE division, or by the product with 1 / 6 rounded that torch makes of it on CUDA."""
    return amax * (1.0 / 6.0) if IS_PRODUCT else tl.div_rn(amax, 6.0)


@triton.jit
def static_scales(amax, global_amax, IS_QUANTIZED: tl.constexpr, IS_PRODUCT: tl.constexpr):
    """`reference.static_scales`."""
    scales = _sixth(amax, IS_PRODUCT)
    if IS_QUANTIZED:
        sixth = _sixth(global_amax, IS_PRODUCT)
        multiplier = arithmetic.reciprocal(tl.where(sixth <= 2.0**-24, 1.0, sixth)) * E4M3_MAX
        quantized = arithmetic.round_e4m3(arithmetic.smaller(scales * multiplier, E4M3_MAX))
        scales = quantized * arithmetic.reciprocal(multiplier)
    return scales
