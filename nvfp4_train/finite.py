"""Whether losses, gradients and weights are finite: found on the device, and agreed on by all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from nvfp4_train.errors import RunError


class Diverged(RunError):
    """A loss, a gradient or a weight is NaN or Inf. Raised on all ranks."""

    is_on_all_ranks = True


@torch.no_grad()
def gradient_norms(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Norm of all gradients together, with the bits of `torch.nn.utils.get_total_norm`, and of each [parameters].

    A parameter without a gradient has the norm 0. Of a sharded gradient the norm is that of this rank's rows.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(()), torch.zeros(len(parameters))
    norms = [norm.to(gradients[0].device) for norm in torch._foreach_norm(gradients)]
    total = torch.linalg.vector_norm(torch.stack(norms))
    own = map(_local, norms)
    none = _local(total).new_zeros(())
    return total, torch.stack([none if parameter.grad is None else next(own) for parameter in parameters])


@torch.no_grad()
def largest_weights(parameters: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each parameter [parameters], or of this rank's rows of it: NaN or Inf if the weight has one."""
    # An empty tensor has no largest element.
    own = [weight if weight.numel() else weight.new_zeros(1) for weight in map(_local, parameters)]
    if not own:
        return torch.zeros(0)
    return torch.stack([norm.to(own[0].device) for norm in torch._foreach_norm(own, torch.inf)])


def kinds(values: Tensor) -> list[str]:
    """For each value [n] "NaN" or "Inf" where any rank has one, or else "". A collective, and it waits for the device."""
    found = values.isinf().int() + 2 * values.isnan().int()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return [("", "Inf", "NaN")[kind] for kind in found.tolist()]


def bad_weights(model: nn.Module) -> list[tuple[str, str]]:
    """Name and kind of every parameter that is not finite on some rank. A collective, and it waits for the device."""
    named = dict(model.named_parameters())
    return [(name, kind) for name, kind in zip(named, kinds(largest_weights(list(named.values()))), strict=True) if kind]


def describe(what: str, bad: Sequence[tuple[str, str]]) -> str:
    """The first of what is not finite, and the number of the others."""
    (name, kind), *others = bad
    more = f", nor are those of {len(others)} other parameters" if others else ""
    return f"{what} {name} is not finite ({kind}){more}"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
