"""Logs what the quantizer does to every weight."""

from typing import Any

import torch
from lightning import Callback, Trainer

from nvfp4_train.module import QATModule
from nvfp4_train.quant.statistics import STATISTICS, sqnr_db, weight_statistics


class ScaleStats(Callback):
    """Every `every_n_steps` optimizer steps with quantized weights, and at the end: `quant/<module>/<statistic>` and aggregates.

    The aggregate SQNR is that of all quantized weights taken as one tensor, aggregate shares are means over blocks.
    """

    def __init__(self, *, every_n_steps: int = 100, per_layer: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.scale_stats.every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._last_step = -1

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

    def _log(self, trainer: Trainer, pl_module: QATModule) -> None:
        store = pl_module.store
        assert store is not None
        if not store.is_enabled:
            return
        self._last_step = trainer.global_step
        with pl_module.clock.paused():
            names, sizes, rows = [], [], []
            for name, _, group in store.items():
                # On every rank: a sharded master is gathered.
                master = store.master(name)
                if trainer.is_global_zero:
                    names.append(name)
                    sizes.append(master.numel())
                    rows.append(weight_statistics(master, store.global_scale[group], store.global_amax[group]))
            if not trainer.is_global_zero:
                return
            table = torch.stack(rows).cpu()
        pl_module.report(_aggregates(table, torch.tensor(sizes, dtype=torch.float64)))
        if self.per_layer:
            layers = {
                f"quant/{name}/{statistic}": value
                for name, row in zip(names, table.tolist(), strict=True)
                for statistic, value in zip(STATISTICS, row, strict=False)
            }
            pl_module.log_metrics(layers)


def _aggregates(table: torch.Tensor, sizes: torch.Tensor) -> dict[str, float]:
    """One value per statistic over the rows of `weight_statistics`."""
    columns = dict(zip(STATISTICS, table.unbind(1), strict=False))
    signal, noise = table[:, -2].sum(), table[:, -1].sum()
    values = {
        "global_amax": columns["global_amax"].max(),
        "scale_min": columns["scale_min"].min(),
        "scale_median": columns["scale_median"].median(),
        "scale_max": columns["scale_max"].max(),
        "sqnr_db": sqnr_db(signal, noise),
    }
    for share in ("scale_subnormal_share", "scale_zero_share", "scale_saturated_share"):
        values[share] = (columns[share] * sizes).sum() / sizes.sum()
    return {f"quant/{statistic}": value.item() for statistic, value in values.items()}
