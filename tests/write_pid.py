"""A callback by which a process of a run says who it is, so that a fault can be aimed at one rank."""

import os
from pathlib import Path

from lightning import Callback, LightningModule, Trainer


class WritePid(Callback):
    """Writes the process id of every rank to `folder`/RANK."""

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{trainer.global_rank}"
        partial.write_text(str(os.getpid()))
        partial.rename(self.folder / str(trainer.global_rank))
