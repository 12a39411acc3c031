"""Published folders whose weights are quantized: those of gpt-oss (MXFP4) and of DeepSeek and Qwen (FP8 in blocks).

Transformers dequantizes them while it loads them, whole. What is trained, and written, has no trace of the old quantization.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import finegrained_fp8
from transformers.quantizers import quantizer_finegrained_fp8
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

DEQUANTIZED: dict[str, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Methods that are dequantized while loading, and their configs."""

SCALES_OF_FP8 = "_scale_inv"
"""What the name of a weight in FP8 ends with in the name of its scales, float32 or bf16 [rows / 128, columns / 128]."""
SCALES_OF_INPUTS = ".activation_scale"
"""What the name of a module in FP8 ends with in the name of the scale of its input, which is of no use to other formats."""


def take_quantization(config: PretrainedConfig, path: str) -> dict[str, Any] | None:
    """Remove `quantization_config` from the config of a folder. Returns it, or None where there is none.

    Raises ValueError for a method that is not dequantized here.
    """
    found: Any = None
    for part in (config, config.get_text_config()):
        found = found or getattr(part, "quantization_config", None)
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if not found:
        return None
    settings = dict(found if isinstance(found, Mapping) else found.to_dict())
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method not in DEQUANTIZED:
        raise ValueError(
            f"model.path={path!r} is quantized with {method}, which is not undone here; training starts from the bf16 model, or from "
            f"one in {' or '.join(DEQUANTIZED)}"
        )
    return settings | {"quant_method": method}


def note(settings: Mapping[str, Any] | None) -> str | None:
    """A line for the user about a folder with this quantization; None for one that has none."""
    if settings is None:
        return None
    return f"the folder's weights are in {settings['quant_method']}; they were dequantized while loading, whole on each rank"


def dequantize_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """A weight [N, K] in FP8 times the scale of each of its blocks, [N / rows, K / columns] rounded up, or its only one, in float32."""
    if scales.numel() == 1:
        return weight.float() * scales.float().view(())
    rows, columns = block
    wide = scales.float().repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return weight.float() * wide


def block_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block of an FP8 folder, by its quantization config."""
    rows, columns = settings.get("weight_block_size") or (128, 128)
    return rows, columns


@contextmanager
def dequantizing(config: PretrainedConfig, settings: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The arguments with which `from_pretrained` dequantizes a folder while it loads it; none for a folder that is not quantized."""
    if settings is None:
        yield {"config": config}
        return
    quantized = copy.deepcopy(config)
    quantized.quantization_config = dict(settings)
    arguments = {"config": quantized, "quantization_config": DEQUANTIZED[settings["quant_method"]](dequantize=True)}
    with _any_number_of_rows(block_of(settings)) if settings["quant_method"] == "fp8" else _nothing():
        yield arguments


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _any_number_of_rows(block: tuple[int, int]) -> Iterator[None]:
    """Let transformers dequantize FP8 weights whose sizes are no multiples of the block's (DeepSeek's kv_a_proj has 576 rows).

    Seen in 5.17 to 5.24. It also asks for accelerate, which it does not need to dequantize.
    """
    operation, module = finegrained_fp8.Fp8Dequantize, quantizer_finegrained_fp8
    original, is_available = operation._dequantize_one, module.is_accelerate_available

    def dequantize_one(self: Any, quantized: Tensor, scales: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rounded_up = tuple(-(-size // step) for size, step in zip(quantized.shape, block, strict=False))
        # 5.17 has cast them to the dtype of the model. Packed FP4 is in integers.
        if not quantized.is_floating_point() or quantized.dim() != 2 or tuple(scales.shape) != rounded_up:
            return original(self, quantized, scales, *args, **kwargs)
        dtype = kwargs.get("output_dtype") or next(iter(args), None) or torch.float32
        return dequantize_blocks(quantized, scales, block).to(dtype)

    operation._dequantize_one, module.is_accelerate_available = dequantize_one, lambda *_: True  # type: ignore
    try:
        yield
    finally:
        operation._dequantize_one, module.is_accelerate_available = original, is_available  # type: ignore


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove every trace of the quantization that a loaded model had, so that it is saved like any other."""
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        if name in vars(model):
            delattr(model, name)
