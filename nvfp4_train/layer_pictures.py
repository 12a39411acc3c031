"""What people look at of the statistics of all layers: a heat map of each statistic, and a table of the worst layers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from nvfp4_train.metrics import SQNR_STATISTIC
from nvfp4_train.pictures import heat_map
from nvfp4_train.quant.layer_names import layer_place
from nvfp4_train.quant.statistics import Histogram
from nvfp4_train.worst_layers import worst_layers

Rows = Mapping[str, Mapping[str, float]]
"""Statistics by layer and name, as `layer_table.append_rows` takes them."""

OUTSIDE = "other"
"""The column of what is in no numbered layer."""


@dataclass(frozen=True)
class LayerGrid:
    """A statistic by the kinds and depths of layers."""

    values: Mapping[tuple[str, int | None], float]
    """By kind and depth: the mean, where several weights, say the experts of a layer, have one place."""

    @staticmethod
    def of(layers: Mapping[str, float]) -> "LayerGrid":
        """Of the values of layers, by name. What is not finite has no place."""
        found: dict[tuple[str, int | None], list[float]] = {}
        for layer, value in layers.items():
            if math.isfinite(value):
                place = layer_place(layer)
                found.setdefault((place.kind, place.depth), []).append(value)
        return LayerGrid({place: fmean(values) for place, values in found.items()})

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.values))

    @property
    def depths(self) -> list[int | None]:
        """In ascending order, and None behind them."""
        return sorted({depth for _, depth in self.values}, key=lambda depth: math.inf if depth is None else depth)

    def picture(self, title: str) -> Figure:
        """A row for each kind, a column for each depth."""
        table = [[self.values.get((kind, depth), math.nan) for depth in self.depths] for kind in self.kinds]
        return heat_map(title, self.kinds, [OUTSIDE if depth is None else str(depth) for depth in self.depths], table)


def heat_maps(rows: Rows) -> Iterator[tuple[str, Figure]]:
    """Of each statistic that has a finite value, its name and the picture of its `LayerGrid`."""
    for statistic in dict.fromkeys(name for values in rows.values() for name in values):
        grid = LayerGrid.of({layer: values[statistic] for layer, values in rows.items() if statistic in values})
        if grid.values:
            yield statistic, grid.picture(statistic)


def histograms_by_layer(name: str, histograms: Mapping[str, Histogram]) -> Figure:
    """A row for each layer, kind by kind and in the order of depths, a column for each bin: the share of the layer's counts in it.

    Bins at both ends that are empty in every layer are left out. Columns go by the lower edges of their bins.
    """
    places = {layer: layer_place(layer) for layer in histograms}
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    layers = sorted(
        histograms,
        key=lambda layer: (
            kinds.index(places[layer].kind),
            math.inf if places[layer].depth is None else places[layer].depth,
        ),
    )
    counts = np.stack([histograms[layer][0].numpy() for layer in layers])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    used = np.flatnonzero(counts.sum(0)) if counts.any() else np.arange(counts.shape[1])
    bins = slice(used[0], used[-1] + 1)
    edges = next(iter(histograms.values()))[1][:-1]
    rows = [f"{places[layer].kind} {OUTSIDE if places[layer].depth is None else places[layer].depth}" for layer in layers]
    return heat_map(name, rows, [f"{edge:.3g}" for edge in edges[bins].tolist()], shares[:, bins].tolist())


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
