"""Numbers as a person reads them."""

import math
from typing import NamedTuple

from nvfp4_train.sequence_metrics import Interval

NONE = "-"
PERCENT, POINTS = " %", " points"


class Statistic(NamedTuple):
    """How a statistic of `quant.statistics` is shown."""

    label: str
    unit: str = ""
    """`%` for a share, which is multiplied by 100."""

    @property
    def full_label(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label


STATISTICS = {
    "sqnr_db": Statistic("SQNR", "dB"),
    "underflow_share": Statistic("weights that underflow to 0", "%"),
    "zero_share": Statistic("weights with code 0", "%"),
    "scale_at_floor_share": Statistic("blocks at the smallest scale", "%"),
    "scale_below_floor_share": Statistic("blocks below the smallest scale", "%"),
    "scale_saturated_share": Statistic("blocks at scale 448", "%"),
    "input_clipped_share": Statistic("inputs that are clipped", "%"),
    "flip_rate": Statistic("codes that changed since the last look", "%"),
    "oscillation_rate": Statistic("weights that oscillate", "%"),
    "oscillating_share": Statistic("weights that were reset or frozen in the last window", "%"),
    "frozen_share": Statistic("weights that are frozen", "%"),
    "edge_share": Statistic("weights within 1 % of a rounding edge", "%"),
    "other_scale_share": Statistic("blocks whose rule chose another scale than max", "%"),
    "change_ratio": Statistic("change of served values over change of masters"),
    "sibling_amax_ratio": Statistic("amax over that of the siblings"),
    "global_amax": Statistic("global amax"),
    "global_scale_exponent": Statistic("exponent of the global scale"),
    "global_scale_changes": Statistic("changes of the global scale"),
    "scale_min": Statistic("smallest block scale"),
    "scale_median": Statistic("median block scale"),
    "scale_max": Statistic("largest block scale"),
}
"""By name, those that say most first."""


def statistic(name: str) -> Statistic:
    return STATISTICS.get(name, Statistic(name, "%" if name.endswith(("_share", "_rate")) else ""))


def scaled(name: str, value: float) -> float:
    """The value of a statistic in its unit."""
    return value * 100 if statistic(name).unit == "%" else value


def number(value: float | None) -> str:
    """About four digits."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    if size >= 1000 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.2e}" if size < 0.001 else f"{value:.{3 - math.floor(math.log10(size))}f}"


def with_interval(found: Interval | None, *, percent: bool = False, sign: bool = False) -> str:
    """A mean and its interval, to two digits of the interval's width, or so many that a bound beside 0 shows on which side it is.

    `sign` is of differences; those of percentages are in points. Without bounds it says so: of a single sequence, or where a value is
    not finite.
    """
    if found is None:
        return NONE
    mean, low, high = (100 * value for value in found) if percent else found
    if not math.isfinite(high - low):
        return f"{number(mean)} (no interval)"
    width = high - low
    digits = 2 if percent else 4
    if width > 0:
        nearest = min(abs(low), abs(high)) or width
        needed = max(1 - math.floor(math.log10(width)), -math.floor(math.log10(nearest)))
        digits = min(max(needed, 1 if percent else 3), 8)
    form = f"{'+' if sign else ''}z.{digits}f"
    unit = (POINTS if sign else PERCENT) if percent else ""
    # z: no -0.
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]{unit}"


def significance(found: Interval | None) -> str:
    if found is None:
        return NONE
    return "significant" if found.excludes_zero else "not significant"


def in_bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} bytes"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
