"""The search for the steps of a fitted rule in Triton kernels: `reference.choose_steps`, bit for bit.

A program takes blocks of the same columns, so that they share a Hessian, which stays in registers: a thread has the 136 numbers of
its lower triangle beside the 16 values of a block. It is bound by arithmetic, about 330 instructions for a candidate.
"""

# Tuples grow in loops that are unrolled.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from nvfp4_train.kernels import triton_arithmetic as arithmetic
from nvfp4_train.kernels import triton_scales as scale_arithmetic


@triton.jit
def search(
    x_ptr, steps_ptr, hessian_ptr, s2, num_rows, num_columns, blocks_per_row, STEPS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Choose the steps of num_rows x num_columns blocks. The pointers are to the first of them, in rows of blocks_per_row blocks."""
    is_narrow: tl.constexpr = arithmetic.is_narrow(x_ptr)
    for column in range(num_columns):
        triangle = _load_triangle(hessian_ptr + column * 256)
        for start in range(0, num_rows, TILE):
            rows = start + tl.arange(0, TILE)
            is_row = rows < num_rows
            block_ptr = x_ptr + start * blocks_per_row * 16 + column * 16
            a, b, c, d = arithmetic.load_quarters(block_ptr, is_row, TILE, blocks_per_row)
            a, b, c, d = arithmetic.widen(a, b, c, d, x_ptr.dtype.element_ty)
            if arithmetic.is_simple(s2):
                first, a, b, c, d = scale_arithmetic.in_units_of_s2(a, b, c, d, s2, True)
            else:
                first, a, b, c, d = scale_arithmetic.in_units_of_s2(a, b, c, d, s2, False)
            a, b, c, d = _round(a, first), _round(b, first), _round(c, first), _round(d, first)
            x = arithmetic.split_octet(a, b, is_narrow, TILE) + arithmetic.split_octet(c, d, is_narrow, TILE)
            best = scale_arithmetic.neighbour(first, STEPS[0])
            least = tl.full([TILE], float("inf"), tl.float32)
            for index in range(len(STEPS)):
                scales = scale_arithmetic.neighbour(first, STEPS[0] - index)
                error = _output_error(x, scales, triangle)
                is_better = error < least
                best = tl.where(is_better, scales, best)
                least = tl.where(is_better, error, least)
            # The inverse of `neighbour`, and 0 for NaN.
            steps = (arithmetic.to_bits(best) - arithmetic.to_bits(first)) >> 20
            steps = tl.where(first <= scale_arithmetic.E4M3_MAX, steps, 0)
            tl.store(steps_ptr + rows * blocks_per_row + column, steps.to(tl.int8), mask=is_row)


@triton.jit
def _load_triangle(hessian_ptr):
    """H_ij, and twice that off the diagonal, of the lower triangle, row by row: 136 numbers of 12 significant bits."""
    triangle = ()
    for i in tl.static_range(16):
        for j in tl.static_range(i + 1):
            bits = arithmetic.to_bits(tl.load(hessian_ptr + (16 * i + j))) & -0x1000
            triangle += (arithmetic.from_bits(bits) * (1.0 if i == j else 2.0),)
    return triangle


@triton.jit
def _round(x, scales):
    """`reference.round_for_search` of a quarter."""
    limit = (7.0 * scales)[:, None]
    offset = (1.5 * 2.0**14 * arithmetic.from_bits(arithmetic.to_bits(scales) & arithmetic.EXPONENT))[:, None]
    return (tl.minimum(tl.maximum(x, -limit), limit) + offset) - offset


@triton.jit
def _output_error(x, scales, triangle):
    """`reference.output_error` of blocks, given as 16 tensors [TILE]."""
    one_over = arithmetic.newton_reciprocal(scales)
    d = ()
    for i in tl.static_range(16):
        d += (_error(x[i], scales, one_over),)
    terms = ()
    for i in tl.static_range(16):
        t = triangle[i * (i + 1) // 2] * d[0]
        for j in tl.static_range(1, i + 1):
            # The product is exact, so this is a product and a sum.
            t = tl.fma(triangle[i * (i + 1) // 2 + j], d[j], t)
        terms += (t * d[i],)
    first = _sum_of_eight(terms[0:8])
    second = _sum_of_eight(terms[8:16])
    return first + second


@triton.jit
def _sum_of_eight(terms):
    first = (terms[0] + terms[1]) + (terms[2] + terms[3])
    second = (terms[4] + terms[5]) + (terms[6] + terms[7])
    return first + second


@triton.jit
def _error(x, scales, one_over):
    """What encoding and decoding x under its scales adds to it.

    Quotients are multiples of 2^-16 as in `arithmetic._coarse_quotients`: here, too, one that is no tie is more than 2^-12 from all
    ties, since x and products of a scale and a tie are multiples of the unit that x was rounded to.
    """
    quotients = tl.fma(x, one_over, 192.0) - 192.0
    # Below 1 the grid is as fine as between 1 and 2. Rounding is that of `arithmetic`, but of numbers with a sign.
    power = tl.maximum(arithmetic.from_bits(arithmetic.to_bits(quotients) & arithmetic.EXPONENT), 1.0)
    values = tl.fma(power, -1.5 * 2.0**22, tl.fma(power, 1.5 * 2.0**22, quotients))
    return tl.fma(tl.minimum(tl.maximum(values, -6.0), 6.0), scales, -x)
