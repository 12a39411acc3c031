"""Cross-entropy of the next token."""

from torch import Tensor, nn
from torch.nn import functional as F

from nvfp4_train.losses.base import Batch
from nvfp4_train.models.build import ModelBuilder
from nvfp4_train.models.causal_lm import compute_logits


class NextTokenLoss:
    """Mean cross-entropy, in nats, of each token given those before it."""

    def prepare(self, build: ModelBuilder) -> None:
        """Needs no other model."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return next_token_loss(compute_logits(model, batch["input_ids"]), batch["input_ids"]), {}


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token given those before it: logits [B, T, V] of any float dtype, input_ids [B, T]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
