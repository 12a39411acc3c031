"""A run that is preempted, killed, or left with half a checkpoint ends with the bits of an uninterrupted one."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from running import exit_codes, launch
from six_steps import STEPS, assert_same_end, trainer

from nvfp4_train.callbacks.preemption import EXIT_CODE, INTERRUPTED_EXIT_CODE

OPTIONS = (*STEPS, "callbacks.checkpoint.every_n_train_steps=2", "logger=none", "ckpt_path=auto")


def stop(number: int, batch_idx: int, rank: int = 0) -> tuple[str, ...]:
    return (
        "+callbacks.stop._target_=stop_at_step.StopAtStep",
        f"+callbacks.stop.number={int(number)}",
        f"+callbacks.stop.batch_idx={batch_idx}",
        f"+callbacks.stop.rank={rank}",
    )


@pytest.mark.parametrize("ranks", [0, 2], ids=["one process", "two ranks"])
def test_a_run_that_is_preempted_twice_and_killed(ranks: int, whole_run: Callable[[int], Path], tmp_path: Path) -> None:
    """A signal to one rank saves and ends all; a killed run continues from its newest whole checkpoint."""
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    first = launch(
        run_dir, *OPTIONS, trainer(ranks), *stop(signal.SIGTERM, 6, rank=max(ranks - 1, 0)), ranks=ranks, check=False
    )
    checkpoint = checkpoints / "preempted-step-0000004.ckpt"
    assert checkpoint.is_file(), first.stderr[-3000:]
    assert (run_dir / "preempted").read_text().strip() == str(checkpoint)
    if ranks:
        # torchrun names every rank that did not end with 0.
        assert first.returncode == 1
        assert exit_codes(first.stderr) == {EXIT_CODE}
    else:
        assert first.returncode == EXIT_CODE
    assert not (run_dir / "export").exists()

    number = signal.SIGUSR1 if ranks else signal.SIGINT
    second = launch(run_dir, *OPTIONS, trainer(ranks), *stop(number, 8), "data.num_workers=1", ranks=ranks, check=False)
    if number == signal.SIGINT:
        # Nobody starts an interrupted run again.
        assert second.returncode == INTERRUPTED_EXIT_CODE
        assert not (run_dir / "preempted").exists()
    assert f"ckpt_path=auto: {checkpoint}" in second.stdout
    checkpoint = checkpoints / "preempted-step-0000005.ckpt"
    assert list(checkpoints.glob("preempted-*")) == [checkpoint]

    batch_idx = random.Random(str(tmp_path)).randrange(10, 12)
    print(f"SIGKILL at micro-batch {batch_idx}")
    killed = launch(run_dir, *OPTIONS, trainer(ranks), *stop(signal.SIGKILL, batch_idx), ranks=ranks, check=False)
    assert killed.returncode not in (0, EXIT_CODE)
    assert f"ckpt_path=auto: {checkpoint}" in killed.stdout
    assert not (run_dir / "preempted").exists()

    newer = checkpoints / "step-0000006.ckpt"
    newer.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size * 2 // 3])
    resumed = launch(run_dir, *OPTIONS, trainer(ranks), ranks=ranks)
    assert f"ckpt_path=auto: {newer} was cut short and is not used" in resumed.stdout
    assert f"ckpt_path=auto: {checkpoint}" in resumed.stdout
    assert_same_end(whole_run(ranks), run_dir)


def test_a_signal_before_training_starts_saves_after_the_first_step(tmp_path: Path) -> None:
    """Lightning took it for the end of the run, which ended with exit code 0 and without a checkpoint."""
    signalled = ("+callbacks.stop._target_=stop_at_step.SignalBeforeTraining", f"+callbacks.stop.number={int(signal.SIGTERM)}")
    stopped = launch(tmp_path / "run", *OPTIONS, trainer(0), *signalled, check=False)
    assert stopped.returncode == EXIT_CODE, stopped.stderr[-3000:]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    assert checkpoint.name == "preempted-step-0000001.ckpt"
