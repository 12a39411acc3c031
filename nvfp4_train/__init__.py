"""Quantization-aware training of language models in NVFP4. Start reading at kernels/reference.py, then quant/, then module.py."""

from typing import Any

__all__ = ["QuantConfig", "quantize"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: kernels alone need no transformers.
    if name == "quantize":
        from nvfp4_train.models.build import quantize

        return quantize
    if name == "QuantConfig":
        from nvfp4_train.quant.policy import QuantConfig

        return QuantConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
