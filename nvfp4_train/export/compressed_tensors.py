"""Writer of compressed-tensors' `nvfp4-pack-quantized`, weights only (W4A16): what vLLM, SGLang and transformers load.

A quantized linear P of N x K is, in place of `P.weight`:

    P.weight_packed         uint8 [N, K / 2]            two E2M1 codes a byte, the even element in the low nibble
    P.weight_scale          float8_e4m3fn [N, K / 16]   block scales, row-major
    P.weight_global_scale   float32 [1]                 1 / s2: a divisor, shape [1] and not []

Everything else is bf16 under the name that the hub uses, buffers keep their dtype. Shards are written one after the other, so
that at most one of them is in memory; the folder is verified from disk before it gets its name.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from nvfp4_train.export.folder import check_target, replacing_folder
from nvfp4_train.export.layout import HubLayout
from nvfp4_train.export.masters import ServedWeights, group_scales, own_tensors, quantized_modules, to_served
from nvfp4_train.export.shards import write_shards
from nvfp4_train.export.verify import VerifyReport, verify_export
from nvfp4_train.kernels.fp4_kernel import nvfp4_quantize

FORMAT = "nvfp4-pack-quantized"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote."""

    folder: Path
    shards: int
    quantized: int
    """Linears written in NVFP4."""
    ignored: tuple[str, ...]
    """The `ignore` entries of the written config."""
    verified: VerifyReport

    def __str__(self) -> str:
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        lines = [f"{self.folder}: {self.quantized} linears in NVFP4, {files}", str(self.verified)]
        if any(entry.startswith("re:") for entry in self.ignored):
            # Seen with 5.17 (random experts, listed as missing) and 5.23 (an error while loading).
            lines.append(
                "note: transformers does not load bf16 experts from this format; compressed-tensors can unpack the folder"
            )
        return "\n".join(lines)


def export_compressed_tensors(
    folder: str | os.PathLike,
    *,
    weights: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    power_of_two: bool = True,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    expected: Mapping[str, Tensor] | None = None,
) -> ExportReport:
    """Write a model as an NVFP4 folder, verify it from disk and give it its name.

    Args:
        folder: The folder to write. It must not exist, unless overwrite.
        weights: Master weights by `state_dict` name of the Hugging Face model, on any device. Tied aliases may be left out.
        groups: Module names to quantize. The members of a group share one global scale; siblings have to be in one group.
        config: The model's config. Written with dtype bfloat16.
        tokenizer: Saved beside the weights.
        generation_config: Saved beside the weights.
        power_of_two: Whether global scales are powers of two, so that every reader decodes the same bits.
        max_shard_bytes: Size above which the weights are split over several files with an index.
        overwrite: Replace an existing model folder, once the new one has been verified.
        expected: Compute weights by `state_dict` name, to which the decoded folder must be equal. By default the fake-quantized
            weights.

    Raises:
        FileExistsError: The folder exists and is not to be replaced.
        ValueError: Weights, groups and config do not fit together, or a weight is NaN or Inf; nothing has been written.
        ExportError: The written folder failed its verification and was removed.
    """
    target = check_target(folder, overwrite)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    layout = HubLayout(config)
    weights = own_tensors(weights, layout)
    hub_modules = quantized_modules(groups, layout)
    global_scales = group_scales(weights, groups, layout, power_of_two)
    ignored = _ignored(layout, hub_modules)

    with replacing_folder(target, overwrite) as partial:
        _write_config(partial / "config.json", layout, ignored)
        if generation_config is not None:
            generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        shards = write_shards(partial, _modules(weights, layout, hub_modules, global_scales), max_shard_bytes)
        if expected is None:
            expected = ServedWeights(weights, layout, global_scales)
        verified = verify_export(partial, expected)
    return ExportReport(folder=target, shards=shards, quantized=len(hub_modules), ignored=tuple(ignored), verified=verified)


def _ignored(layout: HubLayout, hub_modules: Mapping[str, str]) -> list[str]:
    """`ignore` entries: `lm_head` always, and full names, in memory and on disk, of all that stays in bf16.

    Experts are matched by one pattern, since serving engines ask for them under names of their own.
    """
    names = ["lm_head"]
    for name, hub_name in layout.linears().items():
        if name not in hub_modules:
            names += [name, hub_name or name]
    for name in layout.matrices_outside_linears():
        before, experts, _ = name.rpartition(".experts.")
        names.append(f"re:.*{re.escape('.' + before.rpartition('.')[2] + experts)}.*" if experts else name)
    return list(dict.fromkeys(names))


def _write_config(path: Path, layout: HubLayout, ignored: Iterable[str]) -> None:
    config: dict[str, Any] = json.loads(layout.served_config.to_json_string(use_diff=True))
    # Where the model was trained from is nobody's business.
    config.pop("_name_or_path", None)
    config["architectures"] = [layout.architecture]
    config["dtype"] = "bfloat16"
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "format": FORMAT, "weights": weights, "input_activations": None, "output_activations": None}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _modules(
    weights: Mapping[str, Tensor], layout: HubLayout, hub_modules: Mapping[str, str], global_scales: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """The tensors on disk of one module after the other, on the CPU."""
    pending: dict[str, Tensor] = {}
    current = None
    for name, weight in weights.items():
        module = name.rpartition(".")[0]
        if name in global_scales:
            on_disk = _packed(hub_modules[module], weight, global_scales[name])
        else:
            on_disk = layout.to_hub(name, to_served(name, weight, layout))
        for key, tensor in on_disk.items():
            if (owner := key.rpartition(".")[0]) != current and pending:
                yield pending
                pending = {}
            current = owner
            pending[key] = tensor.cpu().contiguous()
    yield pending


def _packed(hub_module: str, weight: Tensor, s2: Tensor) -> dict[str, Tensor]:
    codes, scales = nvfp4_quantize(weight, s2.to(weight.device))
    return {
        f"{hub_module}.weight_packed": codes,
        f"{hub_module}.weight_scale": scales,
        f"{hub_module}.weight_global_scale": (1.0 / s2).reshape(1),
    }
