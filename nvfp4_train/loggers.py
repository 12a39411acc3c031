"""The loggers of a run that may be stopped and continued: what each process of it logs is a segment of one run."""

import os
import shlex
from collections.abc import Mapping
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

OFFLINE = "offline-run-*"
"""Names of the folders that wandb writes while it is offline, one for each segment."""


class SegmentedWandbLogger(WandbLogger):
    """Lets the steps of wandb (not those of the trainer, which are an axis of their own) go on from one segment to the next.

    Online, wandb knows where the run stopped. Offline, each segment would begin at step 0 again, and rows of equal steps replace each
    other when they are uploaded. So the next step is kept in a file beside the segments.
    """

    @wraps(WandbLogger.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Lightning 2.6.6 passes an option, as None, that wandb no longer has and warns of.
        self._wandb_init.pop("anonymous", None)
        self._has_begun = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        run, counter = self.experiment, self._counter()
        if not self._has_begun:
            self._has_begun = True
            if (saved := _read(counter)) > run.step:
                # No row is written: it sets the step of the next one.
                run.log({}, step=saved)
        # A run that is killed in between leaves a gap, not two rows of one step. A run that is disabled has no folder.
        if counter.parent.is_dir():
            _write(counter, run.step + 1)
        super().log_metrics(metrics, step)

    def address(self) -> str | None:
        """Where the run is seen; None while it is offline or disabled."""
        # A disabled run has no such property, and an offline one warns where it is asked for its address.
        return None if getattr(self.experiment, "offline", True) else self.experiment.url

    def upload_command(self) -> str | None:
        """What uploads the segments that were logged offline, in their order; None where there are none."""
        folder = self._counter().parent
        waiting = [segment for segment in folder.glob(OFFLINE) if not any(segment.glob("*.synced"))]
        joined = f"  # joins its {len(waiting)} segments, with wandb 0.31 or later" if len(waiting) > 1 else ""
        return f"wandb sync {shlex.quote(str(folder))}/{OFFLINE}{joined}" if waiting else None

    def _counter(self) -> Path:
        return Path(self.save_dir or ".") / "wandb" / "next_step"


class SegmentedTensorBoardLogger(TensorBoardLogger):
    """Writes into the folder `save_dir`, a file of events for each segment."""

    def __init__(self, save_dir: str, *, max_queue: int = 10, flush_secs: int = 120) -> None:
        """`max_queue` events wait for `flush_secs` at most before they are written. Raises ValueError without TensorBoard."""
        if find_spec("tensorboard") is None:
            raise ValueError("the package tensorboard is not installed: pip install tensorboard")
        super().__init__(save_dir, name="", version="", default_hp_metric=False, max_queue=max_queue, flush_secs=flush_secs)
        self._continues_after: int | None = None

    def continue_after(self, step: int) -> None:
        """Let TensorBoard leave out what earlier segments logged of later steps. Call it before anything is logged."""
        self._continues_after = step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._continues_after is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # What SummaryWriter(purge_step=...) does, but in a file that only a run that logs something has.
            session = SessionLog(status=SessionLog.START)  # type: ignore[attr-defined]
            self.experiment.file_writer.add_event(Event(step=self._continues_after + 1, session_log=session))
            self._continues_after = None
        super().log_metrics(metrics, step)

    def save(self) -> None:
        """Write what waits. Lightning's own also writes a file of hyperparameters, which are in .hydra/."""
        if self._experiment is not None:
            self._experiment.flush()


def _read(counter: Path) -> int:
    try:
        return int(counter.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _write(counter: Path, step: int) -> None:
    temporary = counter.with_suffix(".tmp")
    temporary.write_text(f"{step}\n")
    os.replace(temporary, counter)
