"""A job of a launcher: from the options to the end of the run, with its exit codes."""

import atexit
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback

from nvfp4_train.callbacks.preemption import INTERRUPTED_EXIT_CODE, Preempted
from nvfp4_train.disk import disk_error
from nvfp4_train.errors import RunError, one_line
from nvfp4_train.progress import tame_other_bars
from nvfp4_train.ranks import is_rank_zero
from nvfp4_train.run.build import build
from nvfp4_train.run.compose import failed_job, save_config
from nvfp4_train.run.lock import lock_folder
from nvfp4_train.run.process import default_to_offline_wandb, finishing_wandb, leave_process_group
from nvfp4_train.run.resume import choose_checkpoint, clear_partials, record_origin


@finishing_wandb()
def run_job(options: dict[str, Any], *, trains: bool = True) -> float | None:
    """Run a job. Without training it calibrates, quantizes, measures and exports alone (PTQ). Returns the quantized model's loss.

    Once its error is printed, a job that fails raises what `failed_job` says; one that a signal ends raises SystemExit.
    """
    default_to_offline_wandb()
    tame_other_bars(is_shown=is_rank_zero())
    # Neither warning applies: the run folder holds .hydra already, and a batch is a slice of a memory-mapped file.
    warnings.filterwarnings("ignore", message="Experiment logs directory")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_float32_matmul_precision("high")
    L.seed_everything(options["seed"], verbose=False)
    try:
        # Lightning may start the other ranks itself, which are of this run.
        with lock_folder(Path(options["run_dir"]), sys.argv) if is_rank_zero() else nullcontext():
            return _run(options, trains)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        _print_error(error, Path(options["run_dir"]))
        raise failed_job() from error


def _run(options: dict[str, Any], trains: bool) -> float | None:
    """Raises RunError for what the user can correct, whatever it was before training began."""
    run_dir, module = Path(options["run_dir"]), None
    try:
        options["ckpt_path"] = choose_checkpoint(options["ckpt_path"], run_dir / "checkpoints")
        if is_rank_zero():
            clear_partials(run_dir)
        trainer, module, data = build(options, trains=trains)
        trainer.callbacks.append(LambdaCallback(on_fit_start=lambda *_: _record(options)))  # type: ignore[attr-defined]
        trainer.fit(module, data, ckpt_path=options["ckpt_path"], weights_only=True)
    except Preempted:
        atexit.register(leave_process_group)
        raise
    except (ValueError, OSError, MisconfigurationException) as error:
        if (module is not None and module.has_started) or isinstance(error, RunError):
            raise
        raise RunError(disk_error(error, run_dir) or str(error)) from error
    atexit.register(leave_process_group)
    return module.results.get("val/loss_quantized")


def _record(options: dict[str, Any]) -> None:
    """Write down what was accepted."""
    if is_rank_zero():
        save_config(options)
        record_origin(options["ckpt_path"], Path(options["run_dir"]))


def _print_error(error: Exception, run_dir: Path) -> None:
    """A line for what the user can correct, else the traceback."""
    if isinstance(error, RunError) and error.is_on_all_ranks and not is_rank_zero():
        return
    line = str(error) if isinstance(error, RunError) else disk_error(error, run_dir)
    if line is None:
        traceback.print_exception(error)
    else:
        print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
