"""Callbacks that send their own process a signal at a chosen moment: preemption and sudden death without races in a test."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from nvfp4_train.callbacks.export import Export
from nvfp4_train.saving import ShardedWriter


class StopAtStep(Callback):
    """Signals as the micro-batch `batch_idx` starts, on one rank only."""

    def __init__(self, *, number: int, batch_idx: int, rank: int = 0) -> None:
        self.number = signal.Signals(number)
        self.batch_idx = batch_idx
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class SignalBeforeTraining(Callback):
    """Signals when everything is made and restored, but before training starts."""

    def __init__(self, *, number: int) -> None:
        self.number = signal.Signals(number)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        setup_data = trainer.fit_loop.setup_data

        def signalled() -> None:
            os.kill(os.getpid(), self.number)
            setup_data()

        trainer.fit_loop.setup_data = signalled  # type: ignore[method-assign]


class KillWhileSaving(Callback):
    """Kills one rank when half of its shard of the sharded checkpoint `name` is written."""

    def __init__(self, *, name: str, rank: int) -> None:
        self.name = name
        self.rank = rank

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_data = ShardedWriter.write_data

        def write_half(writer: ShardedWriter, *args: Any) -> Any:
            written = write_data(writer, *args)
            if self.name in str(writer.path) and trainer.global_rank == self.rank:
                (shard,) = Path(writer.path).glob(f"__{self.rank}_*.distcp")
                os.truncate(shard, shard.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        ShardedWriter.write_data = write_half  # type: ignore[method-assign]


class KillBeforeExport(Callback):
    """Kills one rank when training has ended and its checkpoints are complete."""

    def __init__(self, *, rank: int) -> None:
        self.rank = rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        (export,) = (callback for callback in trainer.callbacks if isinstance(callback, Export))
        on_fit_end = export.on_fit_end

        def killed(*args: Any) -> None:
            if trainer.global_rank == self.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            on_fit_end(*args)

        export.on_fit_end = killed  # type: ignore[method-assign]
