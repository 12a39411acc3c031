"""Writes the report of a run at its end: run.json, report.html and report.md."""

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lightning import Callback, Trainer

from nvfp4_train.callbacks.run_record import FILE, earlier_times, run_record
from nvfp4_train.disk import replace_file
from nvfp4_train.errors import one_line
from nvfp4_train.module import QATModule
from nvfp4_train.report import write_report


class Report(Callback):
    """Draws what the files of the run folder say. A report that cannot be drawn costs a line, not the run.

    List it last: it reads what other callbacks have written. `command` is what started the run.
    """

    def __init__(self, *, run_dir: str, command: Sequence[str] | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.command = command or ()
        self._started = datetime.now(UTC)
        self._first_step: int | None = None
        """None where nothing was left to train."""
        self._start = self._steps_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._first_step = trainer.global_step
        self._start = pl_module.clock.now()

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._steps_s = pl_module.clock.now() - self._start

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        record = run_record(
            trainer,
            pl_module,
            command=self.command,
            started=self._started,
            first_step=trainer.global_step if self._first_step is None else self._first_step,
            steps_s=self._steps_s,
        )
        if not trainer.is_global_zero:
            return
        if self._first_step is None:
            record |= earlier_times(self.run_dir / FILE, trainer.global_step)
        try:
            replace_file(self.run_dir / FILE, json.dumps(record, indent=2) + "\n", what="the record of the run")
            for logger in trainer.loggers:
                logger.save()
            path = write_report(self.run_dir)
        # Whatever it is: the model is trained and exported, and the report can be made anew.
        except Exception as error:
            again = f"python launch/report.py {shlex.quote(str(self.run_dir))}"
            print(f"warning: no report ({type(error).__name__}: {one_line(error)}); {again} tries again", flush=True)
        else:
            print(f"  {'report':<16}{path}", flush=True)
