"""Train a causal language model in NVFP4 and export the packed checkpoint.

    python launch/train.py +recipe=NAME [OPTION=VALUE ...]
    torchrun --nproc-per-node N launch/train.py +recipe=NAME trainer=ddp|fsdp2|hsdp

`--help` lists the recipes; `+recipe=NAME --cfg job` prints everything that can be set.
SIGTERM or SIGUSR1 to any rank saves a checkpoint after the current optimizer step and ends every rank with exit code 75 (see
nvfp4_train/callbacks/preemption.py), Ctrl-C the same with 130; the same command with ckpt_path=auto and the same run folder continues.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nvfp4_train.run.compose import run_options, start_job
from nvfp4_train.run.job import run_job

ROOT = Path(__file__).resolve().parent.parent


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    return run_job(run_options(cfg))


if __name__ == "__main__":
    start_job(ROOT, main)
