"""How far the hidden states of a student are from its teacher's: a second aim of distillation, at several depths of the model."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_train.models.causal_lm import decoder_layers

NUM_LAYERS = 6
"""Decoder layers whose outputs are compared, evenly spaced, the last one among them."""

SMALLEST_VARIANCE = 1e-6
"""Of a channel, as a share of the mean square over all of them. Channels that hardly vary would outweigh all others."""


class LayerOutputs:
    """Records the hidden states that some decoder layers of a model return, [B, T, H] each, from `start` to `take`.

    Not while activations are recomputed in a backward: that is after `take`.
    """

    def __init__(self, model: nn.Module) -> None:
        """Call it once the model is sharded and its layers are set to be compiled."""
        layers = decoder_layers(model)
        num = num_compared(model)
        self._outputs: dict[int, Tensor] = {}
        self._is_on = False
        for index in range(1, num + 1):
            self._follow(layers[index * len(layers) // num - 1], index)

    def _follow(self, layer: Any, index: int) -> None:
        compiled = layer._compiled_call_impl
        if compiled is None:
            layer.register_forward_hook(lambda module, args, output: self._keep(index, output))
        else:
            # A hook would be compiled with the layer.
            layer._compiled_call_impl = partial(self._call, compiled, index)

    def _call(self, compiled: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        output = compiled(*args, **kwargs)
        self._keep(index, output)
        return output

    def _keep(self, index: int, output: Any) -> None:
        if self._is_on:
            self._outputs[index] = output if isinstance(output, Tensor) else output[0]

    def start(self) -> None:
        self._outputs, self._is_on = {}, True

    def take(self) -> list[Tensor]:
        """The outputs of the forward since `start`, in the order of the layers."""
        outputs, self._outputs, self._is_on = self._outputs, {}, False
        return [outputs[index] for index in sorted(outputs)]


def num_compared(model: nn.Module) -> int:
    """Of how many decoder layers the outputs are compared."""
    return min(NUM_LAYERS, len(decoder_layers(model)))


def hidden_error(student: list[Tensor], teacher: list[Tensor], weights: Tensor) -> Tensor:
    """Mean over layers, positions and channels of (h - t)^2 / var(t), the variance being a channel's over the batch's positions.

    Hidden states are [B, T, H] of any float dtype; `weights` of the B T positions, float32, add up to 1, or to 0 where none counts. The
    error is a scalar in float32. 1 is what predicting every channel's mean costs.
    """
    errors = []
    for h, t in zip(student, teacher, strict=True):
        h, t = h.flatten(0, -2).float(), t.flatten(0, -2).float()
        variance = t.var(0, correction=0) + SMALLEST_VARIANCE * t.square().mean() + torch.finfo(torch.float32).tiny
        errors.append(((h - t).square() / variance).mean(1) @ weights)
    return torch.stack(errors).mean()
