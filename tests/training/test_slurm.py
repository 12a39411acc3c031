"""launch/slurm.sbatch, with the commands of Slurm replaced by what they do on one node."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT, SMALL, forked_python, load_checkpoint, metrics, train_environment

FAKES = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi',
    "squeue": "echo RUNNING",
}


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm runs on Linux")
def test_a_job_is_requeued_with_its_checkpoint_and_then_finishes(tmp_path: Path) -> None:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    run_dir, requeued = tmp_path / "run", tmp_path / "requeued"
    # torchrun itself is started as it is: what Slurm signals are the processes below the job.
    _, ranks = forked_python()
    environment = train_environment() | ranks | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "REQUEUED": str(requeued), "RUN_DIR": str(run_dir),
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    options = ("+recipe=quickstart", "trainer=ddp", "trainer.accelerator=cpu", *SMALL, "logger=none", "quant.start_step=0")
    job = ["bash", ROOT / "launch" / "slurm.sbatch", *options]

    first = subprocess.Popen(
        [*job, "trainer.max_steps=100000", "callbacks.checkpoint.every_n_train_steps=2"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/step-*.ckpt")):
        assert first.poll() is None, first.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # Slurm signals every process of the step, torchrun and the shells among them.
    for pid in list(descendants(first.pid)):
        os.kill(pid, signal.SIGUSR1)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 75, output[-3000:]
    assert requeued.read_text() == "requeue 4711\n"
    (checkpoint,) = run_dir.glob("checkpoints/preempted-*.ckpt")
    step = load_checkpoint(checkpoint)["global_step"]

    failing = subprocess.run([*job, "model.path=/nonexistent"], env=environment, capture_output=True, text=True)
    assert failing.returncode not in (0, 75)
    assert requeued.read_text() == "requeue 4711\n", "that an earlier start was preempted is no reason to requeue a failure"

    second = subprocess.run([*job, f"trainer.max_steps={step + 2}"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"ckpt_path=auto: {checkpoint}" in second.stdout
    assert metrics(run_dir)["step"] == step + 2
    assert requeued.read_text() == "requeue 4711\n", "a job that is done stays done"
