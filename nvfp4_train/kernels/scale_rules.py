"""Scale rules: how a tensor's global scale and the scale of each of its blocks are chosen. Plain data, for every path alike.

The global scale is s2 = global_amax / (6 * largest), kept exact or raised to a power of two. A block's scale is the E4M3 value
nearest to factor * block_amax / 6 / s2, or a neighbour some steps away. Of several candidates a rule takes the one whose decoded
block is nearest to the block: by the sum of squares, or, where the rule is fitted, by what the layer's output loses of it. To add a
rule is to add a line to `BLOCK_SCALE_RULES`: the reference and the kernels search whatever it lists.
"""

from dataclasses import dataclass

MOST_STEPS = 8
"""A step of E4M3 is an eighth of a power of two, so this many are a factor of two."""


@dataclass(frozen=True, kw_only=True)
class BlockScaleRule:
    """The candidates for a block's scale, larger ones first: several factors, or several steps from the one factor 1."""

    factors: tuple[float, ...] = (1.0,)
    """Candidates in units of block_amax / 6 / s2, from 16 down to 1/16: of equally good scales the first is taken."""
    steps: tuple[int, ...] = (0,)
    """Candidates as E4M3 values above and below the one of factor 1: consecutive numbers, descending, within -8 to 8."""
    largest: float
    """Block scale, in units of E4M3, of the block that holds the tensor's largest magnitude, under factor 1: 128 to 448.

    Within these limits s2 and 1 / s2 are finite in fp32 for every finite amax.
    """
    is_fitted: bool = False
    """Whether the step of each block is chosen now and then, by `choose_steps`, and given to whoever needs scales in between."""

    def __post_init__(self) -> None:
        is_descending = self.factors == tuple(sorted(set(self.factors), reverse=True))
        if not self.factors or not is_descending or self.factors[0] > 16 or self.factors[-1] < 1 / 16:
            raise ValueError(f"factors must descend from at most 16 to at least 1/16, got {self.factors}")
        is_consecutive = bool(self.steps) and self.steps == tuple(range(self.steps[0], self.steps[-1] - 1, -1))
        if not is_consecutive or self.steps[0] > MOST_STEPS or self.steps[-1] < -MOST_STEPS:
            raise ValueError(f"steps must descend one by one within {-MOST_STEPS} to {MOST_STEPS}, got {self.steps}")
        if (self.is_fitted or self.steps != (0,)) and self.factors != (1.0,):
            raise ValueError(f"factors must be (1.0,) where there are steps, got {self.factors}")
        if not 128 <= self.largest <= 448:
            raise ValueError(f"largest must lie in 128 to 448, got {self.largest}")


BLOCK_SCALE_RULES: dict[str, BlockScaleRule] = {
    # The largest magnitude of a block becomes 6.
    "max": BlockScaleRule(largest=448.0),
    # It becomes 6 or 4 (Cook et al. 2025, "Four Over Six"). 256 * 1.5 is an E4M3 value; 448 * 1.5 would be above the range.
    "four_over_six": BlockScaleRule(factors=(1.5, 1.0), largest=256.0),
    # It becomes what has the least squared error, from 4 or less, 6 steps up, to 7.5, which saturates at 6. The ends are those
    # that Gaussian and heavy-tailed weights choose; 6 steps above 256 are 448.
    "mse": BlockScaleRule(steps=tuple(range(6, -3, -1)), largest=256.0),
    # It becomes what loses least of the layer's output, by the second moment of the block's inputs (a local Hessian). Where one
    # input outweighs the others, scales as low as two thirds are chosen.
    "hessian": BlockScaleRule(steps=tuple(range(6, -6, -1)), largest=256.0, is_fitted=True),
}


@dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """The rule of a tensor. Raises ValueError for a name that is not known."""

    global_scale: str = "pow2"
    """`pow2` raises s2 to a power of two, so that every reader decodes the same bits; `exact` is the quotient, rounded once."""
    block_scale: str = "max"
    """A name in `BLOCK_SCALE_RULES`."""

    def __post_init__(self) -> None:
        if self.global_scale not in ("pow2", "exact"):
            raise ValueError(f"quant.global_scale must be 'pow2' or 'exact', got {self.global_scale!r}")
        if self.block_scale not in BLOCK_SCALE_RULES:
            raise ValueError(f"quant.rule must be one of {', '.join(BLOCK_SCALE_RULES)}, got {self.block_scale!r}")

    @property
    def is_pow2(self) -> bool:
        return self.global_scale == "pow2"

    @property
    def factors(self) -> tuple[float, ...]:
        return BLOCK_SCALE_RULES[self.block_scale].factors

    @property
    def steps(self) -> tuple[int, ...]:
        return BLOCK_SCALE_RULES[self.block_scale].steps

    @property
    def largest(self) -> float:
        return BLOCK_SCALE_RULES[self.block_scale].largest

    @property
    def is_fitted(self) -> bool:
        return BLOCK_SCALE_RULES[self.block_scale].is_fitted


MAX_RULE = ScaleRule()
"""The default: power-of-two s2, and the largest magnitude of every block becomes 6."""
