"""Quantize a causal language model without training (PTQ): calibrate, quantize, measure and export the packed checkpoint.

    python launch/ptq.py +recipe=NAME model.path=DIR_OR_HUB_NAME [OPTION=VALUE ...]
    torchrun --nproc-per-node N launch/ptq.py +recipe=NAME trainer=ddp|fsdp2

Takes the options of launch/train.py; those of the optimizer and the schedule have no effect. quant.rule, quant.equalize,
quant.activations and quant.calibration say how.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nvfp4_train.run.compose import run_options, start_job
from nvfp4_train.run.job import run_job

ROOT = Path(__file__).resolve().parent.parent


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    return run_job(run_options(cfg), trains=False)


if __name__ == "__main__":
    start_job(ROOT, main)
