"""Where a quantized parameter stands in its model, from its name: the depth of its layer, and its kind."""

from typing import NamedTuple


class LayerPlace(NamedTuple):
    depth: int | None
    """The number of its decoder layer; None outside of numbered layers."""
    kind: str
    """What is below the layer, say `self_attn.q_proj`, with `*` for further numbers; the whole name outside of numbered layers."""


def layer_place(name: str) -> LayerPlace:
    """The place of a parameter or module, say `model.layers.3.self_attn.q_proj.weight`: depth 3, kind `self_attn.q_proj`."""
    parts = name.removesuffix(".weight").split(".")
    for at, part in enumerate(parts):
        if part.isdecimal() and at + 1 < len(parts):
            return LayerPlace(int(part), ".".join("*" if other.isdecimal() else other for other in parts[at + 1 :]))
    return LayerPlace(None, ".".join(parts))
