"""Whole tensors of a sharded model."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nvfp4_train.export.gathered import sharded_state


@torch.no_grad()
def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the state dict, one after the other; a sharded one is gathered. Call it on every rank."""
    for name, tensor in sharded_state(model).items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
