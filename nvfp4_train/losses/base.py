"""What a loss is, and which positions of a batch it counts."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from nvfp4_train.models.build import ModelBuilder

Batch = Mapping[str, Tensor]
"""`input_ids`, int64 [B, T], and whatever else a data module gives.

`loss_mask`, bool [B, T], marks the tokens to be predicted: position t counts where token t + 1 is marked.
`position_ids`, int64 [B, T], are there where rows hold documents that do not see each other: they start at 0 with each.
`loss_scale`, float32 [B], is the factor of the batch's mean in a step, the same for all rows: with it the average over the batches of a
step, on all ranks, is the mean over all of the step's positions that count.
"""


class Loss(Protocol):
    """A loss. It gets the model, so that it decides what to compute of it and which other models it needs.

    It is no `nn.Module`: a teacher is in no checkpoint, has no optimizer state, and is not averaged over ranks.
    """

    def prepare(self, build: ModelBuilder) -> None:
        """Called once, when the model is built: make a teacher or anything else that is needed. On every rank."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the batch's positions, a scalar to minimize, and scalars to log beside it by name, means as well."""


def num_positions(batch: Batch) -> int:
    """The positions that a mean over the batch is over: all of them, or those that the mask counts.

    Waits for the device of the mask, if there is one.
    """
    if "loss_mask" not in batch:
        return batch["input_ids"].numel()
    return int(batch["loss_mask"][:, 1:].sum())
