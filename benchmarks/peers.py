"""Calls of Model Optimizer and torchao that do the same work, where these are installed.

Each has the settings that suit it best, with one exception: Model Optimizer's CUDA extension is off, since it takes a minute to
compile. It rounds block scales to E4M3, a sixteenth of the elements; without it PyTorch does.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

Peer = tuple[str, list[Callable[[], object]]]
BLOCK_SIZE = 16
BF16 = torch.bfloat16


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def has_model_optimizer() -> bool:
    return _has("modelopt")


def model_optimizer_functions():
    """Model Optimizer's module `fp4_kernel`, whose functions have the names of ours."""
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel
    from modelopt.torch.quantization import extensions

    # This turns the CUDA extension off. The PyTorch formula in its place is the same arithmetic.
    extensions.get_cuda_ext_fp8.extension = None
    return fp4_kernel


def kernels(row: str, xs: list[Tensor], amaxes: list[Tensor], global_amax: Tensor) -> Iterator[Peer]:
    """Calls, one per tensor, that do what a row of `kernels.py` does to xs, bf16 [N, K], of given block amax and global_amax."""
    if has_model_optimizer():
        yield from _of_model_optimizer(row, xs, amaxes, global_amax)
    if _has("torchao"):
        yield from _of_torchao(row, xs, global_amax)


def _of_model_optimizer(row: str, xs: list[Tensor], amaxes: list[Tensor], global_amax: Tensor) -> Iterator[Peer]:
    functions = model_optimizer_functions()
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    s2 = global_amax.float() / (6 * 448)

    def dequantize(packed, scales: Tensor) -> Tensor:
        # `fast=True` needs an instruction that only Blackwell has.
        return packed.dequantize(BF16, scale=scales, double_scale=s2, block_sizes={-1: BLOCK_SIZE})

    if row.startswith("static fake quant"):
        static = functions.static_blockwise_fp4_fake_quant
        yield "Model Optimizer", [partial(static, x, amax, global_amax) for x, amax in zip(xs, amaxes, strict=True)]
    elif row.startswith("dynamic fake quant"):
        yield "Model Optimizer", [partial(fp4_fake_quant_block, x, global_amax) for x in xs]
    elif row.startswith("quantize and pack"):
        yield "Model Optimizer", [partial(NVFP4QTensor.quantize, x, BLOCK_SIZE, None, s2) for x in xs]
    elif row.startswith("dequantize"):
        quantized = [NVFP4QTensor.quantize(x, BLOCK_SIZE, None, s2) for x in xs]
        yield "Model Optimizer", [partial(dequantize, packed, scales) for packed, scales, _ in quantized]


def _of_torchao(row: str, xs: list[Tensor], global_amax: Tensor) -> Iterator[Peer]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize, per_tensor_amax_to_scale

    s2 = per_tensor_amax_to_scale(global_amax)

    def fake_quant(x: Tensor) -> Tensor:
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=s2).dequantize(x.dtype)

    if row.startswith("dynamic fake quant"):
        compiled = torch.compile(fake_quant)
        yield "torchao, compiled", [partial(compiled, x) for x in xs]
    elif row.startswith("quantize and pack"):
        compiled = torch.compile(nvfp4_quantize)
        yield "torchao, compiled", [partial(compiled, x, BLOCK_SIZE, s2) for x in xs]
    elif row.startswith("dequantize"):
        compiled = torch.compile(lambda tensor: tensor.dequantize(BF16))
        yield "torchao, compiled", [partial(compiled, NVFP4Tensor.to_nvfp4(x, per_tensor_scale=s2)) for x in xs]


def quantize_with_model_optimizer(
    model: nn.Module, config: str = "W4A16_NVFP4_CFG", calibrate: Callable[[nn.Module], None] | None = None
) -> None:
    """Fake quantization of a plain model by Model Optimizer, in place: weights alone, or as another of its configs says.

    `calibrate` makes forwards of the model; it is needed where inputs are quantized.
    """
    import modelopt.torch.quantization as mtq

    model_optimizer_functions()
    mtq.quantize(model, getattr(mtq, config), calibrate)
