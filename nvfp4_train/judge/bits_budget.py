"""Which weights to leave in bf16 for a budget of bits, and the patterns of `quant.exclude` that say so.

Divergences of weights that are quantized alone about add up, so what leaving a unit in bf16 saves is taken to be its own. The choice
is greedy: units in the order of KL saved per extra bit, each that still fits. The exact problem is a knapsack, and greedy misses its
optimum by less than the KL of one unit, which its linear relaxation shows (Dantzig, Operations Research 5, 1957).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from nvfp4_train.judge.units import UNQUANTIZED_BITS, Unit, layer_name
from nvfp4_train.quant.experts import owner_of
from nvfp4_train.quant.layer_names import layer_place


def mean_bits(units: Sequence[Unit], excluded: Collection[Unit] = ()) -> float:
    """Bits a weight, over all weights of the units, with `excluded`, which may be joined otherwise, left in bf16."""
    bits = sum(unit.bits for unit in units) + sum(unit.extra_bits for unit in excluded)
    return bits / sum(unit.num_weights for unit in units)


def check_budget(units: Sequence[Unit], bits: float) -> None:
    """Raise ValueError for a budget that no choice meets, or that needs none."""
    least = mean_bits(units)
    if not least <= bits <= UNQUANTIZED_BITS:
        raise ValueError(
            f"bits must be from {least:.4f}, what a weight takes with all of them quantized, to {UNQUANTIZED_BITS}, got {bits:g}"
        )


def most_sensitive(units: Sequence[Unit], kl: Mapping[str, float], bits: float) -> list[Unit]:
    """The units to leave in bf16, in the order of the model: greedy by the KL of each alone, by its label, per extra bit."""
    return _that_fit(
        units, bits, [unit for unit in units if kl[unit.label] > 0], lambda unit: -kl[unit.label] / unit.extra_bits
    )


def nearest_to_the_ends(units: Sequence[Unit], bits: float) -> list[Unit]:
    """What is left in bf16 without a measurement, for as many bits: the first and the last layers, from both ends on."""
    depths = [unit.depth for unit in units if unit.depth is not None]
    last = max(depths, default=0)

    def distance(unit: Unit) -> tuple[int, int]:
        assert unit.depth is not None
        return min(unit.depth, last - unit.depth), unit.depth

    return _that_fit(units, bits, [unit for unit in units if unit.depth is not None], distance)


def _that_fit(units: Sequence[Unit], bits: float, candidates: Iterable[Unit], order: Callable[[Unit], object]) -> list[Unit]:
    room = bits * sum(unit.num_weights for unit in units) - sum(unit.bits for unit in units)
    chosen = set()
    for unit in sorted(candidates, key=order):  # type: ignore[arg-type]
        if unit.extra_bits <= room:
            chosen.add(unit)
            room -= unit.extra_bits
    return [unit for unit in units if unit in chosen]


def exclusion_patterns(names: Collection[str], all_names: Collection[str]) -> list[str]:
    """Few patterns that match, of all quantized parameters, these alone: for whole layers, whole kinds, what is in one module, and
    single linears."""
    excluded = {owner_of(name) for name in names}
    others = {owner_of(name) for name in all_names} - excluded
    candidates: dict[str, set[str]] = {}
    for name in sorted(excluded, key=_in_order):
        for pattern in _patterns_of(name):
            if pattern not in candidates and not any(fnmatchcase(other, pattern) for other in others):
                candidates[pattern] = {own for own in excluded if fnmatchcase(own, pattern)}
    patterns = []
    while excluded:
        best = max(candidates, key=lambda pattern: len(candidates[pattern] & excluded))
        patterns.append(best)
        excluded = excluded - candidates[best]
    return patterns


def _patterns_of(name: str) -> list[str]:
    """All patterns of the kinds above that match a module, the more general first."""
    layer = layer_name(name)
    if layer is None:
        return [name]
    *parents, leaf = layer_place(name).kind.split(".")
    inside = [".".join((*parents[:length], "*")) for length in range(len(parents) + 1)]
    return [
        *(f"{layer}.{part}" for part in inside),
        *(f"*.{part}" for part in inside[1:]),
        f"*.{'.'.join((*parents, leaf))}",
        name,
    ]


def _in_order(name: str) -> tuple[int, str]:
    depth = layer_place(name).depth
    return -1 if depth is None else depth, name


def override(patterns: Sequence[str]) -> str:
    """What to add to a command line."""
    quoted = (pattern if re.fullmatch(r"[\w.*?-]+", pattern) else f'"{pattern}"' for pattern in patterns)
    return f"quant.exclude=[{','.join(quoted)}]"
