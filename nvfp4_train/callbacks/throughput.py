"""Tokens per second of training, evaluation and reports excluded, and the memory that training takes."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from nvfp4_train.metrics import PEAK_GIB, TOKENS_PER_S
from nvfp4_train.module import QATModule


class Throughput(Callback):
    """Logs `train/tokens_per_s` over all ranks; the final number leaves out the first optimizer step, which warms up.

    On GPUs the end reports `memory/peak_gib`, the most that tensors took on any one of them since training began.
    """

    def __init__(self) -> None:
        self._pause = ExitStack()
        self._first_step = self._last_step = 0
        self._start = self._interval_start = 0.0
        self._tokens = self._interval_tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._last_step = trainer.global_step
        self._first_step = trainer.global_step + 1
        self._start = self._interval_start = pl_module.clock.now()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: QATModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        tokens = batch["input_ids"].numel() * trainer.world_size
        self._tokens += tokens
        self._interval_tokens += tokens
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step == self._first_step and step < trainer.max_steps:
            self._start = self._interval_start = pl_module.clock.now()
            self._tokens = self._interval_tokens = 0
        elif step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            now = pl_module.clock.now()
            pl_module.log(TOKENS_PER_S, self._interval_tokens / (now - self._interval_start), prog_bar=True)
            self._interval_start, self._interval_tokens = now, 0

    def on_validation_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._pause.enter_context(pl_module.clock.paused())

    def on_validation_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._pause.close()

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        elapsed = pl_module.clock.now() - self._start
        if self._tokens:
            pl_module.report({TOKENS_PER_S: self._tokens / elapsed})
        if pl_module.device.type == "cuda":
            peak = torch.tensor(torch.cuda.max_memory_allocated(pl_module.device) / 2**30, device=pl_module.device)
            pl_module.report({PEAK_GIB: trainer.strategy.reduce(peak, reduce_op="max").item()})  # type: ignore[union-attr]
