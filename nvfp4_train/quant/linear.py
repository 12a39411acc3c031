"""Modules that compute with the weights that will be served, while every parameter stays an fp32 master.

Serving holds quantized linears in NVFP4 and everything else in bf16. Training computes with exactly those values: an `NVFP4Linear`
multiplies by the decoded weight, and every other module sees its parameters rounded to bf16. Gradients pass straight through to
the masters. No parameter is renamed, copied or replaced, so a checkpoint taken at any moment holds the masters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SERVED_DTYPE = torch.bfloat16


class _StraightThrough(torch.autograd.Function):
    """Value of the compute weight, gradient to the master."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, compute_weight: Tensor) -> Tensor:
        return compute_weight.view_as(compute_weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class NVFP4Linear(nn.Linear):
    """A linear over the parameters of the `nn.Linear` that it replaces.

    While `compute_weight` is set, the forward multiplies by it: bf16 [N, K], filled by the weight store once per optimizer step.
    While it is None the weight is the master rounded to bf16, cast in every forward.
    """

    # A plain attribute: as a buffer it would enter DDP's broadcasts, and it is never saved.
    compute_weight: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "NVFP4Linear":
        """Share the parameters of a linear; nothing is copied."""
        with torch.device("meta"):
            module = cls(linear.in_features, linear.out_features, bias=False)
        module.weight = linear.weight
        module.bias = linear.bias
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_weight is None:
            weight = self.weight.to(SERVED_DTYPE)
        else:
            weight = _StraightThrough.apply(self.weight, self.compute_weight)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(SERVED_DTYPE))


class _ServedParameters:
    """Mixed in before a module's class: its forward sees its own parameters rounded to bf16."""

    _parameters: dict[str, nn.Parameter | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        masters = self._parameters
        if all(p is None or p.dtype is SERVED_DTYPE for p in masters.values()):
            # As FSDP2 gathers them; to swap the dictionary takes longer than a small module's own forward.
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        self._parameters = {name: None if p is None else p.to(SERVED_DTYPE) for name, p in masters.items()}  # type: ignore[misc]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._parameters = masters


class _ServedEmbedding(nn.Embedding):
    """Rounds the rows that are looked up, instead of the whole table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(SERVED_DTYPE)


def quantize_linears(model: nn.Module, names: list[str]) -> None:
    """Replace the named `nn.Linear` modules by `NVFP4Linear`, in place."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, NVFP4Linear.from_linear(linear))  # type: ignore[arg-type]


def compute_in_served_dtype(model: nn.Module) -> None:
    """Let every module but `NVFP4Linear` that owns parameters compute with their bf16 values, in place."""
    classes: dict[type, type] = {nn.Embedding: _ServedEmbedding}
    for module in model.modules():
        owns_parameters = any(True for _ in module.parameters(recurse=False))
        if owns_parameters and not isinstance(module, NVFP4Linear | _ServedEmbedding | _ServedParameters):
            cls = type(module)
            if cls not in classes:
                classes[cls] = type(cls.__name__, (_ServedParameters, cls), {})
            module.__class__ = classes[cls]
