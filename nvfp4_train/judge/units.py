"""What of a model can be quantized or left in bf16 by itself, and how many bits that takes.

The smallest units are the weights of one place in one layer that a policy takes together: siblings (q/k/v; gate/up), which share a
global scale, both parameters of the experts of a layer, and the experts of a layer where each is a module. Layers and kinds are made of
these.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.experts import ExpertWeight, find_experts
from nvfp4_train.quant.layer_names import layer_place
from nvfp4_train.quant.manifest import QuantManifest

UNQUANTIZED_BITS = 16
BITS = 4 + 8 / BLOCK_SIZE
"""Of a quantized weight: its code, and its part of the E4M3 scale of a block."""
GLOBAL_SCALE_BITS = 32
"""Of a matrix on disk."""

LEVELS = ("weight", "layer", "kind")
ALL = "all"
"""The label of the unit of all weights."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Weights that are quantized, or left in bf16, together."""

    label: str
    """Names the unit among all units of a model, of every level."""
    names: tuple[str, ...]
    """Of its parameters, all names of each."""
    layer: str | None
    """Name of the layer that it is in; None outside of layers, and of a unit of several layers."""
    depth: int | None
    """The number of that layer."""
    kind: str
    """What it is below its layer; `*` of whole layers."""
    num_weights: int
    bits: int
    """Of the unit where it is quantized: codes, block scales and global scales, as `export.VerifyReport.bits_per_weight` counts."""

    @property
    def extra_bits(self) -> int:
        """What bf16 takes more."""
        return UNQUANTIZED_BITS * self.num_weights - self.bits


def smallest_units(model: nn.Module, manifest: QuantManifest) -> list[Unit]:
    """The units of the level `weight`, in the order of the model."""
    experts = find_experts(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_key: dict[tuple[str, ...], list[str]] = {}
    for group in manifest.groups:
        layer, kind = layer_name(group[0]), kind_of(group)
        key = group if layer is None else (layer, kind)
        # The partner is in a group of its own, and no policy takes one without the other.
        if group[0] in experts:
            key = tuple(sorted((group[0], experts[group[0]].partner)))
        by_key.setdefault(key, []).extend(group)
    units = []
    for names in by_key.values():
        layer, kind = layer_name(names[0]), kind_of(names)
        # Several names of one parameter are one matrix on disk.
        once = {id(parameters[name]): name for name in reversed(names)}.values()
        num_weights = sum(parameters[name].numel() for name in once)
        num_matrices = sum(_matrices(experts.get(name)) for name in once)
        units.append(
            Unit(
                label=kind if layer is None else f"{layer}.{kind}",
                names=tuple(names),
                layer=layer,
                depth=layer_place(names[0]).depth,
                kind=kind,
                num_weights=num_weights,
                bits=int(BITS * num_weights) + GLOBAL_SCALE_BITS * num_matrices,
            )
        )
    return units


def _matrices(expert: ExpertWeight | None) -> int:
    """How many matrices on disk a parameter is."""
    return 1 if expert is None else expert.num_experts * len(expert.projections)


def layers(units: Iterable[Unit]) -> list[Unit]:
    """Smallest units joined by the layers that they are in; those outside of layers stay as they are."""
    return _joined(units, lambda unit: unit.layer or unit.label, is_layer=True)


def kinds(units: Iterable[Unit]) -> list[Unit]:
    """Smallest units of all layers joined by their kinds."""
    return _joined(units, lambda unit: f"*.{unit.kind}" if unit.layer else unit.label, is_layer=False)


def units_by_level(units: Sequence[Unit], level: str) -> list[Unit]:
    """The units of one of `LEVELS`, made of the smallest."""
    return {"weight": list, "layer": layers, "kind": kinds}[level](units)  # type: ignore[operator]


def whole(units: Sequence[Unit]) -> Unit:
    """The unit of all weights."""
    (joined,) = _joined(units, lambda unit: ALL, is_layer=False)
    return joined


def _joined(units: Iterable[Unit], label_of: Callable[[Unit], str], *, is_layer: bool) -> list[Unit]:
    by_label: dict[str, list[Unit]] = {}
    for unit in units:
        by_label.setdefault(label_of(unit), []).append(unit)
    return [
        Unit(
            label=label,
            names=tuple(name for unit in joined for name in unit.names),
            layer=joined[0].layer if is_layer else None,
            depth=joined[0].depth if is_layer else None,
            kind="*" if is_layer and joined[0].layer else joined[0].kind,
            num_weights=sum(unit.num_weights for unit in joined),
            bits=sum(unit.bits for unit in joined),
        )
        for label, joined in by_label.items()
    ]


def layer_name(name: str) -> str | None:
    """The layer of a parameter or module, say `model.layers.3`; None outside of numbered layers."""
    if layer_place(name).depth is None:
        return None
    found = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    assert found is not None
    return found.group()


def kind_of(names: Sequence[str]) -> str:
    """The kinds of some parameters in one, say `self_attn.q_proj+k_proj+v_proj`."""
    found = list(dict.fromkeys(layer_place(name).kind for name in names))
    parents = {kind.rpartition(".")[0] for kind in found}
    if len(parents) > 1:
        return "+".join(found)
    (parent,) = parents
    return f"{parent}.{'+'.join(kind.rpartition('.')[2] for kind in found)}".removeprefix(".")
