"""What a loss is, and which positions of a batch it counts."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
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


@runtime_checkable
class SequenceLoss(Protocol):
    """A loss that also knows what each sequence adds to its means, without which an evaluation cannot tell how sure they are."""

    def per_sequence(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What the sequences of a batch add to the loss, by the name `loss`, and to the metrics beside it: float32 [B] each, whose
        sums are what a call gives. Call it where gradients are off."""


def num_positions_per_sequence(batch: Batch) -> Tensor:
    """The positions of each sequence of a batch that count, int64 [B], on the device of the mask, or of the ids without one."""
    if "loss_mask" not in batch:
        ids = batch["input_ids"]
        return torch.full((len(ids),), ids.shape[1], device=ids.device)
    return batch["loss_mask"][:, 1:].sum(1)


def num_positions(batch: Batch) -> int:
    """The positions that a mean over the batch is over: all of them, or those that the mask counts.

    Waits for the device of the mask, if there is one.
    """
    return int(num_positions_per_sequence(batch).sum()) if "loss_mask" in batch else batch["input_ids"].numel()
