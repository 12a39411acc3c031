"""A run that is preempted, killed, or left with half a checkpoint ends with the bits of an uninterrupted one."""

import random
import signal
from pathlib import Path

import pytest
from running import assert_same, exit_codes, launch, load_checkpoint, metrics

from nvfp4_train.callbacks.preemption import EXIT_CODE, INTERRUPTED_EXIT_CODE

STEPS = (
    "+recipe=quickstart",
    "trainer.max_steps=6",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=5",
    "quant.start_step=2",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.checkpoint.save_top_k=-1",
    "logger=none",
    "ckpt_path=auto",
)


def stop(number: int, batch_idx: int, rank: int = 0) -> tuple[str, ...]:
    return (
        "+callbacks.stop._target_=stop_at_step.StopAtStep",
        f"+callbacks.stop.number={int(number)}",
        f"+callbacks.stop.batch_idx={batch_idx}",
        f"+callbacks.stop.rank={rank}",
    )


@pytest.fixture(scope="module", params=[0, 2], ids=["one process", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def trainer(ranks: int) -> str:
    return "trainer=ddp" if ranks else "trainer=cpu"


@pytest.fixture(scope="module")
def whole(ranks: int, trainer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    launch(run_dir, *STEPS, trainer, ranks=ranks)
    return run_dir


def assert_same_end(whole: Path, resumed: Path) -> None:
    ends = [load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, resumed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "hyper_parameters"):
        assert_same(ends[0][key], ends[1][key], key)
    for name in ("val/loss_master", "val/loss_quantized", "val/loss_ptq"):
        assert metrics(whole)[name] == metrics(resumed)[name], name


def test_a_signal_to_one_rank_saves_and_ends_all(ranks: int, trainer: str, whole: Path, tmp_path: Path) -> None:
    """In the middle of the window of step 4; then again, after the resumption, by another signal."""
    run_dir = tmp_path / "run"
    first = launch(run_dir, *STEPS, trainer, *stop(signal.SIGTERM, 6, rank=max(ranks - 1, 0)), ranks=ranks, check=False)
    checkpoint = run_dir / "checkpoints" / "preempted-step-0000004.ckpt"
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
    second = launch(run_dir, *STEPS, trainer, *stop(number, 8), "data.num_workers=1", ranks=ranks, check=False)
    if number == signal.SIGINT:
        # Nobody starts an interrupted run again.
        assert second.returncode == INTERRUPTED_EXIT_CODE
        assert not (run_dir / "preempted").exists()
    assert f"ckpt_path=auto: {checkpoint}" in second.stdout
    assert [path.name for path in run_dir.glob("checkpoints/preempted-*")] == ["preempted-step-0000005.ckpt"]

    launch(run_dir, *STEPS, trainer, ranks=ranks)
    assert not (run_dir / "preempted").exists()
    assert_same_end(whole, run_dir)


def test_a_killed_run_continues_from_its_newest_whole_checkpoint(ranks: int, trainer: str, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    batch_idx = random.Random(str(tmp_path)).randrange(8, 12)
    print(f"SIGKILL at micro-batch {batch_idx}")
    killed = launch(run_dir, *STEPS, trainer, *stop(signal.SIGKILL, batch_idx), ranks=ranks, check=False)
    assert killed.returncode not in (0, EXIT_CODE)
    newest = run_dir / "checkpoints" / "step-0000004.ckpt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size * 2 // 3])
    resumed = launch(run_dir, *STEPS, trainer, ranks=ranks)
    assert f"ckpt_path=auto: {newest} was cut short and is not used" in resumed.stdout
    assert f"ckpt_path=auto: {run_dir}/checkpoints/step-0000002.ckpt" in resumed.stdout
    assert_same_end(whole, run_dir)
