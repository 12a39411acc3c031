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
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from nvfp4_train.export.folder import check_target, replacing_folder
from nvfp4_train.export.layout import HubLayout
from nvfp4_train.export.masters import ServedWeights, check_groups, group_scales, own_tensors
from nvfp4_train.export.shards import Module, write_shards
from nvfp4_train.export.verify import VerifyReport, verify_export
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule

FORMAT = "nvfp4-pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_global_scale")


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
    rule: ScaleRule = MAX_RULE,
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
        rule: How scales are chosen.
        max_shard_bytes: Size above which the weights are split over several files with an index.
        overwrite: Replace an existing model folder, once the new one has been verified.
        expected: Compute weights by `state_dict` name, to which the decoded folder must be equal. By default the fake-quantized
            weights.

    Raises:
        FileExistsError: The folder exists and is not to be replaced.
        ValueError: Weights, groups and config do not fit together, or a weight is NaN or Inf; nothing has been written.
        ExportError: The written folder failed its verification and was removed.
    """
    check_target(folder, overwrite)
    layout = HubLayout(config)
    weights = own_tensors(weights, layout)
    check_groups(groups, layout)
    served = ServedWeights(weights, layout, group_scales(weights, groups, layout, rule), rule)
    return write_compressed_tensors(
        folder,
        served=served,
        tokenizer=tokenizer,
        generation_config=generation_config,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        expected=expected,
    )


def write_compressed_tensors(
    folder: str | os.PathLike,
    *,
    served: ServedWeights,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    expected: Mapping[str, Tensor] | None = None,
) -> ExportReport:
    """`export_compressed_tensors` of weights that have been checked and scaled. Asks `served` for one tensor at a time.

    The tensors of one file are in memory at once, and after that one tensor to verify against it.
    """
    target = check_target(folder, overwrite)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    layout = served.layout
    linears = layout.linears()
    # Module names of the quantized linears, in memory -> on disk.
    hub_modules = {
        module: linears[module] or module for module in (name.removesuffix(".weight") for name in served.global_scales)
    }
    ignored = _ignored(layout, hub_modules)

    with replacing_folder(target, overwrite) as partial:
        _write_config(partial / "config.json", layout, ignored)
        if generation_config is not None:
            generation_config.save_pretrained(partial)
        if tokenizer is not None:
            _write_tokenizer(partial, tokenizer)
        shards = write_shards(partial, _modules(served, hub_modules), max_shard_bytes)
        verified = verify_export(partial, served if expected is None else expected)
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


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    # Transformers notes how this tokenizer was loaded, and a run and a later export load it from different places.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _modules(served: ServedWeights, hub_modules: Mapping[str, str]) -> Iterator[Module]:
    """The modules on disk, in order."""
    layout = served.layout

    def module_of(name: str) -> str:
        keys = layout.hub_names(name)
        return _owner(keys[0]) if len(keys) == 1 else name

    for _, names in groupby(served, key=module_of):
        yield from _split(served, hub_modules, list(names))


def _split(served: ServedWeights, hub_modules: Mapping[str, str], names: Sequence[str]) -> Iterator[Module]:
    """The module that a few tensors in memory are, or the several that an expert parameter is, which is asked for once."""
    sizes = {key: num_bytes for name in names for key, num_bytes in _sizes(served, hub_modules, name).items()}
    loaded: dict[str, Tensor] = {}

    def load(keys: Sequence[str]) -> dict[str, Tensor]:
        if not loaded:
            loaded.update({key: tensor for name in names for key, tensor in _on_disk(served, hub_modules, name).items()})
        return {key: loaded.pop(key) for key in keys}

    for _, keys in groupby(sizes, key=_owner):
        of_one = list(keys)
        yield Module(sum(sizes[key] for key in of_one), partial(load, of_one))


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _sizes(served: ServedWeights, hub_modules: Mapping[str, str], name: str) -> dict[str, int]:
    """Bytes of the tensors that `_on_disk` returns, in their order."""
    layout = served.layout
    if name in served.global_scales:
        hub_module, num_elements = hub_modules[_owner(name)], layout.shapes[name].numel()
        sizes = (num_elements // 2, num_elements // BLOCK_SIZE, 4)
        return {f"{hub_module}.{part}": size for part, size in zip(PARTS, sizes, strict=True)}
    item_bytes = served.weights[name].itemsize if name in layout.buffers else 2
    return {key: layout.hub_shapes[key].numel() * item_bytes for key in layout.hub_names(name)}


def _on_disk(served: ServedWeights, hub_modules: Mapping[str, str], name: str) -> dict[str, Tensor]:
    """The tensors on disk of one tensor in memory, on the CPU."""
    if name in served.global_scales:
        parts = (*served.packed(name), (1.0 / served.global_scales[name]).reshape(1))
        tensors = {f"{hub_modules[_owner(name)]}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
    else:
        tensors = served.layout.to_hub(name, served[name])
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
