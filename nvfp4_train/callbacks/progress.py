"""How far training and validation are, in the way of all long phases: a bar at a terminal, a line a minute elsewhere."""

from contextlib import ExitStack
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from nvfp4_train.progress import Progress, printing_above_bars, progress


class TrainingProgress(ProgressBar):
    """Optimizer steps with the last logged loss, and the batches of every validation, on rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self._is_shown = True
        self._training: Progress | None = None
        self._validation: Progress | None = None
        self._open = ExitStack()
        self._last_step = 0
        self._last_loss: Any = None

    def disable(self) -> None:
        self._is_shown = False

    def enable(self) -> None:
        self._is_shown = True

    @property
    def is_enabled(self) -> bool:
        """Whether lines of the run are printed by `print`, past the bar."""
        return self._is_shown

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        bar = progress("training", total=trainer.max_steps, start=self._last_step, is_shown=self._is_shown)
        self._training = self._open.enter_context(bar)
        if self._is_shown:
            self._open.enter_context(printing_above_bars())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning has just waited for the device if it logged, and nothing runs there now: reading the loss costs no other wait.
        loss = trainer.logged_metrics.get("train/loss")
        if self._training is not None and self._is_shown and loss is not None and loss is not self._last_loss:
            self._last_loss = loss
            self._training.note(f"loss {float(loss):.4f}")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        if self._training is not None:
            self._training.advance(trainer.global_step - self._last_step)
        self._last_step = trainer.global_step
        if self._last_step >= trainer.max_steps:
            self._open.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number = int(sum(trainer.num_val_batches))
        self._validation = progress("validation", total=number, unit="batches", is_shown=self._is_shown)

    def on_validation_batch_end(self, *args: Any) -> None:  # type: ignore[override]
        if self._validation is not None:
            self._validation.advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation is not None:
            self._validation.close()
