"""Model Optimizer's unified layout, `NVFP4` (W4A4) or `W4A16_NVFP4`: what TensorRT-LLM, vLLM and SGLang load.

A quantized linear P of N x K is

    P.weight            uint8 [N, K / 2]            two E2M1 codes a byte, the even element in the low nibble
    P.weight_scale      float8_e4m3fn [N, K / 16]   block scales, row-major
    P.weight_scale_2    float32 []                  the multiplier s2, of shape [] and not [1]
    P.input_scale       float32 []                  W4A4 alone: that of its input, 1 / g

Codes and block scales are the bytes of compressed-tensors; global scales are the inverses of its divisors.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvfp4_train.export.formats.base import Format, QuantizedTensor, unquantized
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.manifest import QuantManifest

LAYOUT_VERSION = "0.47.0"
"""The version of Model Optimizer that writes this layout. Readers know the format by its producer."""


class ModelOpt(Format):
    def tensors(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        tensors = {
            f"{module}.weight": weight.codes[0],
            f"{module}.weight_scale": weight.block_scales[0],
            # In memory of its own: safetensors refuses what shares it with the scale of another expert.
            f"{module}.weight_scale_2": weight.global_scale[0].clone(),
        }
        if weight.input_scale is not None:
            tensors[f"{module}.input_scale"] = weight.input_scale[0].clone()
        return tensors

    def configs(self, layout: HubLayout, quantized: Mapping[str, str], manifest: QuantManifest) -> dict[str, dict[str, Any]]:
        quantizes_inputs = manifest.activations == "nvfp4"
        common = {
            "producer": {"name": "modelopt", "version": LAYOUT_VERSION},
            "quant_algo": "NVFP4" if quantizes_inputs else "W4A16_NVFP4",
        }
        excluded = _excluded(layout, quantized)
        args = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
        group = {"targets": ["Linear"], "weights": args} | ({"input_activations": args} if quantizes_inputs else {})
        return {
            "config.json": {
                "quantization_config": common
                | {"quant_method": "modelopt", "ignore": excluded, "config_groups": {"group_0": group}}
            },
            # vLLM asks for each of these, TensorRT-LLM reads this file alone.
            "hf_quant_config.json": {
                "producer": common["producer"],
                "quantization": {
                    "quant_algo": common["quant_algo"],
                    "kv_cache_quant_algo": None,
                    "group_size": 16,
                    "exclude_modules": excluded,
                },
            },
        }

    def note(self, layout: HubLayout, quantized: Mapping[str, str]) -> str | None:
        return (
            "transformers does not load this format; of this folder, "
            "`python launch/convert.py FOLDER OTHER --to compressed_tensors` makes one of the format that it knows"
        )


def _excluded(layout: HubLayout, quantized: Mapping[str, str]) -> list[str]:
    """Full names, and a wildcard for all experts of a module. vLLM takes names that an entry is a part of for excluded as well."""
    modules, experts, blocks = unquantized(layout, quantized)
    wildcards = [*(f"{name}*" for name in experts), *(f"{name}.*" for name in blocks)]
    return list(dict.fromkeys([*modules, *layout.embeddings(), *wildcards]))


FORMAT = ModelOpt()
