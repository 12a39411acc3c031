"""Ends a run whose loss, gradients or weights are no longer finite, before a checkpoint of it replaces another."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from nvfp4_train.finite import Diverged, bad_weights, describe, kinds, largest_weights
from nvfp4_train.lightning_quirks import log_finished_step
from nvfp4_train.module import QATModule
from nvfp4_train.strategy import FullyShardedStrategy

_MOST_STEPS = 100
"""Steps of which losses and norms are kept on the device, where the trainer logs more rarely than that."""


@dataclass(frozen=True)
class _Step:
    number: int
    """Optimizer steps that are done with this one."""
    losses: list[Tensor]
    """Of its micro-batches, on this rank."""
    norms: Tensor
    """Of the gradient of each parameter [parameters] before it was clipped, on this rank."""


class Divergence(Callback):
    """Raises Diverged, which names the step and the tensor, on all ranks.

    The losses and the norms of gradients of every step stay on the device until the next look at them: when the trainer logs, before
    a checkpoint, before the switch to quantized weights and at the end of training. Weights are looked at then, and before the first
    step. List it before the callbacks that act on weights.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._losses: list[Tensor] = []
        self._last_step = -1
        self._has_looked = False

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Every strategy has restored its checkpoint by now.
        self._steps, self._losses, self._last_step = [], [], trainer.global_step
        self._check_start(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # The only hook of a run without steps.
        if not self._has_looked:
            self._check_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, outputs: Any, *args: Any) -> None:  # type: ignore[override]
        self._losses.append(outputs["loss"])
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._steps.append(_Step(step, self._losses, pl_module.gradient_norms))
        self._losses = []
        is_logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        is_switch = pl_module.quant_config.enabled and step == pl_module.quant_config.start_step
        if is_logged or is_switch or len(self._steps) == _MOST_STEPS:
            self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: QATModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._check(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Weights and training losses are finite, so the run goes on: the fault may be of the held-out text alone.
        bad = [name for name, value in trainer.callback_metrics.items() if name.startswith("val/") and not value.isfinite()]
        if bad and trainer.is_global_zero:
            print(f"step {trainer.global_step}: {', '.join(bad)} of the held-out text: not finite", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: QATModule, exception: BaseException) -> None:  # type: ignore[override]
        log_finished_step(trainer)

    def _check_start(self, trainer: Trainer, pl_module: QATModule) -> None:
        self._has_looked = True
        assert pl_module.model is not None
        if bad := bad_weights(pl_module.model):
            source = f"ckpt_path={trainer.ckpt_path}" if trainer.ckpt_path else "model.path"
            raise Diverged(f"{describe('the weight', bad)} before training begins; see {source}")

    def _check(self, trainer: Trainer, pl_module: QATModule) -> None:
        """Raise Diverged for the first step since the last look that had a NaN or Inf, or for the weights as they are."""
        assert pl_module.model is not None
        weights = {name: parameter for name, parameter in pl_module.model.named_parameters() if parameter.requires_grad}
        steps, self._steps = self._steps, []
        sizes = [size for step in steps for size in (len(step.losses), len(step.norms))]
        values = [part for step in steps for part in (torch.stack(step.losses), step.norms)]
        found = iter(kinds(torch.cat([part.float() for part in (*values, largest_weights(list(weights.values())))])))
        by_part = iter([list(islice(found, size)) for size in sizes])
        for step, losses, norms in zip(steps, by_part, by_part, strict=True):
            if any(losses):
                place, kind = next((place, kind) for place, kind in enumerate(losses, 1) if kind)
                of = f" of micro-batch {place} of {len(losses)}" if len(losses) > 1 else ""
                self._end(trainer, step.number, f"the loss{of} is not finite ({kind})")
            if any(norms):
                # The backward goes from the last parameter to the first, and a NaN that it meets goes with it.
                of_parameter = dict(zip(map(id, pl_module.trained_parameters), norms, strict=True))
                named = [(name, of_parameter.get(id(weight), "")) for name, weight in weights.items()]
                self._end(trainer, step.number, describe("the gradient of", [pair for pair in reversed(named) if pair[1]]))
        if bad := [(name, kind) for name, kind in zip(weights, found, strict=True) if kind]:
            self._end(trainer, trainer.global_step, describe("the weight", bad))

    @staticmethod
    def _end(trainer: Trainer, step: int, what: str) -> None:
        if isinstance(trainer.strategy, FullyShardedStrategy):
            # The one that is being written is of an earlier look, and finite.
            trainer.strategy.finish_checkpoint()
        last = _last_checkpoint(trainer)
        way_out = f"continue from {last} (ckpt_path=auto)" if last else "there is no checkpoint yet; start again"
        raise Diverged(f"step {step}: {what}; {way_out} with a lower optim.lr, or another trainer.gradient_clip_val")


def _last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint in the folders that the run writes to."""
    folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
    paths = [path for folder in folders if folder for path in Path(folder).glob("*.ckpt")]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)
