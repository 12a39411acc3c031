"""Checkpoints at intervals, or the best ones by a metric, each of which is ranked by what was measured of its own step."""

import time
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from nvfp4_train.callbacks.preemption import Preempted
from nvfp4_train.errors import RunError
from nvfp4_train.module import QATModule
from nvfp4_train.saving import copy_checkpoint

_HELD_OUT = "val/"
"""What the names of metrics on held-out text begin with."""


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with the same options; but a metric on held-out text is never that of an earlier step.

    Where `monitor` or `filename` has one, a checkpoint that is due is written at the end of the next validation, which in most runs is
    the one of the same step. A value that is not finite is never among the best.
    """

    # No __init__ of its own: options are checked against the signature of Lightning's.
    _is_due = False
    """Whether the next validation writes a checkpoint."""
    _last_step = 0
    _has_trained = False

    @property
    def state_key(self) -> str:
        # Checkpoints know the state by the name of the class of Lightning.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"is_due": self._is_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._is_due = state_dict.get("is_due", False)
        # The files of some may be gone, if they were deleted after the checkpoint that the run is continued from; and fewer than
        # before may be asked for, of which the others then stay where they are.
        existing = [(path, score) for path, score in self.best_k_models.items() if Path(path).exists()]
        ranked = sorted(existing, key=lambda entry: entry[1].item(), reverse=self.mode == "max")
        self.best_k_models = dict(ranked[: self.save_top_k] if self.save_top_k > 0 else ranked)
        if self.best_k_models:
            self.best_model_path, *_, self.kth_best_model_path = *self.best_k_models, *self.best_k_models
            self.best_model_score, self.kth_value = (
                self.best_k_models[path] for path in (self.best_model_path, self.kth_best_model_path)
            )

    def setup(self, trainer: Trainer, pl_module: QATModule, stage: str) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._waits_for_validation:
            interval, micro_batches = trainer.val_check_interval, trainer.max_steps * trainer.accumulate_grad_batches
            if not trainer.limit_val_batches or (isinstance(interval, int) and interval > micro_batches > 0):
                raise ValueError(
                    f"a checkpoint with monitor={self.monitor} and filename={self.filename} needs a validation: "
                    f"trainer.val_check_interval must be at most trainer.max_steps * trainer.accumulate_grad_batches = "
                    f"{micro_batches} micro-batches, and trainer.limit_val_batches above 0, got val_check_interval={interval} and "
                    f"limit_val_batches={trainer.limit_val_batches}"
                )

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        super().on_train_start(trainer, pl_module)
        self._has_trained = True
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        if not self._waits_for_validation:
            super().on_train_batch_end(trainer, pl_module, *args)
        elif trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._is_due |= self._is_triggered(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # A run that ended between a step and its validation does that validation when it is continued.
        is_of_this_step = self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
        if not self._waits_for_validation or not (self._is_due or is_of_this_step):
            super().on_validation_end(trainer, pl_module)
        elif not self._should_skip_saving_checkpoint(trainer):
            self._is_due = False
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        super().on_fit_end(trainer, pl_module)
        # A run that was killed between its last two checkpoints, or lost the last one, has no step left to save behind.
        last, restored = Path(str(self.dirpath), f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"), trainer.ckpt_path
        if (
            self.save_last
            and not self._has_trained
            and trainer.is_global_zero
            and restored
            and not _is_same(last, Path(restored))
        ):
            copy_checkpoint(Path(restored), last)

    def on_exception(self, trainer: Trainer, pl_module: QATModule, exception: BaseException) -> None:  # type: ignore[override]
        # A run that was preempted has saved, and one that ends with a RunError cannot or must not.
        if not isinstance(exception, RunError | Preempted):
            super().on_exception(trainer, pl_module, exception)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        is_ranked = self.save_top_k == -1 or current is None or bool(current.isfinite())
        return is_ranked and super().check_monitor_top_k(trainer, current)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_top_k and self.monitor is not None and self.monitor not in monitor_candidates:
            raise RunError(
                f"monitor of a checkpoint must be one of {', '.join(sorted(monitor_candidates))}, got {self.monitor}"
            )
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    @property
    def _waits_for_validation(self) -> bool:
        return (self.monitor or "").startswith(_HELD_OUT) or f"{{{_HELD_OUT}" in (self.filename or "")

    def _is_triggered(self, trainer: Trainer) -> bool:
        if self._train_time_interval is None:
            return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
        assert self._last_time_checked is not None
        now = time.monotonic()
        # Clocks of ranks differ.
        is_time = bool(trainer.strategy.broadcast(now - self._last_time_checked >= self._train_time_interval.total_seconds()))
        if is_time:
            self._last_time_checked = now
        return is_time


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and path.samefile(other)
