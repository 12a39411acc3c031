"""Switches the forward to quantized weights at `quant.start_step`, and quantizes anew after every optimizer step."""

from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from nvfp4_train.finite import Diverged
from nvfp4_train.lightning_quirks import back_to_device, run_missing_validation
from nvfp4_train.losses.base import num_positions
from nvfp4_train.metrics import (
    MASTER,
    MASTER_AT_SWITCH,
    PTQ,
    QUANTIZED,
    VAL_LOSS_QUANTIZED,
    evaluated_state,
    evaluation_metric,
)
from nvfp4_train.models.prepare import first_sequences
from nvfp4_train.module import QATModule
from nvfp4_train.progress import progress_bar
from nvfp4_train.quant.calibration import Batch, check_num_tokens
from nvfp4_train.quant.policy import SERVINGS
from nvfp4_train.quant.store import WeightStore
from nvfp4_train.ranks import sum_over_ranks
from nvfp4_train.sequence_metrics import SequenceMetrics, check_num_positions

Measured = dict[str | None, SequenceMetrics]
"""By serving; None is the one that was trained."""


class Requantize(Callback):
    """Decides when weights are quantized, and when a fitted rule chooses anew.

    At the switch the model is calibrated and equalized once. Held-out metrics are reported of the masters before that and of the
    quantized model after it (that is PTQ), and of both at the end of training (that is QAT). The quantized model is measured as it
    was trained, and after a calibration under every serving. With `quant.enabled=false` all of this happens at the end.
    """

    def __init__(self) -> None:
        self._last_step = -1
        self._has_switched = False
        self._metrics_at_switch: dict[str, float] = {}
        self._sequences_at_switch: dict[str, SequenceMetrics] = {}
        """The same sequence by sequence, see `QATModule.sequences`."""
        self._measured_by: dict[str, Any] = {}
        """What the metrics at the switch are of."""

    def state_dict(self) -> dict[str, Any]:
        # Checkpoints know the metrics by the name that they had when they were losses alone.
        return {
            "losses_at_switch": self._metrics_at_switch,
            "sequences_at_switch": {state: found.to_dict() for state, found in self._sequences_at_switch.items()},
            "has_switched": self._has_switched,
            "measured_by": self._measured_by,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._metrics_at_switch = dict(state_dict["losses_at_switch"])
        # Checkpoints of earlier versions have means alone.
        saved = state_dict.get("sequences_at_switch", {})
        self._sequences_at_switch = {state: SequenceMetrics.from_dict(found) for state, found in saved.items()}
        self._has_switched = state_dict.get("has_switched", bool(self._metrics_at_switch))
        self._measured_by = dict(state_dict.get("measured_by", {}))

    def setup(self, trainer: Trainer, pl_module: QATModule, stage: str) -> None:  # type: ignore[override]
        config = pl_module.quant_config
        if stage == "fit" and config.enabled and config.start_step > trainer.max_steps:
            raise ValueError(
                f"quant.start_step must be at most trainer.max_steps, got start_step={config.start_step} and "
                f"max_steps={trainer.max_steps}; with quant.enabled=false the run trains without quantization"
            )

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Every strategy has restored its checkpoint by now.
        start_step = pl_module.quant_config.start_step
        if trainer.global_step < start_step:
            if self._has_switched:
                pl_module.print(
                    f"quant.start_step={start_step}: quantization, which had begun before this checkpoint, begins anew"
                )
            self._has_switched = False
            self._forget_switch()
        self._forget_other_measures(trainer, pl_module)
        self._after_step(trainer, pl_module)
        if not self._has_switched:
            # Else the run would find out at the switch.
            self._check_data(trainer, pl_module)

    def _forget_other_measures(self, trainer: Trainer, pl_module: QATModule) -> None:
        """Drop metrics at the switch that were measured otherwise, see `measure_of`: those of the end would be no pair with them."""
        if others := changed(self._measured_by, measure_of(trainer, pl_module)):
            pl_module.print(
                f"what was measured at the switch is left out: {' and '.join(others)} changed since, so the end cannot be compared"
            )
            self._forget_switch()

    def _forget_switch(self) -> None:
        self._metrics_at_switch, self._sequences_at_switch = {}, {}

    @staticmethod
    def _check_data(trainer: Trainer, pl_module: QATModule) -> None:
        """Raise ValueError where the model could not be calibrated, or no held-out position counts."""
        if num_sequences := pl_module.quant_config.calibration.sequences:
            batches = _calibration_batches(trainer, num_sequences)
            own = sum(batch["input_ids"].numel() for batch, is_counted in batches if is_counted)
            check_num_tokens(int(sum_over_ranks({"tokens": own})["tokens"]))
        held_out: Any = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        own = sum(num_positions(batch) for batch in held_out)
        check_num_positions(sum_over_ranks({"positions": own})["positions"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step != self._last_step:
            self._after_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # The last checkpoint follows. That of a run without quantization holds the masters that were trained, not equalized.
        if pl_module.quant_config.enabled:
            self._report_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # A run that continues from its last step does not train, and the other hooks are not called.
        if VAL_LOSS_QUANTIZED not in pl_module.results:
            back_to_device(trainer)
            self._forget_other_measures(trainer, pl_module)
            if self._has_switched:
                pl_module.update()
            run_missing_validation(trainer)
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
            pl_module.update()

    def _report_end(self, trainer: Trainer, pl_module: QATModule) -> None:
        assert pl_module.store is not None
        if not self._has_switched:
            quantized = self._switch(trainer, pl_module)
        else:
            if not pl_module.store.is_enabled:
                pl_module.update()
            quantized = _measure_quantized(trainer, pl_module)
        with pl_module.store.masters_only():
            masters = _measure(trainer, pl_module)
        pl_module.results |= self._metrics_at_switch
        pl_module.sequences = self._sequences_at_switch | _by_state(quantized, QUANTIZED) | _by_state(masters, MASTER)
        pl_module.report(_means(quantized, QUANTIZED) | _means(masters, MASTER))

    def _after_step(self, trainer: Trainer, pl_module: QATModule) -> None:
        self._last_step = trainer.global_step
        config, store = pl_module.quant_config, pl_module.store
        assert store is not None
        if not config.enabled or trainer.global_step < config.start_step:
            return
        if not self._has_switched:
            self._switch(trainer, pl_module)
        else:
            # A store that is not enabled belongs to a run that continues: its choices are those of the checkpoint.
            pl_module.update(refit=store.is_enabled and trainer.global_step % config.refit_every == 0)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            _check_finite(store)

    def _switch(self, trainer: Trainer, pl_module: QATModule) -> Measured:
        """Begin with quantization. Returns what is measured of the quantized model."""
        assert pl_module.store is not None
        masters = _measure(trainer, pl_module)
        if num_sequences := pl_module.quant_config.calibration.sequences:
            notes = pl_module.prepare(
                _calibration_batches(trainer, num_sequences), progress_bar("calibration", is_shown=trainer.is_global_zero)
            )
            if trainer.is_global_zero:
                print("\n".join(notes), flush=True)
        pl_module.update(refit=True)
        _check_finite(pl_module.store)
        quantized = _measure_quantized(trainer, pl_module)
        self._has_switched = True
        self._metrics_at_switch = _means(masters, MASTER_AT_SWITCH) | _means(quantized, PTQ)
        self._sequences_at_switch = _by_state(masters, MASTER_AT_SWITCH) | _by_state(quantized, PTQ)
        self._measured_by = measure_of(trainer, pl_module)
        pl_module.report(self._metrics_at_switch)
        return quantized


def measure_of(trainer: Trainer, pl_module: QATModule) -> dict[str, Any]:
    """What makes two validation losses comparable, where it is known."""
    quant = pl_module.quant_config
    found = {
        "the held-out text": getattr(trainer.datamodule, "held_out_fingerprint", None),  # type: ignore[attr-defined]
        "the loss": pl_module.options.get("loss"),
        "the dtype of the computation": str(pl_module.compute_dtype),
        "the quantization": [quant.enabled, quant.rule, quant.global_scale, quant.activations],
    }
    return {name: value for name, value in found.items() if value is not None}


def changed(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Names of what is another in two results of `measure_of`."""
    return [name for name in saved.keys() & ours.keys() if saved[name] != ours[name]]


def _check_finite(store: WeightStore) -> None:
    """Raise Diverged where weights are not finite; it is `callbacks.divergence` that says in which step that began."""
    try:
        store.check_finite()
    except ValueError as error:
        raise Diverged(str(error)) from None


def _measure(trainer: Trainer, pl_module: QATModule, serving: str | None = None) -> Measured:
    shown = progress_bar("evaluation", is_shown=trainer.is_global_zero)
    return {serving: pl_module.measure(shown(trainer.datamodule.val_dataloader()))}  # type: ignore[attr-defined]


def _measure_quantized(trainer: Trainer, pl_module: QATModule) -> Measured:
    """As trained, and after a calibration under every serving."""
    trained = pl_module.quant_config.trained_serving
    measured = _measure(trainer, pl_module)
    if pl_module.is_calibrated:
        measured[trained] = measured[None]
        for serving in SERVINGS.keys() - {trained}:
            with pl_module.serving(serving):
                measured |= _measure(trainer, pl_module, serving)
    return measured


def _by_state(measured: Measured, state: str) -> dict[str, SequenceMetrics]:
    return {evaluated_state(state, serving): found for serving, found in measured.items()}


def _means(measured: Measured, state: str) -> dict[str, float]:
    return {
        evaluation_metric(name, state, serving): value
        for serving, found in measured.items()
        for name, value in found.means().items()
    }


def _calibration_batches(trainer: Trainer, num_sequences: int) -> list[tuple[Batch, bool]]:
    """This rank's sequences, those that the data module chooses or else the first ones that the rank trains on."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(data, "calibration_batches"):
        return data.calibration_batches(num_sequences)
    return first_sequences(data.train_dataloader(), -(-num_sequences // trainer.world_size))
