"""Runs the real launcher on a small model, in processes of its own."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent

# A run of a second or two: few documents, short sequences, one narrow model.
SMALL_MODEL = (
    "hidden_size=64",
    "intermediate_size=96",
    "num_hidden_layers=2",
    "num_attention_heads=4",
    "num_key_value_heads=2",
)
SMALL_RUN = (
    "data.seq_len=64",
    "data.batch_size=4",
    "data.max_documents=20",
    "data.val_sequences=4",
    "quant.calibration.sequences=8",
    "logger=csv",
    # Its pictures take longer than such a run.
    "callbacks.report=null",
)
SMALL = (*(f"model.config.{field}" for field in SMALL_MODEL), *SMALL_RUN)
REPORTED = tuple(option for option in SMALL if option != "callbacks.report=null")
"""As `SMALL`, with a report at the end."""


def train_command(
    run_dir: Path,
    *overrides: str,
    torchrun: tuple[str, ...] = (),
    small: bool | tuple[str, ...] = True,
    python: str = sys.executable,
    script: str = "train.py",
) -> list[str]:
    """The launcher's command line; under torchrun, if there are options of it."""
    command = [str(ROOT / "launch" / script), f"run_dir={run_dir}", *(SMALL if small is True else small or ()), *overrides]
    return [python, *(["-m", "torch.distributed.run", *torchrun] if torchrun else []), *command]


def train_environment(threads: int = 1, package: Path = ROOT) -> dict[str, str]:
    """The test helpers are importable as callbacks, and two ranks share two cores. `package` is the folder that the package is in."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RUN_ID", "TRITON_INTERPRET", "WANDB_SERVICE")
    }
    path = os.pathsep.join(filter(None, [str(package), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def launch(
    run_dir: Path,
    *overrides: str,
    ranks: int = 0,
    small: bool | tuple[str, ...] = True,
    check: bool = True,
    threads: int = 1,
    forked: bool = True,
    script: str = "train.py",
    folder: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """`python launch/train.py` with these overrides, or torchrun with `ranks` processes; fails if it fails, unless check=False.

    `script` is another launcher with the same options; `folder` is where the command is given. `small` are
    options that make a run small, by default those of `SMALL`.

    Processes of a small run are forked from one that has imported everything, since to import takes longer than the run.
    They hash strings alike, which ranks that are started one by one (forked=False) do not.
    """
    torchrun = ("--standalone", "--nproc-per-node", str(ranks)) if ranks else ()
    python, server = forked_python() if small and forked else (sys.executable, {})
    command = train_command(run_dir, *overrides, torchrun=torchrun, small=small, python=python, script=script)
    result = subprocess.run(command, capture_output=True, text=True, env=train_environment(threads) | server, cwd=folder)
    if check:
        assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[:3000]}\n...\n{result.stderr[-3000:]}"
    return result


@functools.cache
def forked_python(package: Path = ROOT, within: tuple[str, ...] = ()) -> tuple[str, dict[str, str]]:
    """What stands for `python` in small runs, and the environment in which it does, for ranks of torchrun as well.

    `package` is the folder that the package is in, as in `train_environment`; `within`, a command that runs another one elsewhere.
    """
    # Imports ask for GPUs, and where there are any, no process forked after that may ask again.
    if sys.platform != "linux" or torch.cuda.is_available():
        return sys.executable, {}
    folder, here = Path(tempfile.mkdtemp(prefix="nvfp4-tests-python-")), Path(__file__).parent
    server = subprocess.Popen(
        [*within, sys.executable, here / "fork_server.py", folder / "socket"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=train_environment(package=package), start_new_session=True,
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    # Its standard input is open until the tests end.
    _servers.append(server)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{here}/forked_python.py" "$@"\n')
    python.chmod(0o755)
    return str(python), {"FORK_SERVER": str(folder / "socket"), "PYTHON_EXEC": str(python)}


_servers: list[subprocess.Popen] = []


def exit_codes(output: str) -> set[int]:
    """Exit codes of the ranks that did not end with 0, as torchrun reports them."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", output)}


def metrics(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())


def load_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True, map_location="cpu")


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Nested dicts, lists and tensors are equal, bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert first == second, where
