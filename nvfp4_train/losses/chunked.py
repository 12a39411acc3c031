"""Compares the logits of two models a few positions at a time, so that those of the whole vocabulary never exist for all positions.

The gradient by a chunk's logits is made, and turned into that of its inputs, while the chunk's logits exist: in the forward. The
backward only scales it.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp4_train.losses import divergence
from nvfp4_train.losses.divergence import Objective, Positions

CHUNK_BYTES = 2**30
"""Memory for what a chunk needs."""
FUSED_BYTES, PLAIN_BYTES = 10, 40
"""What a logit of a chunk takes: float32 of both models and a bf16 gradient, or also the temporaries of plain PyTorch."""


class WholeLogits:
    """Logits that exist already, [N, V] of any float dtype."""

    def __init__(self, logits: Tensor) -> None:
        # Models with a padded vocabulary return a part of it.
        logits = logits.contiguous()
        self.inputs = (logits,)
        self.takes_gradients = logits.requires_grad
        self.gradients = [torch.empty_like(logits) if self.takes_gradients else None]
        self.num_rows, self.num_columns = logits.shape

    def logits(self, rows: slice) -> Tensor:
        return self.inputs[0][rows]

    def gradient(self, rows: slice) -> Tensor:
        """Where to write the gradient by the logits of some rows."""
        assert self.gradients[0] is not None
        return self.gradients[0][rows]

    def take(self, rows: slice, gradient: Tensor) -> None:
        """Called when that gradient is written."""

    def finish(self) -> None:
        """Called when those of all rows have been taken."""


class ProjectedLogits:
    """Logits of hidden states [N, H] by an output embedding's weight [V, H] and bias [V]: float32, made when they are asked for.

    Where hidden states are bf16, so are gradients by logits; the weight's gradient adds up over the chunks in float32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.inputs = (hidden, weight, bias)
        self.gradients: list[Tensor | None] = [
            torch.zeros_like(x, dtype=dtype) if x is not None and x.requires_grad and torch.is_grad_enabled() else None
            for x, dtype in ((hidden, hidden.dtype), (weight, torch.float32), (bias, torch.float32))
        ]
        self.takes_gradients = any(gradient is not None for gradient in self.gradients)
        self.num_rows, self.num_columns = len(hidden), len(weight)

    def logits(self, rows: slice) -> Tensor:
        hidden, weight, bias = self.inputs
        logits = _product(hidden[rows], weight.T)
        return logits if bias is None else logits.add_(bias)

    def gradient(self, rows: slice) -> Tensor:
        hidden = self.inputs[0][rows]
        return hidden.new_empty(len(hidden), self.num_columns)

    def take(self, rows: slice, gradient: Tensor) -> None:
        of_hidden, of_weight, of_bias = self.gradients
        hidden, weight, _ = self.inputs
        if of_hidden is not None:
            torch.mm(gradient, weight, out=of_hidden[rows])
        if of_weight is not None:
            _add_product(of_weight, gradient.T, hidden[rows])
        if of_bias is not None:
            of_bias += gradient.sum(0, dtype=torch.float32)

    def finish(self) -> None:
        self.gradients = [
            None if total is None or x is None else total.to(x.dtype)
            for total, x in zip(self.gradients, self.inputs, strict=True)
        ]


Logits = WholeLogits | ProjectedLogits


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32. On CUDA it is not rounded on the way; on CPUs products of bf16 are.

    Logits of 8 to 16 are rounded to bf16 by up to 1/32. At a KL of 0.05, where those of teacher and student are 0.3 apart, that
    changes the gradient by 9 % (`benchmarks/distillation.py`).
    """
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, total being float32."""
    if a.is_cuda and a.dtype is not torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype is torch.float32:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


@torch.no_grad()
def mean_losses(
    student: Logits, teacher: Logits, positions: Positions, objective: Objective, *, num_rows: int | None = None
) -> dict[str, Tensor]:
    """The means of `row_losses` by name, and the student's gradients filled with those of the objective.

    `num_rows` of a chunk are by default as many as `CHUNK_BYTES` hold. On CUDA the cross-entropy is 0 where the objective has none.
    """
    is_fused = student.inputs[0].is_cuda
    function = _kernel().row_losses if is_fused else divergence.row_losses
    total = torch.zeros(2, device=positions.weights.device)
    for rows in _chunks(student, num_rows, FUSED_BYTES if is_fused else PLAIN_BYTES):
        gradient = student.gradient(rows)
        total += function(student.logits(rows), teacher.logits(rows), positions[rows], objective, gradient).sum(1)
        student.take(rows, gradient)
        # Else it would live beside the next chunk's logits.
        del gradient
    student.finish()
    return dict(zip(("divergence", "cross_entropy"), total.unbind(), strict=True))


@torch.no_grad()
def row_metrics(
    student: Logits, teacher: Logits, positions: Positions, objective: Objective, *, num_rows: int | None = None
) -> dict[str, Tensor]:
    """What every row adds to the means of `mean_losses` and of `divergence.row_metrics`, float32 [N] each, without gradients."""
    parts: dict[str, list[Tensor]] = {}
    for rows in _chunks(student, num_rows, PLAIN_BYTES):
        pair, own = (student.logits(rows), teacher.logits(rows)), positions[rows]
        losses = divergence.row_losses(*pair, own, objective)
        found = {"divergence": losses[0], "cross_entropy": losses[1], **divergence.row_metrics(*pair, own, objective)}
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
        del pair
    return {name: torch.cat(values) for name, values in parts.items()}


def rows_at_once(num_columns: int, bytes_per_logit: int = FUSED_BYTES) -> int:
    """Rows of a chunk, of logits [N, num_columns], where no other number is asked for: as many as `CHUNK_BYTES` hold."""
    num_rows = max(1, CHUNK_BYTES // (bytes_per_logit * num_columns))
    # Matrix products work on tiles of 128 rows.
    return num_rows - (num_rows % 128 if num_rows > 128 else 0)


def _chunks(student: Logits, num_rows: int | None, bytes_per_logit: int) -> list[slice]:
    num_rows = num_rows or rows_at_once(student.num_columns, bytes_per_logit)
    return [slice(start, start + num_rows) for start in range(0, student.num_rows, num_rows)]


def _kernel() -> Any:
    # On Windows and macOS there is no Triton to import.
    return importlib.import_module("nvfp4_train.losses.divergence_kernel")


class _Known(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.view_as(loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if known is None else known * grads[0] for known in ctx.saved_tensors))


def with_gradients(loss: Tensor, logits: Logits) -> Tensor:
    """`loss`, which backpropagates to the inputs of the logits by the gradients that these have been given."""
    return _Known.apply(loss, logits.gradients, *logits.inputs)
