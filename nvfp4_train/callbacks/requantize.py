"""Switches the forward to quantized weights at `quant.start_step`, and quantizes anew after every optimizer step."""

from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from nvfp4_train.metrics import MASTER, MASTER_AT_SWITCH, PTQ, QUANTIZED, VAL_LOSS_QUANTIZED, evaluation_metric
from nvfp4_train.module import QATModule


class Requantize(Callback):
    """Decides when weights are quantized.

    At the switch it reports the validation loss of the masters and of the quantized weights (that is PTQ). At the end of training it
    reports the same pair (that is QAT). With `quant.enabled=false` both pairs are taken at the end.
    """

    def __init__(self) -> None:
        self._last_step = -1
        self._losses_at_switch: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"losses_at_switch": self._losses_at_switch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses_at_switch = dict(state_dict["losses_at_switch"])

    def setup(self, trainer: Trainer, pl_module: QATModule, stage: str) -> None:  # type: ignore[override]
        config = pl_module.quant_config
        if stage == "fit" and config.enabled and config.start_step > trainer.max_steps:
            raise ValueError(
                f"quant.start_step must be at most trainer.max_steps, got start_step={config.start_step} and "
                f"max_steps={trainer.max_steps}; with quant.enabled=false the run trains without quantization"
            )

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Every strategy has restored its checkpoint by now.
        if trainer.global_step < pl_module.quant_config.start_step:
            self._losses_at_switch = {}
        self._after_step(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step != self._last_step:
            self._after_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._report_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # A run that continues from its last step does not train, and the other hooks are not called.
        if VAL_LOSS_QUANTIZED not in pl_module.results:
            self._report_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._follow_masters(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._follow_masters(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._follow_masters(trainer, pl_module)

    def _follow_masters(self, trainer: Trainer, pl_module: QATModule) -> None:
        # Outside of a fit, Lightning has just moved the masters, and restored those of a checkpoint if there is one.
        assert pl_module.store is not None
        if trainer.state.fn != TrainerFn.FITTING and pl_module.store.is_enabled:
            pl_module.store.update()

    def _report_end(self, trainer: Trainer, pl_module: QATModule) -> None:
        assert pl_module.store is not None
        if not self._losses_at_switch:
            self._switch(trainer, pl_module)
        elif not pl_module.store.is_enabled:
            pl_module.store.update()
        pl_module.results |= self._losses_at_switch
        pl_module.report(self._evaluate(trainer, pl_module, QUANTIZED, MASTER))
        if not pl_module.quant_config.enabled:
            # A run that continues from this one with quantization has its own switch.
            self._losses_at_switch = {}

    def _after_step(self, trainer: Trainer, pl_module: QATModule) -> None:
        self._last_step = trainer.global_step
        config, store = pl_module.quant_config, pl_module.store
        assert store is not None
        if not config.enabled or trainer.global_step < config.start_step:
            return
        if self._losses_at_switch:
            store.update()
        else:
            self._switch(trainer, pl_module)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            store.check_finite()

    def _switch(self, trainer: Trainer, pl_module: QATModule) -> None:
        assert pl_module.store is not None
        pl_module.store.update()
        pl_module.store.check_finite()
        losses = self._evaluate(trainer, pl_module, PTQ, MASTER_AT_SWITCH)
        pl_module.report(losses)
        self._losses_at_switch = losses

    def _evaluate(self, trainer: Trainer, pl_module: QATModule, quantized: str, masters: str) -> dict[str, float]:
        assert pl_module.store is not None
        batches = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        found = {quantized: pl_module.evaluate(batches)}
        with pl_module.store.masters_only():
            found[masters] = pl_module.evaluate(batches)
        return {evaluation_metric(name, state): value for state in found for name, value in found[state].items()}
