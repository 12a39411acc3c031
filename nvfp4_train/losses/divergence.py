"""How far the distributions of two models over the next token are apart, and the gradient of that, in plain PyTorch.

A row holds the logits of one position: x of the student, y of the teacher, [V]. With q = softmax(x / T), p = softmax(y / T) and
m = (p + q) / 2, T being the temperature, the divergences and their gradients by u = x / T are

    forward_kl   KL(p || q) = sum p (log p - log q)    q - p
    reverse_kl   KL(q || p) = sum q (log q - log p)    q (log q - log p - KL(q || p))
    jsd          KL(p || m) / 2 + KL(q || m) / 2       q (log q - log m - KL(q || m)) / 2

All is computed in float32. `divergence_kernel` does the same in one launch; this file is its specification, and what CPUs run.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nvfp4_train.losses.base import Batch
from nvfp4_train.models.logits import LogitMap

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a row costs: (1 - c) T^2 D + c CE, with D a divergence at temperature T and CE the next token's cross-entropy at 1.

    The gradient of D shrinks with T^2; the factor undoes that (Hinton et al., arXiv 1503.02531). Raises ValueError for an option out
    of range, by its name in the config.
    """

    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    cross_entropy: float = 0.0
    """c, the weight of the cross-entropy in the mix."""
    student_map: LogitMap = LogitMap()
    teacher_map: LogitMap = LogitMap()

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"loss.divergence must be one of {', '.join(get_args(Divergence))}, got {self.divergence!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"loss.temperature must be above 0 and finite, got {self.temperature}")
        if not 0 <= self.cross_entropy < 1:
            raise ValueError(
                f"loss.cross_entropy must be at least 0 and below 1, got {self.cross_entropy}; without a teacher choose loss=next_token"
            )

    def mix(self, divergence: Tensor, cross_entropy: Tensor) -> Tensor:
        """The loss, of a divergence that is multiplied by T^2 already."""
        return (1 - self.cross_entropy) * divergence + self.cross_entropy * cross_entropy


@dataclass(frozen=True, kw_only=True)
class Positions:
    """The positions of a batch, in the order of its tokens, and what each adds to a mean. N = B T."""

    targets: Tensor
    """The token after each, int64 [N]; 0 after the last of a sequence."""
    weights: Tensor
    """In a mean over the positions that count, float32 [N]. Their sum is 1, or 0 if none counts."""
    target_weights: Tensor
    """In a mean over those that count and have a next token, likewise."""

    @staticmethod
    def of(batch: Batch) -> "Positions":
        """With a mask those before a marked token count; without one all do."""
        ids = batch["input_ids"]
        targets = torch.zeros_like(ids)
        targets[:, :-1] = ids[:, 1:]
        has_target = torch.ones_like(ids, dtype=torch.float32)
        has_target[:, -1] = 0
        counts = torch.ones_like(has_target)
        if "loss_mask" in batch:
            has_target[:, :-1] *= batch["loss_mask"][:, 1:]
            counts = has_target
        return Positions(targets=targets.flatten(), weights=_to_mean(counts), target_weights=_to_mean(has_target))

    def __getitem__(self, rows: slice) -> "Positions":
        return Positions(targets=self.targets[rows], weights=self.weights[rows], target_weights=self.target_weights[rows])


def _to_mean(counts: Tensor) -> Tensor:
    return (counts / counts.sum().clamp(min=1)).flatten()


def row_losses(
    student: Tensor, teacher: Tensor, positions: Positions, objective: Objective, gradient: Tensor | None = None
) -> Tensor:
    """What rows of logits add to the mean divergence, times T^2, and to the mean cross-entropy: float32 [2, n].

    student and teacher are [n, V], of any float dtype. `gradient`, [n, V], is overwritten with that of the objective by the student's
    logits.
    """
    temperature = objective.temperature
    x, y = objective.student_map(student.float()), objective.teacher_map(teacher.float())
    log_q, log_p = torch.log_softmax(x / temperature, -1), torch.log_softmax(y / temperature, -1)
    value, slope = DIVERGENCES[objective.divergence](log_q, log_p)
    log_q = log_q if temperature == 1 else torch.log_softmax(x, -1)
    targets = positions.targets[:, None]
    cross_entropy = -log_q.gather(1, targets).squeeze(1)
    if gradient is not None:
        slope *= ((1 - objective.cross_entropy) * temperature * positions.weights)[:, None]
        if objective.cross_entropy:
            weights = (objective.cross_entropy * positions.target_weights)[:, None]
            slope += (log_q.exp() * weights).scatter_add_(1, targets, -weights)
        gradient.copy_(slope * objective.student_map.slope(x))
    return torch.stack((temperature**2 * positions.weights * value, positions.target_weights * cross_entropy))


def row_metrics(student: Tensor, teacher: Tensor, positions: Positions, objective: Objective) -> dict[str, Tensor]:
    """What rows of logits add to means that are reported whatever is minimized, [n] each, by name.

    `kl`: the forward KL at temperature 1, in nats; `top1_agreement`: whether student and teacher hold the same token most likely.
    """
    x, y = objective.student_map(student.float()), objective.teacher_map(teacher.float())
    kl, _ = _forward_kl(torch.log_softmax(x, -1), torch.log_softmax(y, -1))
    agreement = x.argmax(-1) == y.argmax(-1)
    return {"kl": positions.weights * kl, "top1_agreement": positions.weights * agreement}


def _forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return _product(p, log_p - log_q).sum(-1), log_q.exp() - p


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q, ratio = log_q.exp(), log_q - log_p
    value = _product(q, ratio).sum(-1)
    return value, _product(q, ratio - value[:, None])


def _jsd(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_p = _product(p, log_p - log_m).sum(-1)
    of_q = _product(q, log_q - log_m).sum(-1)
    return (of_p + of_q) / 2, _product(q, log_q - log_m - of_q[:, None]) / 2


def _product(probability: Tensor, x: Tensor) -> Tensor:
    """Their product; 0 where the probability is, whatever x is."""
    return torch.where(probability > 0, probability * x, 0)


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
"""From log q and log p, [n, V]: the value of every row, [n], and its gradient by u, [n, V]."""
