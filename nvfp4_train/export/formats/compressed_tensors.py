"""compressed-tensors' `nvfp4-pack-quantized`, W4A16 or W4A4: what vLLM, SGLang and transformers load.

A quantized linear P of N x K is, in place of `P.weight`:

    P.weight_packed         uint8 [N, K / 2]            two E2M1 codes a byte, the even element in the low nibble
    P.weight_scale          float8_e4m3fn [N, K / 16]   block scales, row-major
    P.weight_global_scale   float32 [1]                 the divisor 1 / s2, of shape [1] and not []
    P.input_global_scale    float32 [1]                 W4A4 alone: that of its input, which readers quantize as it comes
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvfp4_train.export.formats.base import Format, QuantizedTensor, unquantized
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.weight_reads import read_past_forward
from nvfp4_train.quant.manifest import QuantManifest

FORMAT_NAME = "nvfp4-pack-quantized"


class CompressedTensors(Format):
    def tensors(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        tensors = {
            f"{module}.weight_packed": weight.codes[0],
            f"{module}.weight_scale": weight.block_scales[0],
            f"{module}.weight_global_scale": 1.0 / weight.global_scale,
        }
        if weight.input_scale is not None:
            tensors[f"{module}.input_global_scale"] = 1.0 / weight.input_scale
        return tensors

    def configs(self, layout: HubLayout, quantized: Mapping[str, str], manifest: QuantManifest) -> dict[str, dict[str, Any]]:
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group",
            "group_size": 16,
            "dynamic": False,
        }
        # Block scales are chosen as an input comes ("local"), the global scale is not. Transformers rounds them to their dtype alone.
        inputs = weights | {"dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
        group = {
            "targets": ["Linear"],
            "format": FORMAT_NAME,
            "weights": weights,
            "input_activations": inputs if manifest.activations == "nvfp4" else None,
            "output_activations": None,
        }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": FORMAT_NAME,
            "quantization_status": "compressed",
            "ignore": _ignored(layout, quantized),
            "kv_cache_scheme": None,
            "config_groups": {"group_0": group},
        }
        return {"config.json": {"quantization_config": quantization}}

    def note(self, layout: HubLayout, quantized: Mapping[str, str]) -> str | None:
        decoded = "what `python launch/convert.py FOLDER OTHER --to bf16` decodes"
        if not layout.has_names_of_transformers():
            # Seen in transformers 5.17 to 5.24: an error, random experts, or experts without their global scales.
            return (
                "transformers joins or splits tensors of this model while it loads them, and not rightly beside packed ones: it fails, "
                f"or computes with other weights without a word. Let it load {decoded}"
            )
        if read_past := read_past_forward(layout.model, quantized):
            return (
                f"transformers fails with this folder, whose class reads the weight of {read_past[0]} past its forward. "
                f"It loads {decoded}"
            )
        return None


def _ignored(layout: HubLayout, quantized: Mapping[str, str]) -> list[str]:
    """`ignore` entries: full names, and a regular expression for all experts of a module, or all of a block."""
    modules, experts, blocks = unquantized(layout, quantized)
    on_disk = layout.quantized_expert_modules()
    patterns = []
    for name in experts:
        # The end of the name, since engines have other prefixes; all of it where experts of another layer are quantized.
        end = "." + ".".join(name.split(".")[-2:]) + "."
        is_shared = any(end in module for module in on_disk)
        patterns.append(f"re:.*{re.escape(f'{name}.' if is_shared else end)}.*")
    patterns += [f"re:^{re.escape(block)}\\..*" for block in blocks]
    return list(dict.fromkeys([*modules, *patterns]))


FORMAT = CompressedTensors()
