"""Logs what the quantizer does to every weight, and to the inputs of quantized ones."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning import Trainer
from torch import Tensor

from nvfp4_train.callbacks.layer_statistics import LayerStatistics
from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.module import QATModule
from nvfp4_train.quant.changes import Changes
from nvfp4_train.quant.input_statistics import InputClipping
from nvfp4_train.quant.statistics import BlockScales, Codes, GlobalAmax, GlobalScale, SiblingAmax, Sqnr, Statistic

OF_TOKENS = ("input_ids", "position_ids")
"""What a forward needs of a batch, [B, T]."""


class ScaleStats(LayerStatistics):
    """The built-in statistics; `statistics` replaces some, and adds others under keys of their own.

    A key that is null leaves out the statistic of that key: `global_amax`, `siblings`, `global_scale`, `block_scales`, `codes`, `sqnr`,
    `changes` (the one that keeps memory between looks) or `inputs` (the one that makes a forward).
    """

    def __init__(
        self,
        *,
        statistics: Mapping[str, Statistic | None] | None = None,
        every_n_steps: int = 100,
        per_layer: bool = True,
        draw_every: int = 10,
        run_dir: str | None = None,
    ) -> None:
        own: dict[str, Statistic] = {
            "global_amax": GlobalAmax(),
            "siblings": SiblingAmax(),
            "global_scale": GlobalScale(),
            "block_scales": BlockScales(),
            "codes": Codes(),
            "sqnr": Sqnr(),
            "changes": Changes(),
            "inputs": InputClipping(),
        }
        super().__init__(
            statistics=own | dict(statistics or {}),
            every_n_steps=every_n_steps,
            per_layer=per_layer,
            draw_every=draw_every,
            run_dir=run_dir,
        )
        self._of_inputs = [statistic for statistic in self.statistics if isinstance(statistic, InputClipping)]
        self._batch: Mapping[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        _, self._batch, *_ = args
        super().on_train_batch_end(trainer, pl_module, *args)

    def measure(self, pl_module: QATModule) -> tuple[list[str], list[Tensor]]:
        model, inputs = pl_module.model, pl_module.inputs
        assert model is not None and inputs is not None
        for statistic in self._of_inputs:
            # A run that continues from its last step has no batch.
            if not statistic.is_due() or not inputs.is_enabled or not self._batch:
                continue
            batch = {name: tensor[:1, : statistic.tokens] for name, tensor in self._batch.items() if name in OF_TOKENS}
            statistic.measure(model, inputs, partial(compute_logits, model, **batch))
        return super().measure(pl_module)
