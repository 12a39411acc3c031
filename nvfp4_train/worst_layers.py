"""The layers that quantization harms most, each with what its numbers suggest to do about it, for dashboards and reports."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from nvfp4_train.metrics import SQNR_STATISTIC
from nvfp4_train.quant.layer_names import layer_place
from nvfp4_train.quant.policy import sibling_set

CLIPPED = 1e-3
"""Share of inputs: calibration leaves room for twice the largest one, so that hardly any should be clipped."""
AT_FLOOR = 0.01
"""Share of blocks whose scale is the smallest one, below which nothing can adapt to them."""
SMALL_AMONG_SIBLINGS = 0.125
"""Amax of a weight over that of its group: three of the fifteen bits that the range of E4M3 has are lost."""
BELOW_ITS_KIND = 1.5
"""dB: 1.4 times the noise of the median layer of its kind, for as much signal."""
OSCILLATING = 0.02
"""Share of weights: as where Nagel et al. (arXiv 2203.11086) begin to freeze them."""
FLIPPING = 0.1
"""Share of codes that changed from one look to the next."""


@dataclass(frozen=True)
class WorstLayer:
    layer: str
    """A quantized parameter's name without `.weight`."""
    values: Mapping[str, float]
    """Its statistics by name."""
    hint: str
    """One line: what stands out, and the option to change."""


def worst_layers(rows: Mapping[str, Mapping[str, float]], number: int = 10) -> list[WorstLayer]:
    """The layers of lowest SQNR, worst first, of statistics by layer and name; layers without an SQNR are passed over."""
    # Of a weight that is all zeros it is NaN, which equals nothing.
    known = {name: of_layer[SQNR_STATISTIC] for name, of_layer in rows.items() if SQNR_STATISTIC in of_layer}
    sqnr = {name: value for name, value in known.items() if value == value}
    by_kind: dict[str, list[float]] = {}
    for name, value in sqnr.items():
        by_kind.setdefault(layer_place(name).kind, []).append(value)
    worst = sorted(sqnr, key=lambda name: sqnr[name])[:number]
    return [
        WorstLayer(
            name, rows[name], _hint(name, rows[name], sqnr[name] - median(by_kind[layer_place(name).kind]), _fused(name, rows))
        )
        for name in worst
    ]


def _fused(name: str, names: Iterable[str]) -> list[str]:
    """A layer and those that must stay in bf16 with it, since serving engines take all of them for quantized, or none."""
    parent = name.rpartition(".")[0]
    if parent.rpartition(".")[2] == "experts":
        return [other for other in names if other.rpartition(".")[0] == parent]
    together = sibling_set(name)
    return [other for other in names if other in together]


def _hint(name: str, values: Mapping[str, float], above_its_kind: float, fused: list[str]) -> str:
    """The first that applies: what harms most, and has a remedy of its own, comes first. A statistic that is missing never applies."""
    keep = f"keep in bf16: quant.exclude=[{','.join(fused)}]"
    if (clipped := values.get("input_clipped_share", 0)) >= CLIPPED:
        return f"{clipped:.2%} of its inputs are clipped: raise quant.input_headroom"
    if (at_floor := values.get("scale_at_floor_share", 0)) >= AT_FLOOR:
        blocks = f"{at_floor:.1%} of its blocks have the smallest scale"
        if len(fused) > 1 and values.get("sibling_amax_ratio", 1) <= SMALL_AMONG_SIBLINGS:
            ratio = values["sibling_amax_ratio"]
            return f"{blocks}: its amax is {ratio:.2g} of that of its siblings, whose global scale it shares; {keep}"
        return f"{blocks}: few large weights set the global scale; {keep}"
    if values.get("sibling_amax_ratio", 1) <= SMALL_AMONG_SIBLINGS:
        ratio = values["sibling_amax_ratio"]
        return f"its amax is {ratio:.2g} of that of its siblings, whose global scale it shares; {keep}"
    if -math.inf < above_its_kind <= -BELOW_ITS_KIND:
        return f"{-above_its_kind:.1f} dB below the median of its kind: {keep}"
    if (oscillating := values.get("oscillation_rate", 0)) >= OSCILLATING:
        return (
            f"{oscillating:.1%} of its weights oscillate between two codes: lower optim.lr, or try callbacks.oscillation.action"
        )
    if (flipping := values.get("flip_rate", 0)) >= FLIPPING:
        return f"{flipping:.1%} of its codes changed since the last look: lower optim.lr"
    if values.get("other_scale_share") == 0:
        return "all its block scales are those of the max rule: try quant.rule=four_over_six, or hessian"
    return "nothing stands out: it is as the others of its kind"
