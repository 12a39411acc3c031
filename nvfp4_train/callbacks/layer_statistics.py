"""Logs statistics of every quantized weight: when, how their sums meet, and under which names."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from nvfp4_train.metrics import statistic_metric
from nvfp4_train.module import QATModule
from nvfp4_train.quant.experts import owner_of
from nvfp4_train.quant.statistics import Histogram, Statistic, sum_over_ranks


class LayerStatistics(Callback):
    """Logs `quant/<layer>/<statistic>` and aggregates, every `every_n_steps` optimizer steps with quantized weights and at the end.

    `<layer>` is the name of a quantized parameter without `.weight`. An aggregate, `quant/<statistic>`, is over all layers; it is also
    kept among the run's results. Each rank measures the rows that it owns, and one all_reduce adds up all sums of all layers.
    Histograms go to wandb. List it after the callback that quantizes.
    """

    def __init__(self, *, statistics: Mapping[str, Statistic | None], every_n_steps: int = 100, per_layer: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        for key, statistic in statistics.items():
            if not isinstance(statistic, Statistic | None):
                raise ValueError(f"statistics.{key} must be null or a Statistic (give its _target_), got {statistic!r}")
        self.statistics = [statistic for statistic in statistics.values() if statistic is not None]
        names = list(chain.from_iterable(statistic.names for statistic in self.statistics))
        if not names or len(set(names)) < len(names):
            raise ValueError(f"statistics must be at least one, each with names of its own, got {', '.join(names) or 'none'}")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._last_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Micro-batches before the first optimizer step change no weight.
        self._last_step = trainer.global_step

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
            layers = [owner_of(name) for name in names]
            values: dict[str, float] = {}
            aggregates: dict[str, float] = {}
            histograms: dict[str, Histogram] = {}
            for statistic, table in zip(self.statistics, tables, strict=True):
                aggregates |= _named(statistic.aggregate(table))
                histograms |= _named(statistic.histograms(table.sum(0)))
                for layer, sums in zip(layers, table, strict=True) if self.per_layer else ():
                    values |= _named(statistic.finish(sums), layer)
                    histograms |= _named(statistic.histograms(sums), layer)
            pl_module.report(aggregates)
            if values:
                pl_module.log_metrics(values)
            _draw(trainer, histograms)


def _named(values: Mapping[str, Any], layer: str | None = None) -> dict[str, Any]:
    return {statistic_metric(name, layer): value for name, value in values.items()}


def _draw(trainer: Trainer, histograms: Mapping[str, Histogram]) -> None:
    """Hand histograms to the loggers that draw them."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers or not histograms:
        return
    import wandb

    drawn: dict[str, Any] = {
        name: wandb.Histogram(np_histogram=(counts.numpy(), edges.numpy())) for name, (counts, edges) in histograms.items()
    }
    for logger in loggers:
        logger.log_metrics(drawn, step=trainer.global_step)
