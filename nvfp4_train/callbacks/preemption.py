"""Preemption: on SIGTERM or SIGUSR1 a run saves a checkpoint at the end of its optimizer step and ends with exit code 75.

Ctrl-C (SIGINT) does the same with exit code 130, which nobody takes for a request to be started again; a second one ends at once.
Lightning's own handling ends a run between two micro-batches, without a checkpoint and with exit code 0, and issues a collective
from inside the signal handler, which deadlocks where ranks are signalled one after the other.
"""

import atexit
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import distributed

from nvfp4_train.errors import RunError
from nvfp4_train.lightning_quirks import drop_sigterm_agreement, keep_signal_handlers, log_finished_step
from nvfp4_train.module import QATModule
from nvfp4_train.saving import remove
from nvfp4_train.strategy import FullyShardedStrategy, timeout_of

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. 143 would not tell a saved run from one that SIGTERM killed."""

INTERRUPTED_EXIT_CODE = 130
"""Exit code of a shell whose command ended by SIGINT. It is above `EXIT_CODE`, so that it wins where ranks got both signals."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SECOND_INTERRUPT_S = 2.0
"""Seconds from which on a further SIGINT is the user's. Before, it is the terminal's first one, which torchrun passes on as well."""


def _ignore(numbers: Iterable[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


class Preempted(SystemExit):
    """The checkpoint is saved, and every rank ends with the exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)


class Preemption(Callback):
    """A signal to any one rank stops all ranks after the same optimizer step.

    The ranks agree over a gloo group while the last micro-batch computes, so that nothing waits for the device. The checkpoint is
    `dirpath`/preempted-step-N.ckpt; it replaces those of earlier preemptions. Then the file `marker` appears, for launchers that
    lose the exit code of a rank (torchrun ends with 1 whatever its ranks end with); the next run removes it.
    """

    def __init__(self, *, dirpath: str, marker: str) -> None:
        self.dirpath = Path(dirpath)
        self.marker = Path(marker)
        self._is_running = False
        self._is_ending = False
        """Whether nothing is left but to end; signals no longer matter then."""
        self._exit_code = 0
        """The exit code that this rank was asked to end with; 0 if it was not asked."""
        self._interrupted_at = 0.0
        self._request = torch.zeros(1, dtype=torch.int32)
        self._group: distributed.ProcessGroup | None = None
        self._agreement: distributed.Work | None = None
        self._last_step = -1

    def setup(self, trainer: Trainer, pl_module: QATModule, stage: str) -> None:  # type: ignore[override]
        if stage == "fit":
            self._is_running = True
            self._is_ending = False
            self._exit_code = 0
            keep_signal_handlers(trainer)
            self._install()

    def on_fit_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            self.marker.unlink(missing_ok=True)
        if distributed.is_available() and distributed.is_initialized() and trainer.world_size > 1:
            # By default it would wait half an hour for a rank that hangs, whatever the strategy says.
            self._group = distributed.new_group(backend="gloo", timeout=timeout_of(trainer))
            drop_sigterm_agreement(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # Before training there is nothing to save.
        signal.signal(signal.SIGINT, self._handle)
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: QATModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self._group is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._request.fill_(self._exit_code)
            self._agreement = distributed.all_reduce(self._request, distributed.ReduceOp.MAX, self._group, async_op=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self._agreement is not None:
            self._agreement.wait()
            self._agreement = None
            exit_code = int(self._request.item())
        else:
            exit_code = self._exit_code
        # After the last step the run ends by itself.
        if exit_code and trainer.global_step < trainer.max_steps:
            self._save(trainer, exit_code)
            raise Preempted(exit_code)

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: QATModule, exception: BaseException) -> None:  # type: ignore[override]
        log_finished_step(trainer)
        self._stop()
        if isinstance(exception, RunError):
            # torchrun signals the ranks that have not ended when the first one has. They have an error to print.
            self._is_ending = True
            atexit.register(_ignore, SIGNALS)

    def _stop(self) -> None:
        self._is_running = False
        if signal.getsignal(signal.SIGINT) == self._handle and not self._is_ending:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._is_running and number == signal.SIGINT:
            if not self._interrupted_at:
                self._interrupted_at = time.monotonic()
            elif time.monotonic() - self._interrupted_at > _SECOND_INTERRUPT_S:
                signal.default_int_handler(number, frame)
            self._exit_code = INTERRUPTED_EXIT_CODE
        elif self._is_running:
            self._exit_code = max(self._exit_code, EXIT_CODE)
        elif not self._is_ending:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _save(self, trainer: Trainer, exit_code: int) -> None:
        path = self.dirpath / f"preempted-step-{trainer.global_step:07d}.ckpt"
        # The checkpoint is complete before this returns on any rank.
        trainer.save_checkpoint(path)
        if isinstance(trainer.strategy, FullyShardedStrategy):
            trainer.strategy.finish_checkpoint()
        # The first rank to end makes torchrun signal the others, which must end with the same code nevertheless. Python removes
        # signal handlers before it has ended.
        self._is_ending = True
        atexit.register(_ignore, (*SIGNALS, signal.SIGINT))
        if trainer.is_global_zero:
            for earlier in self.dirpath.glob("preempted-step-*.ckpt"):
                if earlier != path:
                    remove(earlier)
            if exit_code == EXIT_CODE:
                self.marker.write_text(f"{path}\n")
            print(f"\nstopped after step {trainer.global_step}; saved {path}", flush=True)
        trainer.strategy.barrier("preempted")
