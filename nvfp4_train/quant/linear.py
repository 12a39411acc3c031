"""Linears whose inputs are quantized as they are served, with codes in place of the input for the backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.expert_inputs import has_open_inputs
from nvfp4_train.quant.experts import find_experts, input_module
from nvfp4_train.quant.inputs import InputQuantizer, InputQuantizers
from nvfp4_train.quant.manifest import QuantManifest


class _LinearOfCodes(torch.autograd.Function):
    """y = x_hat W' + b, of an input x that was quantized to x_hat. The gradient of x_hat is taken for that of x (STE):

        dx = dy W    dW = dy' x_hat    db = sum of dy

    Codes and block scales are kept for dW, 0.5625 byte an element, where `F.linear` keeps x or x_hat.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_hat: Tensor,
        packed: Tensor,
        scales: Tensor,
        input_scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        codes = (packed, scales, input_scale) if needs_dw else (None, None, None)
        ctx.save_for_backward(*codes, weight if needs_dx else None)
        return F.linear(x_hat, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales, input_scale, weight = ctx.saved_tensors
        (dy,) = grads
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[-1])
        if ctx.needs_input_grad[5]:
            x_hat = torch.ops.nvfp4.dequantize(packed, scales, input_scale, dy.dtype)
            dw = rows.t() @ x_hat.view(-1, x_hat.shape[-1])
        if ctx.needs_input_grad[6]:
            db = rows.sum(0)
        return dx, None, None, None, None, dw, db


class NVFP4Linear(nn.Linear):
    """An `nn.Linear` that quantizes its input while its quantizer is enabled. `quantize_inputs` makes it of a linear, in place."""

    input_quantizer: InputQuantizer

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_quantizer.is_enabled:
            return super().forward(x)
        x_hat, packed, scales, input_scale = self.input_quantizer(x)
        if packed is None:
            return F.linear(x_hat, self.weight, self.bias)
        return _LinearOfCodes.apply(x, x_hat, packed, scales, input_scale, self.weight, self.bias)


def quantize_inputs(model: nn.Module, manifest: QuantManifest, scale_of: Callable[[str], Tensor]) -> InputQuantizers:
    """Let the linears of a manifest quantize their inputs, in place, once `enable` of the returned quantizers is called; so do experts
    whose inputs are open (`open_inputs`).

    Parameters and `state_dict` stay as they are. Call it before `show_served`, torch.compile and `fully_shard`, all of which look at
    the classes of modules. `scale_of` gives the live scale of a group, float32 [1], by the name of its first parameter; it is called
    once the quantizers are enabled.

    Raises:
        ValueError: A parameter of the manifest is no weight of an `nn.Linear`, or its linear has inputs that are no multiple of 16.
    """
    experts = find_experts(model)
    linears = {name: _linear_of(model, name) for name in manifest.names if name not in experts}
    num_siblings = {group[0]: len({linears.get(name, name) for name in group}) for group in manifest.groups}
    quantizers = InputQuantizers(manifest.groups, num_siblings, scale_of)
    for group in manifest.groups:
        for name in group:
            if name in linears:
                linears[name].__class__ = NVFP4Linear
                linears[name].input_quantizer = quantizers[group[0]]  # type: ignore[assignment]
            elif has_open_inputs(experts[name].module):
                input_module(model, name).quantizer = quantizers[group[0]]  # type: ignore[assignment]
    return quantizers


def _linear_of(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name.rpartition(".")[0])
    if type(module) is not nn.Linear or name.rpartition(".")[2] != "weight":
        raise ValueError(
            f"quant.activations=nvfp4 quantizes inputs of nn.Linear alone, got {name} of a {type(module).__name__}; exclude it "
            "with quant.exclude"
        )
    if module.in_features % BLOCK_SIZE:
        raise ValueError(
            f"quant.activations=nvfp4 needs a number of inputs that is a multiple of {BLOCK_SIZE}, got {module.in_features} of "
            f"{name}; exclude it with quant.exclude"
        )
    return module
