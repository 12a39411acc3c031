"""A callback that makes a number NaN or Inf at a chosen step."""

import torch
from lightning import Callback, LightningModule, Trainer


class BreakStep(Callback):
    """Puts `value` into the loss, or into the gradient or the weight of the parameter `name`, in the optimizer step `step`.

    Steps count from 1. Only on the rank `rank`; a loss is broken in the last micro-batch, without its gradients.
    """

    def __init__(self, *, step: int, what: str, value: float, name: str = "", rank: int = 0) -> None:
        self.step = step
        self.what = what
        self.value = value
        self.name = name
        self.rank = rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.what == "loss":
            training_step = pl_module.training_step

            def broken(batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
                loss = training_step(batch, batch_idx)
                is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
                return loss + self.value if self._is_now(trainer) and is_last else loss

            pl_module.training_step = broken  # type: ignore[method-assign]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if self.what == "gradient" and self._is_now(trainer):
            gradient = pl_module.model.get_parameter(self.name).grad
            own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            own.view(-1)[0] = self.value

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        if self.what == "weight" and self._is_now(trainer) and is_first:
            weight = pl_module.model.get_parameter(self.name).detach()
            own = weight.to_local() if hasattr(weight, "to_local") else weight
            own.view(-1)[0] = self.value

    def _is_now(self, trainer: Trainer) -> bool:
        return trainer.global_step + 1 == self.step and trainer.global_rank == self.rank
