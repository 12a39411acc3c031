"""Losses over token sequences."""

from torch import Tensor
from torch.nn import functional as F


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token given those before it: logits [B, T, V] of any float dtype, input_ids [B, T]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
