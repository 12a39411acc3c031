"""Train a causal language model in NVFP4 and export the packed checkpoint.

    python launch/train.py +recipe=NAME [OPTION=VALUE ...]
    torchrun --nproc-per-node N launch/train.py +recipe=NAME trainer=ddp|fsdp2|hsdp

`--help` lists the recipes; `+recipe=NAME --cfg job` prints everything that can be set.
SIGTERM or SIGUSR1 to any rank saves a checkpoint after the current optimizer step and ends every rank with exit code 75 (see
nvfp4_train/callbacks/preemption.py), Ctrl-C the same with 130; the same command with ckpt_path=auto and the same run folder continues.
"""

import atexit
import os
import sys
import warnings
from pathlib import Path

import hydra
import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig

from nvfp4_train.callbacks.preemption import Preempted
from nvfp4_train.run.build import build
from nvfp4_train.run.compose import register_configs, run_options, save_config
from nvfp4_train.run.identity import choose_run_id
from nvfp4_train.run.process import default_to_offline_wandb, finish_wandb, leave_process_group
from nvfp4_train.run.resume import choose_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    options = run_options(cfg)
    default_to_offline_wandb()
    # Neither warning applies: the run folder holds .hydra already, and a batch is a slice of a memory-mapped file.
    warnings.filterwarnings("ignore", message="Experiment logs directory")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_float32_matmul_precision("high")
    L.seed_everything(options["seed"], verbose=False)
    module = None
    try:
        options["ckpt_path"] = choose_checkpoint(options["ckpt_path"], Path(options["run_dir"]) / "checkpoints")
        trainer, module, data = build(options)
        trainer.callbacks.append(LambdaCallback(on_fit_start=lambda *_: save_config(cfg)))
        trainer.fit(module, data, ckpt_path=options["ckpt_path"], weights_only=True)
        atexit.register(leave_process_group)
    except Preempted:
        atexit.register(leave_process_group)
        raise
    except ValueError as error:
        if module is not None and module.has_started:
            raise
        sys.exit(f"error: {error}")
    finally:
        finish_wandb()
    return module.results.get("val/loss_quantized")


if __name__ == "__main__":
    register_configs(ROOT)
    try:
        os.environ["RUN_ID"] = choose_run_id()
    except ValueError as error:
        sys.exit(f"error: {error}")
    main()
