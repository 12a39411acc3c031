"""Logs statistics of every quantized weight: when, how their sums meet, and under which names."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from nvfp4_train.drawing import Drawings, Table, can_draw, draw
from nvfp4_train.layer_pictures import heat_maps, histograms_by_layer, worst_table
from nvfp4_train.layer_table import LAYERS_FILE, append_rows, rewind
from nvfp4_train.metrics import WORST_LAYERS, heat_map_name, histogram_name, histograms_by_layer_name, statistic_metric
from nvfp4_train.module import QATModule
from nvfp4_train.quant.experts import owner_of
from nvfp4_train.quant.statistics import Histogram, Statistic, sum_over_ranks


class LayerStatistics(Callback):
    """Looks at all quantized weights every `every_n_steps` optimizer steps with quantized weights, and at the end.

    An aggregate, `quant/<statistic>`, is over all layers; it is logged, and kept among the run's results. With `per_layer` those of
    each layer go to the file layers.csv in `run_dir`, if there is one. Loggers that draw get `histograms/<name>` over all layers at
    every look, and at the first look of a start, at each `draw_every`-th (0: none) and at the end of the run `heat_maps/<statistic>`,
    `histograms/<name>_by_layer` and `worst_layers/table`. Each rank measures the rows that it owns, and one all_reduce adds up all
    sums of all layers. List it after the callback that quantizes.
    """

    def __init__(
        self,
        *,
        statistics: Mapping[str, Statistic | None],
        every_n_steps: int = 100,
        per_layer: bool = True,
        draw_every: int = 10,
        run_dir: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if draw_every < 0:
            raise ValueError(f"draw_every must be at least 0, got {draw_every}")
        for key, statistic in statistics.items():
            if not isinstance(statistic, Statistic | None):
                raise ValueError(f"statistics.{key} must be null or a Statistic (give its _target_), got {statistic!r}")
        self.statistics = [statistic for statistic in statistics.values() if statistic is not None]
        names = list(chain.from_iterable(statistic.names for statistic in self.statistics))
        if not names:
            raise ValueError("statistics must be at least one, got none")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"statistics must have names of their own, got {', '.join(twice)} more than once")
        if unfit := [name for name in names if not re.fullmatch(r"[^/\s]+", name)]:
            raise ValueError(f"names of statistics must be without / and spaces, got {', '.join(map(repr, unfit))}")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.draw_every = draw_every
        self.table = None if run_dir is None else Path(run_dir) / LAYERS_FILE
        self.names = names
        self.histogram_names = list(chain.from_iterable(statistic.histogram_names for statistic in self.statistics))
        self._last_step = -1
        self._has_drawn = False
        self._latest: dict[str, dict[str, float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Micro-batches before the first optimizer step change no weight.
        self._last_step = trainer.global_step
        if trainer.is_global_zero and self.table is not None and self.table.exists():
            # Of steps that a stopped run did, and that this one does again.
            rewind(self.table, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step != self._last_step and step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        if trainer.global_step != self._last_step:
            self._log(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # The only hook of a run that continues from its last step.
        self.on_train_end(trainer, pl_module)

    def measure(self, pl_module: QATModule) -> tuple[list[str], list[Tensor]]:
        """Names of the weights, and for each statistic their sums over all ranks, see `sum_over_ranks`. A collective."""
        assert pl_module.store is not None
        return sum_over_ranks(pl_module.store.local_weights(), self.statistics)

    @torch.no_grad()
    def _log(self, trainer: Trainer, pl_module: QATModule) -> None:
        store = pl_module.store
        assert store is not None
        if not store.is_enabled:
            return
        self._last_step = trainer.global_step
        with pl_module.clock.paused():
            names, tables = self.measure(pl_module)
            if not trainer.is_global_zero:
                return
            layers: dict[str, dict[str, float]] = {owner_of(name): {} for name in names} if self.per_layer else {}
            aggregates: dict[str, float] = {}
            histograms: dict[str, Histogram] = {}
            is_drawn = can_draw(trainer.loggers) and bool(layers) and self._is_due(trainer)
            of_layers: dict[str, dict[str, Histogram]] = {name: {} for name in self.histogram_names if is_drawn}
            for statistic, table in zip(self.statistics, tables, strict=True):
                aggregates |= statistic.aggregate(table)
                histograms |= statistic.histograms(table.sum(0))
                for values, sums in zip(layers.values(), table, strict=True) if layers else ():
                    values |= statistic.finish(sums)
                for layer, sums in zip(layers, table, strict=True) if is_drawn else ():
                    for name, histogram in statistic.histograms(sums).items():
                        of_layers[name][layer] = histogram
            if aggregates:
                pl_module.report({statistic_metric(name): value for name, value in aggregates.items()})
            if layers and self.table is not None:
                append_rows(self.table, trainer.global_step, layers, statistics=self.names)
            # A statistic that is not measured at each look is drawn as it was last.
            self._latest = {layer: self._latest.get(layer, {}) | values for layer, values in layers.items()}
            if can_draw(trainer.loggers):
                drawings = Drawings(histograms={histogram_name(name): histogram for name, histogram in histograms.items()})
                draw(trainer.loggers, self._with_layers(drawings, of_layers) if is_drawn else drawings, trainer.global_step)

    def _with_layers(self, drawings: Drawings, histograms: Mapping[str, Mapping[str, Histogram]]) -> Drawings:
        """With pictures and the table of the layers. Their histograms are by name and layer."""
        self._has_drawn = True
        images = {heat_map_name(statistic): figure for statistic, figure in heat_maps(self._latest)}
        images |= {
            histograms_by_layer_name(name): histograms_by_layer(name, found) for name, found in histograms.items() if found
        }
        return replace(drawings, images=images, tables={WORST_LAYERS: Table(*worst_table(self._latest))})

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether this look at the layers is drawn, and not only the histograms of all of them together."""
        if not self.draw_every:
            return False
        is_last = trainer.should_stop or trainer.global_step >= trainer.max_steps
        return is_last or not self._has_drawn or trainer.global_step % (self.every_n_steps * self.draw_every) == 0
