"""Which parameters of a module run over the channels of its output or input. It is measured on the module itself, in a forward."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from nvfp4_train.models.channel_codes import power_of_two
from nvfp4_train.quant.served import rows_first_of, set_parameters


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """A dimension of a parameter that runs over channels."""

    module: nn.Module
    leaf: str
    """Name of the parameter in the module."""
    dim: int
    channels: Tensor
    """The channel at every index of the dimension, int64 on the CPU."""
    offset: float = 0.0
    """The module computes with offset + parameter: 1 in norms of that kind."""

    @property
    def parameter(self) -> Tensor:
        return parameters_of(self.module)[self.leaf]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A module with the arguments that it was called with, while its parameters can be read."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def float_input(self, position: int) -> Tensor:
        """One of the float tensors among the arguments."""
        leaves = tree_leaves((self.args, self.kwargs))
        return leaves[float_positions(leaves)[position]]

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """The float tensors that the module returns with some other parameters, and some other float inputs by position."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        positions = float_positions(leaves)
        for position, x in (inputs or {}).items():
            leaves[positions[position]] = x
        args, kwargs = tree_unflatten(leaves, spec)
        held = self.module._parameters
        set_parameters(self.module, {**held, **parameters})
        try:
            outputs = tree_leaves(self.module.forward(*args, **kwargs))
        finally:
            set_parameters(self.module, held)
        return [outputs[position] for position in float_positions(outputs)]


def linear_outputs(module: nn.Linear) -> list[Axis]:
    """The parameters of a linear that run over its output."""
    channels = torch.arange(module.out_features)
    return [Axis(module=module, leaf=leaf, dim=0, channels=channels) for leaf in parameters_of(module)]


def norm_outputs(call: Call) -> list[Axis]:
    """Those of a norm, whose output is (offset + weight) x + bias, with an offset of 0 or 1; none where it is something else."""
    (gain, weight), *biases = parameters_of(call.module).items()
    zeros = {leaf: torch.zeros_like(bias) for leaf, bias in biases}
    channels = torch.arange(weight.numel())
    scales = power_of_two(channels % 4).to(weight)
    for offset in (0.0, 1.0):
        (one,) = call.outputs({**zeros, gain: torch.full_like(weight, 1 - offset)})
        (scaled,) = call.outputs({**zeros, gain: scales - offset})
        if not one.any() or not torch.equal(scaled, one * scales.to(one.dtype)):
            continue
        axes = [Axis(module=call.module, leaf=gain, dim=0, channels=channels, offset=offset)]
        for leaf in zeros:
            (added,) = call.outputs({**zeros, gain: torch.full_like(weight, -offset), leaf: scales})
            if not torch.equal(added, scales.to(added.dtype).expand_as(added)):
                return []
            axes.append(Axis(module=call.module, leaf=leaf, dim=0, channels=channels))
        return axes
    return []


def product_inputs(call: Call, position: int, channels: Tensor) -> list[Axis]:
    """The dimensions with which the module contracts a float input, whose channels [K] are given; none where it does something else.

    Parameters that are scaled along these, and an input that is scaled against them, leave the output as it is, bit for bit. They are
    searched among the dimensions of size K, the fewest first. The first one of three runs over experts.
    """
    x, parameters = call.float_input(position), parameters_of(call.module)
    scales = power_of_two(torch.arange(x.shape[-1], device=x.device) % 5)
    of_size_k = [
        (leaf, dim)
        for leaf, parameter in parameters.items()
        for dim in range(parameter.ndim - 2, parameter.ndim)
        if parameter.ndim > 1 and parameter.shape[dim] == x.shape[-1]
    ]
    expected = call.outputs(parameters)
    for chosen in (some for number in range(1, len(of_size_k) + 1) for some in combinations(of_size_k, number)):
        scaled = dict(parameters)
        for leaf, dim in chosen:
            scaled[leaf] = scaled[leaf] * along(scales, dim, scaled[leaf]).to(scaled[leaf].dtype)
        if all(map(torch.equal, call.outputs(scaled, {position: x / scales.to(x.dtype)}), expected)):
            return [
                Axis(module=call.module, leaf=leaf, dim=_held_dim(call.module, leaf, dim), channels=channels)
                for leaf, dim in chosen
            ]
    return []


def _held_dim(module: nn.Module, leaf: str, dim: int) -> int:
    """A dimension of a parameter as it is held, from that as the forward sees it."""
    return {1: 2, 2: 1}[dim] if leaf in rows_first_of(module) else dim


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module itself, by name there."""
    return {leaf: parameter for leaf, parameter in module._parameters.items() if parameter is not None}


def float_positions(leaves: list[Any]) -> list[int]:
    """Where there are float tensors among the leaves of a tree."""
    return [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def along(factors: Tensor, dim: int, tensor: Tensor) -> Tensor:
    """Factors [n] shaped to multiply a dimension of a tensor."""
    return factors.to(tensor.device).view([-1 if index == dim else 1 for index in range(tensor.ndim)])
