"""What the segments of a run log is what one whole run logs: every metric at every step, with the same value, once."""

import csv
import signal
from pathlib import Path

from running import launch, metrics
from test_preemption import stop

OPTIONS = (
    "+recipe=quickstart", "trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1", "quant.start_step=2", "callbacks.scale_stats.every_n_steps=3", "callbacks.throughput=null",
    # What changed since the last look is not known after a stop.
    "callbacks.scale_stats.statistics.changes=null",
    "+callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.every_n_train_steps=2", "callbacks.checkpoint.save_top_k=-1",
    "callbacks.checkpoint.filename='{step}-{val/loss:.6f}'", "ckpt_path=auto",
)  # fmt: skip


def logged(run_dir: Path) -> list[tuple[str, int, str]]:
    """Name, step and value, of all files of the run."""
    return sorted(
        (name, int(row["step"]), value)
        for path in run_dir.glob("metrics*.csv")
        for row in csv.DictReader(path.open())
        for name, value in row.items()
        if name not in ("step", "epoch") and value
    )


def test_segments_log_what_one_run_logs(tmp_path: Path) -> None:
    """The metrics of a step in which a run was preempted were in no file, nor was the validation that followed it."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    launch(whole, *OPTIONS)
    # In step 4, which a validation follows; and by Ctrl-C in step 5, which none follows.
    assert launch(run_dir, *OPTIONS, *stop(signal.SIGTERM, 6), check=False).returncode == 75
    assert launch(run_dir, *OPTIONS, *stop(signal.SIGINT, 8), check=False).returncode == 130
    launch(run_dir, *OPTIONS)
    assert len(logged(whole)) >= 60
    assert logged(run_dir) == logged(whole)
    assert metrics(run_dir)["validations"] == metrics(whole)["validations"]
    saved = [{path.name for path in (folder / "checkpoints").glob("[0-9]*.ckpt")} for folder in (whole, run_dir)]
    assert saved[0] == saved[1]
    assert {name.partition("-")[0] for name in saved[0]} == {"2", "4", "6"}
