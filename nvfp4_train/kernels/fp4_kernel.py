"""NVFP4 quantization of tensors: the public functions, on CPU or CUDA.

They check their arguments and call `torch.ops.nvfp4`. `reference` is their specification. A block is 16 consecutive elements of
the last dimension, unless a function takes other sizes. Floating-point inputs are float32, bfloat16 or float16, of any strides.
A global scale lies in 2^-128 to 2^119, as `nvfp4_global_scale` gives it; quantizing under any other means nothing.

All raise ValueError for other shapes, dtypes and devices than they name. On the CPU they refuse values, too: a global scale outside
of these limits, an input scale that is no power of two, and an amax that is NaN, Inf or negative. On CUDA the host would have to wait
for the device to see values, and torch.compile sees none while it traces; a NaN is passed on there to all that it scales.
"""

import math

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels import reference
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-128, 2.0**119
"""Limits of a global scale."""
SMALLEST_INPUT_SCALE, LARGEST_INPUT_SCALE = 2.0**-100, 2.0**100
"""Limits of the scale of a linear's input."""


def compute_fp4_scales(amax: Tensor, global_amax: Tensor | None = None, quantize_block_scales: bool = True) -> Tensor:
    """Decode scale of each block from its amax: float32, shaped like amax. The arithmetic is Model Optimizer's.

    amax / 6; with quantize_block_scales, rounded to E4M3 relative to global_amax, which is the largest amax if None. On CUDA the
    division is a product with fp32(1 / 6), as torch divides by a number there.
    """
    _check_float(amax=amax)
    global_amax = _checked_global_amax(amax, global_amax)
    if amax.numel() == 0:
        return torch.empty_like(amax, dtype=torch.float32)
    return torch.ops.nvfp4.static_scales(amax, global_amax, quantize_block_scales)


def static_blockwise_fp4_fake_quant(
    x: Tensor,
    amax: Tensor,
    global_amax: Tensor | None = None,
    quantize_block_scales: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K], quantized to FP4 and back under given block amax: shaped like x, in out_dtype (that of x if None).

    amax has one element per block, in the order of the blocks and in any shape; its scales are those of `compute_fp4_scales`. The
    block size is x.numel() // amax.numel() and divides K. On CUDA multiples of 8 are one kernel, compiled once for each size;
    other sizes are several PyTorch operations.
    """
    out_dtype = _checked_out_dtype(x, out_dtype)
    _check_float(amax=amax)
    _check_same_device(x, amax=amax)
    _check_divides_into_blocks(x, amax)
    global_amax = _checked_global_amax(amax, global_amax)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=out_dtype)
    return torch.ops.nvfp4.static_fake_quant(x, amax, global_amax, quantize_block_scales, out_dtype)


def fp4_dequantize(
    packed_tensor: Tensor,
    scale_tensor: Tensor,
    global_scale: Tensor,
    block_size: int = 16,
    tile_size: int = 128,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """value(code) * (scale * global_scale) of uint8 codes [..., N // 2], even elements in the low nibbles: [..., N] in dtype.

    scale_tensor is [..., N // block_size], float8_e4m3fn or a float dtype; global_scale has one element. tile_size has no
    effect: the kernel chooses its own tile. Each block_size compiles a kernel of its own.
    """
    _check_tensors(packed_tensor=packed_tensor, scale_tensor=scale_tensor)
    if packed_tensor.dtype != torch.uint8:
        raise ValueError(f"packed_tensor must be uint8, got {packed_tensor.dtype}")
    if scale_tensor.dtype != torch.float8_e4m3fn:
        _check_float(scale_tensor=scale_tensor)
    _check_float(global_scale=global_scale)
    _check_dtype("dtype", dtype)
    if packed_tensor.dim() == 0:
        raise ValueError("packed_tensor must have at least one dimension, got a scalar")
    num_columns = packed_tensor.shape[-1] * 2
    if block_size < 1 or num_columns % block_size:
        raise ValueError(
            f"block_size must divide the {num_columns} columns of the unpacked tensor, got block_size={block_size}"
        )
    required = (*packed_tensor.shape[:-1], num_columns // block_size)
    if scale_tensor.shape != required:
        raise ValueError(
            f"scale_tensor must have shape {required} for packed_tensor of shape {tuple(packed_tensor.shape)} and "
            f"block_size={block_size}, got {tuple(scale_tensor.shape)}"
        )
    _check_single("global_scale", global_scale)
    _check_same_device(packed_tensor, scale_tensor=scale_tensor, global_scale=global_scale)
    return torch.ops.nvfp4.dequantize(packed_tensor, scale_tensor, global_scale.reshape(()), dtype)


def nvfp4_block_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each block: x [..., K] -> float32 [..., K // 16]. NaN propagates."""
    _check_float(x=x)
    _check_blocks("x", x)
    return torch.ops.nvfp4.block_amax(x)


def nvfp4_global_scale(global_amax: Tensor, rule: ScaleRule = MAX_RULE) -> Tensor:
    """s2 of each global amax, same shape, float32: global_amax / (6 * rule.largest), under pow2 raised to a power of two."""
    _check_float(global_amax=global_amax)
    _check_finite("global_amax", global_amax)
    return reference.global_scale(global_amax.detach(), rule)


def nvfp4_quantize(
    x: Tensor, global_scale: Tensor, rule: ScaleRule = MAX_RULE, steps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., K] under its s2 -> packed codes uint8 [..., K // 2] and block scales float8_e4m3fn [..., K // 16].

    A fitted rule takes the steps of the blocks, int8 [..., K // 16], as `nvfp4_choose_steps` gives them, now or some time ago.
    """
    global_scale = _checked_global_scale(x, global_scale)
    _check_steps(x, rule, steps)
    return torch.ops.nvfp4.quantize(x, global_scale, rule.block_scale, steps)


def nvfp4_fake_quant(
    x: Tensor,
    global_scale: Tensor,
    out_dtype: torch.dtype | None = None,
    rule: ScaleRule = MAX_RULE,
    steps: Tensor | None = None,
) -> Tensor:
    """`fp4_dequantize(*nvfp4_quantize(x, s2, rule, steps), s2)` in one pass: shaped like x, in out_dtype (that of x if None)."""
    out_dtype = _checked_out_dtype(x, out_dtype)
    global_scale = _checked_global_scale(x, global_scale)
    _check_steps(x, rule, steps)
    return torch.ops.nvfp4.fake_quant(x, global_scale, out_dtype, rule.block_scale, steps)


def nvfp4_choose_steps(x: Tensor, global_scale: Tensor, hessian: Tensor, rule: ScaleRule) -> Tensor:
    """The steps of the blocks of x [..., K] under a fitted rule: int8 [..., K // 16].

    hessian is float32 [K // 16, 16, 16], for each block of columns the mean of x_b x_b' over the inputs x_b of the layer there. A
    step is chosen so that the mean square of what quantizing the block adds to the layer's output is least.
    """
    global_scale = _checked_global_scale(x, global_scale)
    if not rule.is_fitted:
        raise ValueError(f"rule must be fitted to choose steps, as block_scale='hessian' is, got {rule.block_scale!r}")
    _check_tensors(hessian=hessian)
    required = (x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
    if hessian.dtype != torch.float32 or hessian.shape != required:
        raise ValueError(
            f"hessian must be float32 of shape {required} for x of shape {tuple(x.shape)}, "
            f"got {hessian.dtype} of shape {tuple(hessian.shape)}"
        )
    _check_same_device(x, hessian=hessian)
    return torch.ops.nvfp4.choose_steps(x, global_scale, hessian, rule.block_scale)


def nvfp4_quantize_input(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An input x [..., K] of a linear as it is served, decoded and in code, in one pass.

    Returns x_hat shaped like x in its dtype, packed codes uint8 [..., K // 2] and block scales float8_e4m3fn [..., K // 16]. x_hat is
    `fp4_dequantize(packed, scales, input_scale)`. input_scale is float32 with one element, a power of two from 2^-100 to 2^100: the
    inverse of the `input_global_scale` of an exported folder. See `reference.quantize_input` for the arithmetic.
    """
    return torch.ops.nvfp4.quantize_input(x, _checked_input_scale(x, input_scale))


def nvfp4_fake_quant_input(x: Tensor, input_scale: Tensor) -> Tensor:
    """The first result of `nvfp4_quantize_input` alone."""
    return torch.ops.nvfp4.fake_quant_input(x, _checked_input_scale(x, input_scale))


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype}")


def _check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def _check_float(**tensors: Tensor) -> None:
    _check_tensors(**tensors)
    for name, tensor in tensors.items():
        _check_dtype(f"the dtype of {name}", tensor.dtype)


def _checked_out_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    _check_float(x=x)
    if out_dtype is None:
        return x.dtype
    _check_dtype("out_dtype", out_dtype)
    return out_dtype


def _check_blocks(name: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"the last dimension of {name} must be a multiple of the block size {BLOCK_SIZE}, got shape {tuple(x.shape)}"
        )


def _check_steps(x: Tensor, rule: ScaleRule, steps: Tensor | None) -> None:
    """Raise ValueError unless there are steps for every block of x under a fitted rule, and none under any other."""
    if not rule.is_fitted:
        if steps is not None:
            raise ValueError(f"steps are for fitted rules alone, got some under rule {rule.block_scale!r}")
        return
    if steps is None:
        raise ValueError(f"steps are required under rule {rule.block_scale!r}, got None: see nvfp4_choose_steps")
    _check_tensors(steps=steps)
    required = (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)
    if steps.dtype != torch.int8 or steps.shape != required:
        raise ValueError(
            f"steps must be int8 of shape {required} for x of shape {tuple(x.shape)}, "
            f"got {steps.dtype} of shape {tuple(steps.shape)}"
        )
    _check_same_device(x, steps=steps)


def _check_divides_into_blocks(x: Tensor, amax: Tensor) -> None:
    """Raise ValueError unless amax has one element for each of equally large blocks of the last dimension of x."""
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    num_blocks = amax.numel()
    got = f"got {num_blocks} in shape {tuple(amax.shape)} for x of shape {tuple(x.shape)}"
    if x.numel() == 0:
        if num_blocks:
            raise ValueError(f"amax must have no element where x has none, {got}")
    elif num_blocks == 0 or x.numel() % num_blocks:
        raise ValueError(f"amax must have a number of elements that divides the {x.numel()} of x, {got}")
    elif x.shape[-1] % (x.numel() // num_blocks):
        raise ValueError(
            f"the block size x.numel() // amax.numel() must divide the last dimension of x, {x.shape[-1]}, but it is "
            f"{x.numel() // num_blocks}: amax must have one element per block, {got}"
        )


def _check_single(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise ValueError(f"{name} must have one element, got {tensor.numel()} in shape {tuple(tensor.shape)}")


def _check_same_device(x: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of the quantized tensor, {x.device}, got {tensor.device}")


def _check_scale(global_scale: Tensor) -> None:
    """Raise ValueError for a global scale under which scales or values would leave fp32, where its value can be read."""
    if _is_readable(global_scale) and not SMALLEST_SCALE <= (value := global_scale.item()) <= LARGEST_SCALE:
        raise ValueError(f"global_scale must lie in 2^-128 to 2^119, as nvfp4_global_scale gives it, got {value}")


def _is_readable(tensor: Tensor) -> bool:
    """Whether a check may read values: tensors on the CPU, outside of torch.compile."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def _check_finite(name: str, amax: Tensor) -> None:
    if not _is_readable(amax):
        return
    num_bad = amax.numel() - int((amax.isfinite() & (amax >= 0)).sum())
    if num_bad:
        raise ValueError(
            f"{name} must be finite and not negative, got {num_bad} NaN, Inf or negative among {amax.numel()} values"
        )


def _checked_global_amax(amax: Tensor, global_amax: Tensor | None) -> Tensor:
    _check_finite("amax", amax)
    if global_amax is None:
        return amax.max() if amax.numel() else amax.new_zeros(())
    _check_float(global_amax=global_amax)
    _check_single("global_amax", global_amax)
    _check_same_device(amax, global_amax=global_amax)
    _check_finite("global_amax", global_amax)
    return global_amax.reshape(())


def _checked_global_scale(x: Tensor, global_scale: Tensor) -> Tensor:
    _check_float(x=x)
    _check_blocks("x", x)
    _check_float(global_scale=global_scale)
    _check_single("global_scale", global_scale)
    _check_same_device(x, global_scale=global_scale)
    _check_scale(global_scale)
    # By broadcasting, a scale of shape [1, 1, 1] would give the result of a matrix three dimensions.
    return global_scale.float().reshape(())


def _checked_input_scale(x: Tensor, input_scale: Tensor) -> Tensor:
    _check_float(x=x)
    _check_blocks("x", x)
    _check_tensors(input_scale=input_scale)
    if input_scale.dtype != torch.float32:
        raise ValueError(f"input_scale must be float32, got {input_scale.dtype}")
    _check_single("input_scale", input_scale)
    _check_same_device(x, input_scale=input_scale)
    if _is_readable(input_scale) and not is_input_scale(input_scale.item()):
        raise ValueError(f"input_scale must be a power of two from 2^-100 to 2^100, got {input_scale.item()}")
    return input_scale.reshape(())


def is_input_scale(value: float) -> bool:
    """Whether a number may be the scale of a linear's input: a power of two from 2^-100 to 2^100."""
    return SMALLEST_INPUT_SCALE <= value <= LARGEST_INPUT_SCALE and math.frexp(value)[0] == 0.5
