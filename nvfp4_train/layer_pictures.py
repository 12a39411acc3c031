"""What people look at of the statistics of all layers: a heat map of each statistic, and a table of the worst layers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from nvfp4_train.metrics import SQNR_STATISTIC
from nvfp4_train.pictures import heat_map
from nvfp4_train.quant.layer_names import layer_place
from nvfp4_train.worst_layers import worst_layers

Rows = Mapping[str, Mapping[str, float]]
"""Statistics by layer and name, as `layer_table.append_rows` takes them."""

OUTSIDE = "other"
"""The column of what is in no numbered layer."""


def heat_maps(rows: Rows) -> Iterator[tuple[str, Figure]]:
    """Of each statistic that has a finite value, its name and a picture: a row for each kind of layer, a column for each depth.

    Where several weights have one kind and depth, as the experts of a layer, it shows their mean.
    """
    places = {layer: layer_place(layer) for layer in rows}
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    # None sorts behind all numbers.
    depths = sorted({place.depth for place in places.values()}, key=lambda depth: math.inf if depth is None else depth)
    for statistic in dict.fromkeys(name for values in rows.values() for name in values):
        cells: dict[tuple[str, int | None], list[float]] = {}
        for layer, values in rows.items():
            if math.isfinite(value := values.get(statistic, math.nan)):
                cells.setdefault((places[layer].kind, places[layer].depth), []).append(value)
        if cells:
            table = [[fmean(cells.get((kind, depth), [math.nan])) for depth in depths] for kind in kinds]
            yield statistic, heat_map(statistic, kinds, [OUTSIDE if depth is None else str(depth) for depth in depths], table)


def worst_table(rows: Rows) -> tuple[list[str], list[list[str | float | int | None]]]:
    """Columns and rows of a table of the worst layers: name, depth, kind, SQNR, hint, and all other statistics."""
    worst = worst_layers(rows)
    others = list(dict.fromkeys(name for layer in worst for name in layer.values if name != SQNR_STATISTIC))
    columns = ["layer", "depth", "kind", SQNR_STATISTIC, "hint", *others]
    table: list[list[str | float | int | None]] = []
    for layer in worst:
        place = layer_place(layer.layer)
        values: Sequence[float | None] = [layer.values.get(name) for name in others]
        table.append([layer.layer, place.depth, place.kind, layer.values[SQNR_STATISTIC], layer.hint, *values])
    return columns, table
