"""The one place where CPU and CUDA part ways: `torch.ops.nvfp4`, the arithmetic as operators, and the passes of `multi_tensor`.

CPU tensors go to `reference`, CUDA tensors to `triton_kernels` and `multi_tensor_kernels`, meta and fake tensors get shapes, so
torch.compile traces through. The operators are registered on a bare `Library`, whose calls cost less than those of
`torch.library.custom_op`. They check neither values nor shapes: `fp4_kernel` does. None has a gradient, on any device: the
straight-through estimator (STE) belongs to the caller.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nvfp4_train.kernels import code_history, reference, statistics_reference
from nvfp4_train.kernels.chunks import Slots, Weights
from nvfp4_train.kernels.multi_tensor_reference import ReferencePasses
from nvfp4_train.kernels.scale_rules import ScaleRule

_library = torch.library.Library("nvfp4", "DEF")


@functools.cache
def _kernels(module: str) -> ModuleType:
    """A module of kernels, imported at the first call on CUDA: on Windows and macOS there is no Triton to import."""
    return importlib.import_module(f"nvfp4_train.kernels.{module}")


def _register(schema: str, on_cpu: Callable, fake: Callable, module: str = "triton_kernels") -> None:
    name = schema.partition("(")[0]
    is_mutating = "!" in schema

    def check(*args):
        for arg in args:
            if isinstance(arg, Tensor) and not arg.is_contiguous():
                raise ValueError(
                    f"{name} takes contiguous tensors alone, got strides {arg.stride()} of shape {tuple(arg.shape)}"
                )

    # Without it autograd would record the operations of `reference`.
    @torch.no_grad()
    def cpu(*args):
        if args[0].numel() == 0:
            return fake(*args)
        if is_mutating:
            check(*args)
        else:
            args = tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
        return on_cpu(*args)

    def cuda(*args):
        if is_mutating:
            check(*args)
        return getattr(_kernels(module), name)(*args)

    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"nvfp4::{name}", fake, lib=_library)


def passes(weights: Weights, slots: Slots, rule: ScaleRule) -> ReferencePasses:
    """The passes over all weights of a model, on the device of the weights."""
    # No operators: an operator would look at every tensor of every list at every step, which takes longer than the launches.
    make = _kernels("multi_tensor_kernels").TritonPasses if weights.device.type == "cuda" else ReferencePasses
    return make(weights, slots, rule)


def weight_changes(*args: Any) -> Tensor:
    """`statistics_reference.weight_changes` on the device of the weight."""
    # No operator either: what it changes in place are most of its arguments, and views of rows are no contiguous tensors.
    changes = _kernels("statistics_kernels") if args[0].is_cuda else statistics_reference
    return changes.weight_changes(*args)


def _static_fake_quant(x: Tensor, amax: Tensor, global_amax: Tensor, quantize_block_scales: bool, dtype: torch.dtype) -> Tensor:
    return reference.static_fake_quant(x, reference.static_scales(amax, global_amax, quantize_block_scales), dtype)


def _fake_block_amax(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // reference.BLOCK_SIZE), dtype=torch.float32)


def _quantize(x: Tensor, s2: Tensor, block_scale: str = "max", steps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return reference.quantize(x, s2, ScaleRule(block_scale=block_scale), steps)


def _fake_quant(x: Tensor, s2: Tensor, dtype: torch.dtype, block_scale: str = "max", steps: Tensor | None = None) -> Tensor:
    return reference.fake_quant(x, s2, dtype, ScaleRule(block_scale=block_scale), steps)


def _choose_steps(x: Tensor, s2: Tensor, hessian: Tensor, block_scale: str) -> Tensor:
    return reference.choose_steps(x, s2, hessian, ScaleRule(block_scale=block_scale))


def _fake_quantize(x: Tensor, s2: Tensor, block_scale: str = "max", steps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return packed, _fake_block_amax(x).to(torch.float8_e4m3fn)


def _quantize_input(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed, scales = reference.quantize_input(x, input_scale)
    return reference.dequantize(packed, scales, input_scale, x.dtype), packed, scales


def _fake_quantize_input(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_fake_quantize(x, input_scale)


def _fake_weight_sums(master: Tensor, codes: Tensor, block_scales: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    return master.new_zeros(statistics_reference.NUM_SUMS, dtype=torch.float64), s2.new_zeros(s2.shape)


_register("block_amax(Tensor x) -> Tensor", reference.block_amax, _fake_block_amax)
_register(
    "static_scales(Tensor amax, Tensor global_amax, bool quantize_block_scales=True) -> Tensor",
    reference.static_scales,
    lambda amax, global_amax, quantize_block_scales=True: amax.new_empty(amax.shape, dtype=torch.float32),
)
_register(
    "static_fake_quant(Tensor x, Tensor amax, Tensor global_amax, bool quantize_block_scales, ScalarType dtype) -> Tensor",
    _static_fake_quant,
    lambda x, amax, global_amax, quantize_block_scales, dtype: x.new_empty(x.shape, dtype=dtype),
)
_register(
    'quantize(Tensor x, Tensor s2, str block_scale="max", Tensor? steps=None) -> (Tensor, Tensor)', _quantize, _fake_quantize
)
_register(
    'fake_quant(Tensor x, Tensor s2, ScalarType dtype, str block_scale="max", Tensor? steps=None) -> Tensor',
    _fake_quant,
    lambda x, s2, dtype, block_scale="max", steps=None: x.new_empty(x.shape, dtype=dtype),
)
_register(
    "choose_steps(Tensor x, Tensor s2, Tensor hessian, str block_scale) -> Tensor",
    _choose_steps,
    lambda x, s2, hessian, block_scale: _fake_block_amax(x).to(torch.int8),
)
_register(
    "dequantize(Tensor packed, Tensor scales, Tensor s2, ScalarType dtype) -> Tensor",
    reference.dequantize,
    lambda packed, scales, s2, dtype: packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype),
)
_register(
    "decode_shards(Tensor received, Tensor table, Tensor s2, Tensor(a!) out) -> ()",
    reference.decode_shards,
    lambda received, table, s2, out: None,
    module="multi_tensor_kernels",
)
_register(
    "quantize_input(Tensor x, Tensor input_scale) -> (Tensor, Tensor, Tensor)",
    _quantize_input,
    _fake_quantize_input,
    module="input_kernels",
)
_register(
    "fake_quant_input(Tensor x, Tensor input_scale) -> Tensor",
    reference.fake_quant_input,
    lambda x, input_scale: x.new_empty(x.shape),
    module="input_kernels",
)
_register(
    "follow_codes(Tensor packed, Tensor scales, Tensor s2, Tensor(a!) history, Tensor(b!) master, Tensor(c!) counts, "
    "int min_reversals, int action) -> ()",
    code_history.follow_codes,
    lambda packed, scales, s2, history, master, counts, min_reversals, action: None,
    module="code_history_kernel",
)
_register(
    "weight_sums(Tensor master, Tensor codes, Tensor block_scales, Tensor s2) -> (Tensor, Tensor)",
    statistics_reference.weight_sums,
    _fake_weight_sums,
    module="statistics_kernels",
)
