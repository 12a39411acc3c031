"""A sharded run that is killed, at a random step, in the middle of a checkpoint and before its export, ends as an uninterrupted one."""

import csv
import random
import signal
from pathlib import Path
from typing import Any

from running import assert_same, launch, metrics

from nvfp4_train.checkpoints import newest_complete, read_checkpoint, saved_step

STEPS = (
    "+recipe=quickstart",
    "trainer=fsdp2",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=5",
    "trainer.log_every_n_steps=1",
    "quant.start_step=2",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.checkpoint.save_top_k=-1",
    "logger=csv",
    "logger.csv.flush_logs_every_n_steps=1",
    "ckpt_path=auto",
)


def run(run_dir: Path, stop: str = "", forked: bool = True, **options: Any) -> str:
    """Output of two ranks under torchrun, that end by themselves or by the callback `stop` of stop_at_step."""
    callback = [f"+callbacks.stop._target_=stop_at_step.{stop}"] if stop else []
    callback += [f"+callbacks.stop.{name}={value}" for name, value in options.items()]
    result = launch(run_dir, *STEPS, *callback, ranks=2, check=not stop, forked=forked)
    assert bool(stop) == (result.returncode != 0)
    return result.stdout


def losses(run_dir: Path) -> dict[tuple[str, str], set[str]]:
    """All values logged for a metric and step, by all runs in the folder."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in run_dir.glob("metrics*.csv"):
        for row in csv.DictReader(file.open()):
            for name, value in row.items():
                if value and ("loss" in name or name == "train/grad_norm"):
                    found.setdefault((name, row["step"]), set()).add(value)
    return found


def test_a_run_killed_three_times_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    run(whole, forked=False)

    batch_idx = random.Random(str(tmp_path)).randrange(5, 12)
    print(f"SIGKILL at micro-batch {batch_idx}")
    run(run_dir, "StopAtStep", number=int(signal.SIGKILL), batch_idx=batch_idx)
    newest, _ = newest_complete(checkpoints)
    # The checkpoint of the last steps may or may not be complete.
    assert newest is None or saved_step(newest) in (2, 4)

    output = run(run_dir, "KillWhileSaving", name="step-0000006", rank=1)
    assert f"ckpt_path=auto: {newest or 'no checkpoint yet'}" in output
    cut_short = checkpoints / "step-0000006.ckpt.partial"
    newest, passed_over = newest_complete(checkpoints)
    assert (newest, [facts.path for facts in passed_over]) == (checkpoints / "step-0000004.ckpt", [cut_short])

    output = run(run_dir, "KillBeforeExport", rank=0)
    assert f"ckpt_path=auto: {cut_short} was cut short and is not used" in output
    assert f"ckpt_path=auto: {checkpoints / 'step-0000004.ckpt'}" in output
    assert newest_complete(checkpoints) == (checkpoints / "last.ckpt", [])
    assert not (run_dir / "export").exists()

    output = run(run_dir)
    assert f"ckpt_path=auto: {checkpoints / 'last.ckpt'}" in output
    ends = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, run_dir)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "hyper_parameters"):
        assert_same(ends[0][key], ends[1][key], key)
    assert losses(whole) == losses(run_dir)
    for file in (whole / "export").iterdir():
        assert file.read_bytes() == (run_dir / "export" / file.name).read_bytes(), file.name
    numbers = metrics(whole), metrics(run_dir)
    for name in numbers[0].keys() - {"train/tokens_per_s"}:
        assert numbers[0][name] == numbers[1][name], name
