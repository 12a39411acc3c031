"""Models of `configs/model` with random weights, made on the device that uses them. On a CPU that takes longer than the benchmark."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor

from nvfp4_train.models.sharding import allocate

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "model"


def config_of(name: str) -> dict[str, Any]:
    """The fields of a Hugging Face config."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["config"]


@torch.no_grad()
def fill(model: nn.Module, device: str, seed: int = 0) -> None:
    """Give a model without memory, whole or sharded, random weights, in place."""
    allocate(model, torch.device(device))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        rows = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        rows.fill_(1) if parameter.ndim == 1 else rows.normal_(std=0.02)
