"""Measure what each weight, layer and kind of a model costs in NVFP4, and choose what to leave in bf16 for a budget of bits.

    python launch/sensitivity.py +recipe=NAME model.path=DIR_OR_HUB_NAME [OPTION=VALUE ...] [bits=4.75] [sequences=8] [by=weight]
    torchrun --nproc-per-node N launch/sensitivity.py +recipe=NAME trainer=ddp

Takes the options of launch/train.py; those of the loss, the optimizer, the schedule and the callbacks have no effect. The model is
calibrated and quantized as quant.* says. bits a weight, of the weights that are quantized, is the budget; by says among what is
chosen: weight, layer or kind. sequences held-out ones, over all ranks, are chosen by, and as many others verify the choice. Writes
tables, pictures and the chosen quant.exclude to the run folder. A run that excludes weights equalizes the others alone, where this
one equalizes all, so its KL is near the one that is told here, and not the same.
"""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from nvfp4_train.run.compose import run_options, start_job
from nvfp4_train.run.sensitivity import run_sensitivity, take_own_options

ROOT = Path(__file__).resolve().parent.parent
OWN = "NVFP4_TRAIN_SENSITIVITY"
"""The launcher's own options, for ranks that Lightning starts: they get the arguments that are left."""


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    run_sensitivity(run_options(cfg), own)


if __name__ == "__main__":
    try:
        own, sys.argv[1:] = take_own_options([*os.environ.get(OWN, "").split(), *sys.argv[1:]])
    except ValueError as error:
        sys.exit(f"error: {error}")
    os.environ[OWN] = " ".join(f"{name}={value}" for name, value in own.items())
    start_job(ROOT, main)
