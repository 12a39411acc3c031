"""Resets or freezes weights that go back and forth over a rounding edge, in the last part of training."""

import math
from typing import Any

from lightning import Callback, Trainer

from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.metrics import statistic_metric
from nvfp4_train.module import QATModule
from nvfp4_train.quant.oscillation import Oscillation, OscillationRule


class OscillationControl(Callback):
    """From step `from_share` * max_steps on, acts on oscillating weights at the end of every window of `every_n_steps` steps.

    Those have `min_reversals` or more in the window; a reversal is a flip of the code in the other direction than the flip before.
    `reset` sets their masters to the centre of their bin, from where the optimizer goes on. `freeze` sets them back to it after every
    step from then on. Without an action nothing is done, nor remembered. The share of all weights that was acted on is logged as
    `quant/oscillating_share`, that of frozen ones as `quant/frozen_share`.

    What is remembered, a byte a weight, is sharded as the weights are and lies in the checkpoints of the run. List it before the
    callback that quantizes: it takes the codes of the step before and the masters of this one, so that what it makes of them is
    quantized in the same step.
    """

    def __init__(
        self, *, action: str | None = None, from_share: float = 0.7, every_n_steps: int = 50, min_reversals: int = 2
    ) -> None:
        if not 0 <= from_share <= 1:
            raise ValueError(f"from_share must be 0 to 1, got {from_share}")
        self.rule = OscillationRule(action=action, every_n_steps=every_n_steps, min_reversals=min_reversals)
        self.from_share = from_share
        self._oscillation: Oscillation | None = None
        self._restored_first_step: int | None = None
        self._last_step = -1

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics that it reports."""
        if self.rule.action is None:
            return ()
        return ("oscillating_share", "frozen_share") if self.rule.action == "freeze" else ("oscillating_share",)

    def state_dict(self) -> dict[str, Any]:
        # Without steps left to train, a run saves what it has restored.
        first_step = self._restored_first_step if self._oscillation is None else self._oscillation.first_step
        return {} if first_step is None else {"first_step": first_step, "action": self.rule.action}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Under another action it begins anew: what was frozen is free again.
        self._restored_first_step = state_dict["first_step"] if state_dict["action"] == self.rule.action else None

    def setup(self, trainer: Trainer, pl_module: QATModule, stage: str) -> None:  # type: ignore[override]
        if self.rule.action is None:
            return
        config = pl_module.quant_config
        if not config.enabled:
            raise ValueError(f"callbacks.oscillation.action must be null where quant.enabled=false, got {self.rule.action}")
        trains = stage == "fit" and trainer.max_steps > 0
        if trains and config.scale_rule.is_fitted and config.refit_every != 1:
            # In between a block keeps its step from the scale of max, which moves with the magnitude that is written back.
            raise ValueError(
                f"callbacks.oscillation.action={self.rule.action} needs quant.refit_every=1 under quant.rule={config.rule}, got "
                f"{config.refit_every}: block scales that are not chosen anew would move the weights that it sets"
            )
        first_end = self._start(trainer, pl_module) + self.rule.every_n_steps
        if trains and first_end >= trainer.max_steps:
            raise ValueError(
                f"callbacks.oscillation.action={self.rule.action} acts first after step {first_end} (callbacks.oscillation.from_share, "
                f"every_n_steps; quant.start_step), which trainer.max_steps={trainer.max_steps} does not reach; lower every_n_steps"
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Requantize) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError("callbacks.oscillation must be listed before callbacks.requantize: it changes what is quantized")
        pl_module.keep_history()

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Every strategy has restored its checkpoint by now. Micro-batches before the first optimizer step change no weight.
        self._last_step = trainer.global_step
        if self.rule.action is None:
            return
        assert pl_module.store is not None
        # In a run that continues with more steps it may have to begin later than before.
        is_begun = trainer.global_step >= self._start(trainer, pl_module)
        first_step = self._restored_first_step if is_begun else None
        self._oscillation = Oscillation(pl_module.store, self.rule, first_step=first_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if self._oscillation is None or step == self._last_step:
            return
        self._last_step = step
        # The weights are not quantized yet: the codes are those of the step before.
        if step - 1 < self._start(trainer, pl_module):
            return
        if (found := self._oscillation.follow(step - 1)) is not None:
            # Without freezing there are no frozen ones.
            shares = zip(self.names, (found.acted_on, found.frozen), strict=False)
            pl_module.report({statistic_metric(name): share for name, share in shares})

    def _start(self, trainer: Trainer, pl_module: QATModule) -> int:
        return max(math.ceil(self.from_share * trainer.max_steps), pl_module.quant_config.start_step)
