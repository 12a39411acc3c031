"""What the quantizer does to every layer, at the last look: heat maps, the worst layers, and all layers together."""

from collections.abc import Iterator, Mapping
from statistics import fmean

from nvfp4_train.layer_pictures import OUTSIDE, LayerGrid
from nvfp4_train.metrics import SQNR_STATISTIC, statistic_metric
from nvfp4_train.report.blocks import Block, Picture, Table, Text
from nvfp4_train.report.numbers import NONE, STATISTICS, number, scaled, statistic
from nvfp4_train.report.run_files import RunFiles
from nvfp4_train.worst_layers import worst_layers

MAPS = (
    SQNR_STATISTIC,
    "underflow_share",
    "scale_at_floor_share",
    "scale_saturated_share",
    "input_clipped_share",
    "flip_rate",
    "oscillation_rate",
    "edge_share",
    "other_scale_share",
)
"""Statistics that are drawn, where layers.csv has them, before those that are not ours."""
OF_TWO_LOOKS = ("flip_rate", "oscillation_rate")
"""Statistics that compare a look with the one before."""
BESIDE = ("underflow_share", "scale_at_floor_share", "input_clipped_share", "flip_rate", "oscillation_rate")
"""Statistics that stand beside the SQNR of a worst layer."""
NUM_WORST = 10
NO_LAYERS = "layers.csv is not in this folder, or empty. callbacks.scale_stats writes it, with per_layer=true."


def heat_map_blocks(files: RunFiles) -> Iterator[Block]:
    if not files.layers:
        yield Text(f"No heat maps: {NO_LAYERS}")
        return
    yield Text(f"{len(files.layers)} layers at step {files.layers_step}: rows are kinds of layers, columns their depth.")
    flat = []
    others = dict.fromkeys(name for values in files.layers.values() for name in values if name not in STATISTICS)
    for name in (*MAPS, *others):
        grid = LayerGrid.of({layer: scaled(name, values[name]) for layer, values in files.layers.items() if name in values})
        values = {f"{value:.6g}" for value in grid.values.values()}
        if len(values) > 1:
            yield _map(grid, _label(files, name))
        elif values:
            flat.append(f"{_label(files, name)}: {number(next(iter(grid.values.values())))}")
    if flat:
        yield Text(f"The same in every layer, and not drawn: {'; '.join(flat)}.")
    missing = [name for name in MAPS if not any(name in of_layer for of_layer in files.layers.values())]
    if missing:
        yield Text(f"Not measured in this run: {_reasons(files, missing)}")


def _reasons(files: RunFiles, missing: list[str]) -> str:
    """Statistics with what it takes to have them, a sentence for each reason."""
    named: dict[str, list[str]] = {}
    for name in missing:
        why = "callbacks.scale_stats.statistics adds statistics"
        if name in OF_TWO_LOOKS and (len(files.looks) < 2 or files.option("callbacks.scale_stats.statistics.changes")):
            # The memory of the last look is in no checkpoint.
            why = (
                "they need two looks without a stop between them; a lower callbacks.scale_stats.every_n_steps gives more looks"
            )
        elif name == "input_clipped_share" and files.option("quant.activations") == "none":
            why = "only W4A4 has them (quant.activations=nvfp4)"
        elif name == "input_clipped_share" and not files.step:
            why = "they are of a batch of training"
        named.setdefault(why, []).append(statistic(name).label)
    return " ".join(f"{', '.join(labels)}: {why}." for why, labels in named.items())


def worst_blocks(files: RunFiles) -> Iterator[Block]:
    worst = worst_layers(files.layers, NUM_WORST)
    if not worst:
        yield Text(f"The worst layers are not known: {NO_LAYERS if not files.layers else 'the SQNR was not measured.'}")
        return
    beside = [name for name in BESIDE if any(name in one.values for one in worst)]
    yield Text("Those of the lowest SQNR, worst first, each with what its numbers suggest.")
    yield Table(
        header=["layer", *(_label(files, name) for name in (SQNR_STATISTIC, *beside)), "hint"],
        rows=[[one.layer, *(_value(name, one.values) for name in (SQNR_STATISTIC, *beside)), one.hint] for one in worst],
        align=f"lr{'r' * len(beside)}l",
    )


def health_blocks(files: RunFiles) -> Iterator[Block]:
    """All layers together, at the first and at the last look."""
    # What was logged after the end of the run is of a continued one.
    last = dict(files.metrics) | {metric: points[-1][1] for metric, points in files.history.items()}
    named = {metric.removeprefix("quant/"): value for metric, value in last.items() if metric.startswith("quant/")}
    names = [name for name in STATISTICS if name in named] + sorted(named.keys() - STATISTICS.keys())
    if not names:
        yield Text(
            "No statistics: callbacks.scale_stats is null, or was never due. It measures every callbacks.scale_stats.every_n_steps."
        )
        return
    rows = []
    for name in names:
        points = files.history.get(statistic_metric(name), [])
        first = f"{number(scaled(name, points[0][1]))} (step {points[0][0]:,})" if len(points) > 1 else NONE
        # Not every statistic is measured at each look.
        of_step = f" (step {points[-1][0]:,})" if points and points[-1][0] < files.layers_step else ""
        rows.append([statistic(name).full_label, first, number(scaled(name, named[name])) + of_step])
    yield Table(header=["all layers together", "first look", "last look"], rows=rows, align="lrr")


def _label(files: RunFiles, name: str) -> str:
    """What a statistic of layers is called, with its step where that is not the one of the last look."""
    step = files.look_of(name)
    return statistic(name).full_label + (f" (step {step:,})" if 0 < step < files.layers_step else "")


def _map(grid: LayerGrid, label: str) -> Picture:
    values = grid.values
    figure = grid.picture(label[0].upper() + label[1:])
    rows = []
    for kind in grid.kinds:
        of_kind = {depth: value for (other, depth), value in values.items() if other == kind}
        low, high = min(of_kind, key=of_kind.__getitem__), max(of_kind, key=of_kind.__getitem__)
        rows.append([kind, _at(of_kind[low], low), number(fmean(of_kind.values())), _at(of_kind[high], high)])
    (least_kind, least_depth), (most_kind, most_depth) = (
        min(values, key=values.__getitem__),
        max(values, key=values.__getitem__),
    )
    says = (
        f"Heat map of {label} by kind and depth of layers: from {number(min(values.values()))} ({_place(least_kind, least_depth)}) to "
        f"{number(max(values.values()))} ({_place(most_kind, most_depth)})."
    )
    table = Table(title=label, header=["kind", "least (depth)", "mean", "most (depth)"], rows=rows, align="lrrr")
    return Picture(figure=figure, says=says, numbers=table, is_wide=len(grid.depths) > 12)


def _at(value: float, depth: int | None) -> str:
    return f"{number(value)} ({OUTSIDE if depth is None else depth})"


def _place(kind: str, depth: int | None) -> str:
    return kind if depth is None else f"{kind} of layer {depth}"


def _value(name: str, values: Mapping[str, float]) -> str:
    return number(scaled(name, values[name])) if name in values else NONE
