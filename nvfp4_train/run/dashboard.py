"""A wandb workspace for the runs of a project: which sections it has, and what their panels show. `launch/dashboard.py` saves it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nvfp4_train.callbacks.layer_statistics import LayerStatistics
from nvfp4_train.callbacks.oscillation import OscillationControl
from nvfp4_train.metrics import (
    MASTER,
    MASTER_AT_SWITCH,
    PEAK_GIB,
    PTQ,
    QUANTIZED,
    SQNR_STATISTIC,
    TOKENS_PER_S,
    WORST_LAYERS,
    evaluation_metric,
    heat_map_name,
    histogram_name,
    histograms_by_layer_name,
    statistic_metric,
)
from nvfp4_train.quant.policy import SERVINGS
from nvfp4_train.run.compose import compose_options, make, target_class
from nvfp4_train.run.options import check_targets

NAME = "NVFP4 training"
"""Of the workspace, unless it is given another one."""
STEP = "trainer/global_step"
"""Optimizer steps. Those of wandb itself count what was logged."""

QUANTIZER: dict[str, Sequence[str]] = {
    "SQNR, dB": (SQNR_STATISTIC,),
    "Blocks with the smallest and the largest scale": (
        "scale_at_floor_share",
        "scale_below_floor_share",
        "scale_saturated_share",
    ),
    "Block scales": ("scale_min", "scale_median", "scale_max"),
    "Underflow and zeros": ("underflow_share", "zero_share"),
    "Clipped inputs": ("input_clipped_share",),
    "Codes that change": ("flip_rate", "oscillation_rate"),
    "Change of codes over change of masters": ("change_ratio",),
    "Oscillating weights that were reset or frozen": ("oscillating_share", "frozen_share"),
    "Near a rounding edge": ("edge_share",),
    "Blocks whose rule chose another scale than max": ("other_scale_share",),
    "Largest magnitude": ("global_amax",),
    "Global scale": ("global_scale_exponent", "global_scale_changes"),
    "Amax over that of siblings": ("sibling_amax_ratio",),
}
"""Panels of aggregates: title -> statistics. One that is in none of them has a panel of its own, under its name."""


@dataclass(frozen=True)
class Panel:
    kind: Literal["lines", "bars", "images", "table"]
    """`lines` over the optimizer steps, of histograms too; `bars`, one a run; `images`; the last `table`."""
    title: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    name: str
    panels: tuple[Panel, ...]
    columns: int = 3


def sections(
    statistics: Sequence[str], histograms: Sequence[str], aggregates: Sequence[str] = (), parts: Sequence[str] = ()
) -> list[Section]:
    """The layout, of runs with these statistics and histograms; `aggregates` are statistics that no single layer has, `parts` those of
    a loss that is a sum.

    What a run does not log leaves its panel empty.
    """
    of_all = [*statistics, *aggregates]
    quantizer = {title: [name for name in names if name in of_all] for title, names in QUANTIZER.items()}
    placed = {name for names in quantizer.values() for name in names}
    quantizer |= {name: [name] for name in of_all if name not in placed}
    return [
        Section("Loss and KL", tuple(_loss_and_kl(parts)), columns=2),
        Section(
            "Quantizer health",
            tuple(
                Panel("lines", title, tuple(statistic_metric(name) for name in names))
                for title, names in quantizer.items()
                if names
            ),
        ),
        Section("Worst layers", (Panel("table", "Layers of lowest SQNR", (WORST_LAYERS,)),), columns=1),
        Section(
            "Heat maps: kinds of layers over depth",
            tuple(Panel("images", name, (heat_map_name(name),)) for name in statistics),
            columns=2,
        ),
        Section(
            "Histograms",
            tuple(
                panel
                for name in histograms
                for panel in (
                    Panel("lines", name, (histogram_name(name),)),
                    Panel("images", f"{name} of each layer", (histograms_by_layer_name(name),)),
                )
            ),
            columns=2,
        ),
        Section(
            "Speed and memory",
            (
                Panel("lines", "Tokens per second", (TOKENS_PER_S,)),
                Panel("bars", "Peak memory of a GPU, GiB", (PEAK_GIB,)),
                Panel("lines", "Learning rate", ("train/lr",)),
                Panel("lines", "Norm of the gradient", ("train/grad_norm",)),
            ),
        ),
    ]


def _loss_and_kl(parts: Sequence[str]) -> Iterable[Panel]:
    """Curves, with what is measured once: masters and PTQ at the switch, masters and quantized weights at the end."""
    states = (MASTER_AT_SWITCH, PTQ, MASTER, QUANTIZED)
    for name, title in (("loss", "loss"), ("kl", "KL, nats a token"), ("top1_agreement", "share of equal tokens")):
        of_states = tuple(evaluation_metric(name, state) for state in states)
        as_served = tuple(evaluation_metric(name, state, serving) for serving in SERVINGS for state in (PTQ, QUANTIZED))
        yield Panel("lines", f"Held-out {title}: on the way, at the switch and at the end", (f"val/{name}", *of_states))
        yield Panel("bars", f"Held-out {title}: PTQ and trained, as it is served", as_served)
    yield Panel("lines", "Training loss", ("train/loss",))
    for part in parts:
        yield Panel("lines", f"{part}, training and held-out", (f"train/{part}", f"val/{part}"))


def sections_of(root: Path, overrides: Sequence[str]) -> list[Section]:
    """The layout of runs with the options of a command line of launch/train.py. Raises ValueError for what the user can correct."""
    options, _ = compose_options(root, overrides)
    check_targets(options["callbacks"], "callbacks")
    made = [
        make(node, f"callbacks.{name}")
        for name, node in options["callbacks"].items()
        if node and issubclass(target_class(node, f"callbacks.{name}"), LayerStatistics | OscillationControl)
    ]
    looks = [callback for callback in made if isinstance(callback, LayerStatistics)]
    controls = [callback for callback in made if isinstance(callback, OscillationControl)]
    return sections(
        list(dict.fromkeys(name for look in looks for name in look.names)),
        list(dict.fromkeys(name for look in looks for name in look.histogram_names)),
        list(dict.fromkeys(name for control in controls for name in control.names)),
        _parts(options["loss"]),
    )


def _parts(loss: Mapping[str, Any]) -> list[str]:
    """What a run logs of a distillation loss that is a sum, by the names of metrics."""
    of_options = {"hidden": "hidden_error", "cross_entropy": "cross_entropy"}
    found = [part for option, part in of_options.items() if loss.get(option)]
    return ["divergence", *found] if found else []


def listing(layout: Sequence[Section]) -> str:
    """The layout as text."""
    lines = []
    for section in layout:
        lines.append(section.name)
        lines += [f"  {panel.kind:<7} {panel.title}: {', '.join(panel.metrics)}" for panel in section.panels]
    return "\n".join(lines)


def workspace(layout: Sequence[Section], entity: str, project: str, name: str = NAME) -> Any:
    """The layout as wandb_workspaces has it, not yet saved. Raises ValueError where that package is not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name} is not installed: pip install wandb-workspaces") from error

    def panel(of: Panel) -> Any:
        if of.kind == "lines":
            return wr.LinePlot(title=of.title, x=STEP, y=list(of.metrics))
        if of.kind == "bars":
            return wr.BarPlot(title=of.title, metrics=list(of.metrics))
        if of.kind == "images":
            return wr.MediaBrowser(title=of.title, media_keys=list(of.metrics), num_columns=1)
        (table,) = of.metrics
        return wr.WeavePanelSummaryTable(table_name=table)

    def section(of: Section) -> Any:
        shape = ws.SectionLayoutSettings(columns=of.columns, rows=math.ceil(len(of.panels) / of.columns) or 1)
        return ws.Section(name=of.name, panels=[panel(each) for each in of.panels], is_open=True, layout_settings=shape)

    return ws.Workspace(entity=entity, project=project, name=name, sections=[section(each) for each in layout])
