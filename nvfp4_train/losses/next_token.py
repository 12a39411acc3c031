"""Cross-entropy of the next token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvfp4_train.losses.base import Batch
from nvfp4_train.models.build import ModelBuilder
from nvfp4_train.models.causal_lm import compute_logits


class NextTokenLoss:
    """Mean cross-entropy, in nats, of each token given those before it; with a mask, of the marked tokens."""

    def prepare(self, build: ModelBuilder) -> None:
        """Needs no other model."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = compute_logits(model, batch["input_ids"], batch.get("position_ids"))
        return next_token_loss(logits, batch["input_ids"], batch.get("loss_mask")), {}

    def per_sequence(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        logits = compute_logits(model, ids, batch.get("position_ids"))
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(
            len(ids), -1
        )
        counted = batch["loss_mask"][:, 1:] if "loss_mask" in batch else torch.ones_like(losses, dtype=torch.bool)
        return {"loss": losses.masked_fill(~counted, 0).sum(1) / counted.sum().clamp(min=1)}


def next_token_loss(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of each token given those before it: logits [B, T, V] of any float dtype, input_ids [B, T].

    A mask, bool [B, T], marks the tokens to take the mean of. It is 0 if none but first tokens are marked.
    """
    logits, targets = logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten()
    if mask is None:
        return F.cross_entropy(logits, targets)
    counted = mask[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
