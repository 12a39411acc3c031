"""Holds or resets weights that go back and forth over a rounding edge, in the last part of training."""

import math
from typing import Any

from lightning import Callback, Trainer

from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.kernels.code_history import MOST_REVERSALS
from nvfp4_train.metrics import statistic_metric
from nvfp4_train.module import QATModule
from nvfp4_train.quant.oscillation import ACTIONS, Oscillation


class OscillationControl(Callback):
    """From step `from_share` * max_steps on, acts every `every_n_steps` steps on weights with `min_reversals` or more since the last time.

    A reversal is a flip of a weight's code in the other direction than its flip before. `reset` sets the masters of such weights to the
    centre of their bin, once; the optimizer goes on from there. `freeze` sets them back to it after every step from then on. Without an
    action nothing is done, nor remembered. Which share of all weights was acted on is logged as `quant/oscillating_share`, and how many
    are frozen as `quant/frozen_share`.

    What is remembered, a byte a weight, is sharded as the weights are, and lies in the checkpoints of the run. List it before the
    callback that quantizes: it works on the codes of the step before and on the masters of this one, so that what it does to them is
    quantized in the same step.
    """

    def __init__(
        self, *, action: str | None = None, from_share: float = 0.7, every_n_steps: int = 50, min_reversals: int = 2
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be null, reset or freeze, got {action!r}")
        if not 0 <= from_share <= 1:
            raise ValueError(f"from_share must be 0 to 1, got {from_share}")
        if not 1 <= min_reversals <= MOST_REVERSALS:
            raise ValueError(f"min_reversals must be 1 to {MOST_REVERSALS}, got {min_reversals}")
        if every_n_steps <= min_reversals:
            raise ValueError(
                f"every_n_steps must be above min_reversals={min_reversals}: so many reversals take one flip more, got {every_n_steps}"
            )
        self.action = action
        self.from_share = from_share
        self.every_n_steps = every_n_steps
        self.min_reversals = min_reversals
        self._first_step: int | None = None
        """The step of the first codes that are remembered; None before."""
        self._oscillation: Oscillation | None = None
        self._last_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {} if self._first_step is None else {"first_step": self._first_step, "action": self.action}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Weights that another action has frozen are free again: the window begins anew.
        self._first_step = state_dict["first_step"] if state_dict.get("action") == self.action else None

    def setup(self, trainer: Trainer, pl_module: QATModule, stage: str) -> None:  # type: ignore[override]
        if self.action is None:
            return
        if not pl_module.quant_config.enabled:
            raise ValueError(f"callbacks.oscillation.action must be null where quant.enabled=false, got {self.action}")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Requantize) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError("callbacks.oscillation must be listed before callbacks.requantize: it changes what is quantized")
        pl_module.keep_history()

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Every strategy has restored its checkpoint by now. Micro-batches before the first optimizer step change no weight.
        self._last_step = trainer.global_step
        if self._last_step < self._start(trainer, pl_module):
            # In a run that continues with more steps it begins later than before.
            self._first_step = None
        if self.action is not None:
            assert pl_module.store is not None
            self._oscillation = Oscillation(pl_module.store, min_reversals=self.min_reversals)

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if self._oscillation is None or step == self._last_step:
            return
        self._last_step = step
        # The codes are those of the step before.
        codes_of = step - 1
        assert pl_module.store is not None
        if codes_of < self._start(trainer, pl_module) or not pl_module.store.is_enabled:
            return
        if self._first_step is None:
            self._first_step = codes_of
            self._oscillation.begin()
            return
        ends_window = (codes_of - self._first_step) % self.every_n_steps == 0
        self._oscillation.step(ends_window=ends_window, action=self.action)
        if ends_window:
            found = self._oscillation.shares()
            shares = {"oscillating_share": found.acted_on}
            if self.action == "freeze":
                shares["frozen_share"] = found.frozen
            pl_module.report({statistic_metric(name): share for name, share in shares.items()})

    def _start(self, trainer: Trainer, pl_module: QATModule) -> int:
        return max(math.ceil(self.from_share * trainer.max_steps), pl_module.quant_config.start_step)
