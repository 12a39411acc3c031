"""What a loss is."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from nvfp4_train.models.build import ModelBuilder

Batch = Mapping[str, Tensor]
"""`input_ids`, int64 [B, T], and whatever else a data module gives."""


class Loss(Protocol):
    """A loss. It gets the model, so that it decides what to compute of it and which other models it needs.

    It is no `nn.Module`: a teacher is in no checkpoint, has no optimizer state, and is not averaged over ranks.
    """

    def prepare(self, build: ModelBuilder) -> None:
        """Called once, when the model is built: make a teacher or anything else that is needed. On every rank."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the batch, a scalar to minimize, and scalars to log beside it by name."""
