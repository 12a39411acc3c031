"""A job of a launcher: from the options to the end of the run, with its exit codes."""

import atexit
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback

from nvfp4_train.callbacks.preemption import Preempted
from nvfp4_train.errors import RunError
from nvfp4_train.progress import tame_other_bars
from nvfp4_train.run.build import build
from nvfp4_train.run.identity import is_rank_zero
from nvfp4_train.run.process import default_to_offline_wandb, finishing_wandb, leave_process_group
from nvfp4_train.run.resume import choose_checkpoint


@finishing_wandb()
def run_job(options: dict[str, Any], on_start: Callable[[], None], *, trains: bool = True) -> float | None:
    """Run a job. Without training it calibrates, quantizes, measures and exports alone (PTQ). Returns the quantized model's loss.

    `on_start` is called once the run is accepted.
    """
    default_to_offline_wandb()
    tame_other_bars(is_shown=is_rank_zero())
    # Neither warning applies: the run folder holds .hydra already, and a batch is a slice of a memory-mapped file.
    warnings.filterwarnings("ignore", message="Experiment logs directory")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_float32_matmul_precision("high")
    L.seed_everything(options["seed"], verbose=False)
    module = None
    try:
        options["ckpt_path"] = choose_checkpoint(options["ckpt_path"], Path(options["run_dir"]) / "checkpoints")
        trainer, module, data = build(options, trains=trains)
        trainer.callbacks.append(LambdaCallback(on_fit_start=lambda *_: on_start()))  # type: ignore[attr-defined]
        trainer.fit(module, data, ckpt_path=options["ckpt_path"], weights_only=True)
        atexit.register(leave_process_group)
    except Preempted:
        atexit.register(leave_process_group)
        raise
    except (RunError, ValueError) as error:
        if not isinstance(error, RunError) and module is not None and module.has_started:
            raise
        sys.exit(f"error: {error}")
    return module.results.get("val/loss_quantized")
