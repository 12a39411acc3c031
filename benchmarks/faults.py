"""Runs that are killed, stopped and damaged at random moments end with the bits of a run that nothing happened to.

    python benchmarks/faults.py --trials 50 --seed 0

A trial starts a run of two or three seconds of training, on one rank or on two (DDP, FSDP2), lets one fault happen, or two, at random
moments from its start to its end, and continues it by the same command with ckpt_path=auto until it ends by itself. Then its last
checkpoint (weights, optimizer, schedule, step), its export and its validations are compared with those of the uninterrupted run of the
same ranks. The faults:

    SIGKILL        to the whole run
    SIGTERM        to one rank, or to the launcher: preemption
    dead rank      SIGKILL to one of two ranks
    hung rank      a rank stops for good: the others end by the timeout of their collectives; or it goes on after seconds
    full disk      the run folder is a disk on which a checkpoint or the export does not fit; later there is room (needs root: tmpfs)
    damaged file   SIGKILL, then a file of the newest checkpoint is cut, or a bit of it flipped

Ends with 1 where a trial differs, or did not end in six starts. Runs are forked from one process that has imported everything.
"""

import argparse
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from running import assert_same, forked_python, metrics, train_command, train_environment  # noqa: E402

from nvfp4_train.checkpoints import read_checkpoint  # noqa: E402

STEPS = (
    "+recipe=quickstart",
    "trainer.max_steps=16",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=1",
    "quant.start_step=4",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.checkpoint.save_top_k=-1",
    "callbacks.scale_stats.every_n_steps=4",
    "ckpt_path=auto",
)
TIMEOUT_S = 15
TIMEOUT = f"+trainer.strategy.timeout={{_target_: datetime.timedelta, seconds: {TIMEOUT_S}}}"
SETUPS = {
    "1 rank": (0, ("trainer=cpu",)),
    "2 ranks, DDP": (2, ("trainer=ddp", TIMEOUT)),
    "2 ranks, FSDP2": (2, ("trainer=fsdp2", TIMEOUT)),
}
MOST_STARTS = 6


@dataclass
class Run:
    """A run folder, and the process that is in it."""

    folder: Path
    setup: str
    accelerator: str
    process: subprocess.Popen[str] | None = None

    @property
    def ranks(self) -> int:
        return max(1, SETUPS[self.setup][0])

    def start(self) -> None:
        shutil.rmtree(self.pids, ignore_errors=True)
        ranks, trainer = SETUPS[self.setup]
        callback = ("+callbacks.pid._target_=write_pid.WritePid", f"+callbacks.pid.folder={self.pids}")
        python, server = forked_python()
        torchrun = ("--standalone", "--nproc-per-node", str(ranks)) if ranks else ()
        options = (*STEPS, *trainer, f"trainer.accelerator={self.accelerator}", *callback)
        command = train_command(self.folder, *options, torchrun=torchrun, python=python)
        with self.log.open("a") as log:
            log.write("=== start\n")
            log.flush()
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, text=True, cwd=ROOT, env=train_environment() | server, start_new_session=True
            )

    @property
    def pids(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.pids")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def wait(self, timeout_s: float) -> int | None:
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout_s)
        return None

    def signal(self, number: int, rank: int | None = None) -> bool:
        """Signal a rank, or the process that was started. Returns whether it had begun."""
        assert self.process is not None
        pid = self.process.pid
        if rank is not None:
            try:
                pid = int((self.pids / str(rank)).read_text())
            except FileNotFoundError:
                return False
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return True

    def kill(self) -> None:
        assert self.process is not None
        for rank in range(self.ranks):
            self.signal(signal.SIGKILL, rank)
        self.process.kill()
        # Ranks that have not said who they are; where processes are forked they end with the one that was started.
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if f"run_dir={self.folder}".encode() in command.read_bytes().split(b"\0"):
                    os.kill(int(command.parent.name), signal.SIGKILL)
        self.process.wait()


def kill(run: Run, draw: random.Random) -> None:
    run.kill()


def terminate(run: Run, draw: random.Random) -> None:
    if not run.signal(signal.SIGTERM, draw.choice([None, *range(run.ranks)])):
        run.signal(signal.SIGTERM)
    # torchrun itself waits for half a minute.
    if run.wait(90) is None:
        raise AssertionError("SIGTERM did not end the run in 90 s")


def kill_one(run: Run, draw: random.Random) -> None:
    if not run.signal(signal.SIGKILL, draw.randrange(run.ranks)):
        run.kill()
    if run.wait(120) is None:
        raise AssertionError("the death of one rank did not end the run in 120 s")


def hang(run: Run, draw: random.Random) -> None:
    rank = draw.randrange(run.ranks)
    if not run.signal(signal.SIGSTOP, rank):
        run.kill()
        return
    if draw.random() < 0.5:
        time.sleep(draw.uniform(0.1, 4))
        run.signal(signal.SIGCONT, rank)
        return
    if run.ranks > 1 and run.wait(TIMEOUT_S + 90) is None and rank:
        raise AssertionError(f"a hung rank did not end the run in {TIMEOUT_S + 90} s")
    run.kill()


def damage(run: Run, draw: random.Random) -> None:
    run.kill()
    newest = max(run.folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        return
    file = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file())) if newest.is_dir() else newest
    size = file.stat().st_size
    if draw.random() < 0.5:
        os.truncate(file, draw.randrange(size))
        return
    with file.open("r+b") as opened:
        opened.seek(place := draw.randrange(size))
        byte = opened.read(1)[0] ^ 1 << draw.randrange(8)
        opened.seek(place)
        opened.write(bytes([byte]))


def fill_disk(run: Run, draw: random.Random) -> None:
    """The folder has been too small since the start."""
    if run.wait(180) is None:
        raise AssertionError("a full disk did not end the run in 180 s")
    subprocess.run(["mount", "-o", "remount,size=256m", run.folder], check=True)


FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
    "SIGKILL": kill,
    "SIGTERM": terminate,
    "dead rank": kill_one,
    "hung rank": hang,
    "full disk": fill_disk,
    "damaged file": damage,
}


def trial(run: Run, fault: str, whole_s: float, whole_bytes: int, draw: random.Random) -> int:
    """Starts of a run until it ended by itself."""
    run.folder.mkdir(parents=True)
    is_small_disk = fault == "full disk"
    if is_small_disk:
        size = draw.randrange(1 << 20, whole_bytes)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", run.folder], check=True)
    faults_left = draw.choice([1, 1, 2])
    for start in range(1, MOST_STARTS + 1):
        run.start()
        if faults_left:
            faults_left -= 1
            wait_s = 0 if is_small_disk else draw.uniform(0, whole_s)
            if run.wait(wait_s) is None:
                FAULTS[fault](run, draw)
                # Another of the kind could not happen: there is room now.
                faults_left = 0 if is_small_disk else faults_left
        if (code := run.wait(300)) == 0:
            return start
        if code is None:
            run.kill()
    raise AssertionError(f"the run had not ended after {MOST_STARTS} starts; see {run.log}")


def compare(whole: Path, other: Path) -> None:
    """Raise AssertionError where two runs did not end alike."""
    ends = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, other)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(dict(enumerate([ends[0][key]])), dict(enumerate([ends[1][key]])), key)
    for file in sorted((whole / "export").iterdir()):
        # The card names the run's folder.
        if file.name != "README.md":
            assert file.read_bytes() == (other / "export" / file.name).read_bytes(), file.name
    found, wanted = metrics(other), metrics(whole)
    for name in wanted:
        # Times, and the memory of a process that did a part of the run, are its own.
        if not name.startswith(("train/tokens", "memory/")):
            assert found.get(name) == wanted[name], name


def whole_of(folder: Path, setup: str) -> Path:
    """Where the uninterrupted run lies."""
    return folder / f"whole-{list(SETUPS).index(setup)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; by default a temporary one, kept where a trial fails")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    print(
        f"{' '.join(['python', *sys.argv])}\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}",
        flush=True,
    )
    whole_s, whole_bytes = {}, {}
    for setup in arguments.setups:
        # The first run fills caches.
        for whole in (folder / "warm-up", whole_of(folder, setup)):
            run = Run(whole, setup, arguments.accelerator)
            start = time.monotonic()
            run.start()
            if run.wait(300) != 0:
                raise SystemExit(f"the uninterrupted run failed; see {run.log}")
            whole_s[setup] = time.monotonic() - start
        shutil.rmtree(folder / "warm-up")
        whole_bytes[setup] = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
        print(f"{setup}: {whole_s[setup]:.1f} s uninterrupted, {whole_bytes[setup] / 1e6:.1f} MB", flush=True)
    draw, equal, tried, starts = random.Random(arguments.seed), Counter[Any](), Counter[Any](), Counter[Any]()
    for number in range(arguments.trials):
        fault = arguments.faults[number % len(arguments.faults)]
        setups = [setup for setup in arguments.setups if fault != "dead rank" or SETUPS[setup][0]] or arguments.setups
        setup = draw.choice(setups)
        run = Run(folder / f"trial-{number}", setup, arguments.accelerator)
        tried[fault, setup] += 1
        try:
            starts[fault, setup] += trial(run, fault, whole_s[setup], whole_bytes[setup], draw)
            compare(whole_of(folder, setup), run.folder)
            equal[fault, setup] += 1
            outcome = "equal"
        except (AssertionError, OSError) as error:
            outcome = f"DIFFERS: {error}"
            if run.process is not None and run.process.poll() is None:
                run.kill()
        print(f"{number:3d} {fault}, {setup}: {outcome}", flush=True)
        if os.path.ismount(run.folder):
            subprocess.run(["umount", run.folder], check=True)
        if outcome == "equal":
            for path in (run.folder, run.pids):
                shutil.rmtree(path, ignore_errors=True)
            run.log.unlink()
    print(f"\n| fault | {' | '.join(arguments.setups)} |\n| --- |{' ---: |' * len(arguments.setups)}")
    for fault in arguments.faults:
        cells = [f"{equal[fault, s]} of {tried[fault, s]}" if tried[fault, s] else "-" for s in arguments.setups]
        print(f"| {fault} | {' | '.join(cells)} |")
    print(
        f"{equal.total()} of {tried.total()} runs ended with the bits of the uninterrupted one, after {starts.total()} starts"
    )
    if equal.total() == tried.total() and arguments.keep is None:
        shutil.rmtree(folder)
    return 0 if equal.total() == tried.total() else 1


if __name__ == "__main__":
    sys.exit(main())
