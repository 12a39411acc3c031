"""What Model Optimizer and torchao have for the same work, where they are installed; each with the settings that suit it best."""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Peer = tuple[str, Callable[[], object]]
BLOCK_SIZE = 16


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def has_model_optimizer() -> bool:
    return _has("modelopt")


def model_optimizer_functions():
    """Model Optimizer's functions of the names that `fp4_kernel` has."""
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel
    from modelopt.torch.quantization import extensions

    # It compiles a CUDA extension at first use, for a minute; its PyTorch formula is the same arithmetic.
    extensions.get_cuda_ext_fp8.extension = None
    return fp4_kernel


def kernels(row: str, x: Tensor, block_amax: Tensor, global_amax: Tensor) -> Iterator[Peer]:
    """Callables that do what a row of `kernels.py` does to x, bf16 [N, K], under global_amax."""
    if has_model_optimizer():
        yield from _of_model_optimizer(row, x, block_amax, global_amax)
    if _has("torchao"):
        yield from _of_torchao(row, x, global_amax)


def _of_model_optimizer(row: str, x: Tensor, block_amax: Tensor, global_amax: Tensor) -> Iterator[Peer]:
    functions = model_optimizer_functions()
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    s2 = global_amax.float() / (6 * 448)
    if row == "static fake quant":
        yield "Model Optimizer", lambda: functions.static_blockwise_fp4_fake_quant(x, block_amax, global_amax)
    elif row == "dynamic fake quant":
        yield "Model Optimizer", lambda: fp4_fake_quant_block(x, global_amax)
    elif row == "quantize and pack":
        yield "Model Optimizer", lambda: NVFP4QTensor.quantize(x, BLOCK_SIZE, None, s2)
    elif row == "dequantize":
        # `fast=True` needs an instruction that only Blackwell has.
        packed, scales, _ = NVFP4QTensor.quantize(x, BLOCK_SIZE, None, s2)
        arguments = {"scale": scales, "double_scale": s2, "block_sizes": {-1: BLOCK_SIZE}}
        yield "Model Optimizer", lambda: packed.dequantize(x.dtype, **dict(arguments))


def _of_torchao(row: str, x: Tensor, global_amax: Tensor) -> Iterator[Peer]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize, per_tensor_amax_to_scale

    s2 = per_tensor_amax_to_scale(global_amax)

    def fake_quant(x: Tensor) -> Tensor:
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=s2).dequantize(x.dtype)

    if row == "dynamic fake quant":
        compiled = torch.compile(fake_quant)
        yield "torchao, compiled", lambda: compiled(x)
    elif row == "quantize and pack":
        compiled = torch.compile(nvfp4_quantize)
        yield "torchao, compiled", lambda: compiled(x, BLOCK_SIZE, s2)
    elif row == "dequantize":
        packed = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=s2)
        compiled = torch.compile(lambda tensor: tensor.dequantize(torch.bfloat16))
        yield "torchao, compiled", lambda: compiled(packed)


def quantize_weights_with_model_optimizer(model: nn.Module) -> None:
    """Weight-only NVFP4 fake quantization of a plain model by Model Optimizer, in place."""
    import modelopt.torch.quantization as mtq

    model_optimizer_functions()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
