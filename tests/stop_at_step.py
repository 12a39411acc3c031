"""A callback that sends its own process a signal at a step: preemption and sudden death without races in a test."""

import os
import signal
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StopAtStep(Callback):
    """Signals as the micro-batch `batch_idx` starts, on one rank only."""

    def __init__(self, *, number: int, batch_idx: int, rank: int = 0) -> None:
        self.number = signal.Signals(number)
        self.batch_idx = batch_idx
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)
