"""Writes a model as an NVFP4 folder in any format, one file after the other, verified from disk before it gets its name.

A quantized weight is written as its format says, everything else in the dtype in which readers hold it. Names are those of the hub.
Writing holds at most the tensors of one file in memory, the verification after it those of one bundle.
"""

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from nvfp4_train.export.card import FILE as CARD_FILE
from nvfp4_train.export.card import FolderFacts, RunFacts, card, installed_versions
from nvfp4_train.export.folder import check_target, replacing_folder
from nvfp4_train.export.formats.base import Format, QuantizedTensor
from nvfp4_train.export.masters import FromMasters
from nvfp4_train.export.passed_through import PassedThrough
from nvfp4_train.export.phases import Phases, silent
from nvfp4_train.export.registry import find_format
from nvfp4_train.export.served import ServedWeights
from nvfp4_train.export.shards import MAX_SHARD_BYTES, FileGroup, write_shards
from nvfp4_train.export.side_files import copy_side_files
from nvfp4_train.export.verify import VerifyReport, verify_export
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.models.architecture import has_own_code
from nvfp4_train.models.layout import HubLayout, HubMatrix
from nvfp4_train.quant.inputs import InputSample
from nvfp4_train.quant.manifest import QuantManifest

UNTRIED = (
    "where transformers does not load it as it is, it loads what `python launch/convert.py FOLDER OTHER --to bf16` decodes"
)
"""Of a folder with a tensor for each of the class: some classes read weights in ways that no packed folder allows."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote."""

    folder: Path
    format: str
    shards: int
    quantized: int
    """Modules on disk with a weight in NVFP4."""
    note: str | None
    """What the format has to say about its readers; FOLDER stands for the folder."""
    verified: VerifyReport
    write_s: float
    """Seconds until all files were on disk."""
    verify_s: float
    """Seconds of the verification after that."""

    def __str__(self) -> str:
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        lines = [f"{self.folder}: {self.quantized} matrices in NVFP4, {files}", str(self.verified)]
        lines.append(f"readers: {'; '.join(self.verified.readers())}")
        return "\n".join([*lines, f"note: {(self.note or UNTRIED).replace('FOLDER', shlex.quote(str(self.folder)))}"])


def export_compressed_tensors(
    folder: str | os.PathLike,
    *,
    weights: Mapping[str, Tensor],
    manifest: QuantManifest,
    config: PretrainedConfig,
    state: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ExportReport:
    """Write masters as a compressed-tensors folder, verify it from disk and give it its name.

    Args:
        folder: The folder to write. It must not exist, unless overwrite.
        weights: Master weights by `state_dict` name of the Hugging Face model, on any device. Tied aliases may be left out.
        manifest: What is quantized, and how. Siblings have to be in one group.
        config: The model's config. Written with dtype bfloat16.
        state: `state_dict` of the store's `QuantState`; only fitted rules and quantized inputs need it.
        overwrite: Replace an existing model folder, once the new one has been verified.
        options: Further options of `export_model`.

    Raises:
        FileExistsError: The folder exists and is not to be replaced.
        ValueError: Weights, manifest and config do not fit together, or a weight is NaN or Inf; nothing has been written.
        ExportError: The written folder failed its verification and was removed.
    """
    check_target(folder, overwrite)
    return export_model(folder, FromMasters(weights, manifest, config, state), overwrite=overwrite, **options)


def export_model(
    folder: str | os.PathLike,
    served: ServedWeights,
    *,
    format: str = "compressed_tensors",
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    expected: Mapping[str, Tensor] | None = None,
    inputs: Sequence[InputSample] = (),
    passed_through: PassedThrough | None = None,
    files_from: str | os.PathLike | None = None,
    run: RunFacts | None = None,
    progress: Phases = silent,
) -> ExportReport:
    """Write served weights as a folder, verify it from disk and give it its name. Asks `served` for one tensor at a time.

    Args:
        folder: The folder to write. It must not exist, unless overwrite.
        served: The weights, which have been checked.
        format: A name of `registry.known_formats`.
        tokenizer: Saved beside the weights.
        generation_config: Saved beside the weights.
        max_shard_bytes: Size above which the weights are split over several files with an index.
        overwrite: Replace an existing model folder, once the new one has been verified.
        expected: Compute weights by `state_dict` name, which the decoded folder must equal. By default those of `served`.
        inputs: Inputs of the training forward with their codes (`record_inputs`), which a reader must make of them, too (W4A4).
        passed_through: Tensors of the original folder that the model's class does not build; they are copied.
        files_from: A folder or hub name with the files that a reader needs beside weights and tokenizer: see `export.side_files`.
        run: What is known of the training, for the model card (README.md).
        progress: Told of the bytes that were written, and compared.

    Raises:
        DiskError: The disk takes no more; nothing is left of what was written.
        FileExistsError: The folder exists and is not to be replaced.
        ValueError: An option is wrong; nothing has been written.
        ExportError: The written folder failed its verification and was removed.
    """
    target = check_target(folder, overwrite)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    served.layout.not_built = {} if passed_through is None else passed_through.on_meta()
    writer, rule = _Writer(served, find_format(format)), served.manifest.rule
    start = perf_counter()
    with replacing_folder(target, overwrite) as partial:
        writer.write_configs(partial)
        if generation_config is not None:
            generation_config.save_pretrained(partial)
        if tokenizer is not None:
            _write_tokenizer(partial, tokenizer)
        if files_from is not None:
            copy_side_files(files_from, partial, tokenizer=tokenizer, code=has_own_code(served.layout.served_config))
        copied = () if passed_through is None else passed_through.file_groups()
        shards = write_shards(partial, chain(writer.file_groups(), copied), max_shard_bytes, progress)
        scales = ((name, served.input_scale(name)) for name in served.manifest.names)
        written = perf_counter()
        verified = verify_export(
            partial,
            served if expected is None else expected,
            format=format,
            input_scales={name: scale for name, scale in scales if scale is not None},
            inputs=inputs,
            passed_through=passed_through,
            progress=progress,
        )
        end = perf_counter()
        note = writer.format.note(served.layout, writer.hub_modules)
        text = card(
            run or RunFacts(base_model=getattr(served.layout.served_config, "name_or_path", None) or None),
            FolderFacts(
                format=format,
                architecture=served.layout.architecture,
                activations=served.manifest.activations,
                checked=verified.readers(),
                note=note,
                scale_rule=f"{rule.block_scale}, global scales {rule.global_scale}",
                size=f"{verified.quantized_parameters:,} parameters at {verified.bits_per_weight:.3f} bits, "
                f"{verified.bytes / 1e6:,.1f} MB in all",
                versions=installed_versions(),
            ),
        )
        (partial / CARD_FILE).write_text(text, encoding="utf-8")
    return ExportReport(
        folder=target,
        format=format,
        shards=shards,
        quantized=sum(map(len, writer.matrices.values())),
        note=note,
        verified=verified,
        write_s=written - start,
        verify_s=end - written,
    )


class _Writer:
    """The tensors of a model on their way to disk."""

    def __init__(self, served: ServedWeights, format: Format) -> None:
        self.served = served
        self.format = format
        self.matrices = {name: served.layout.matrices(name) for name in served.manifest.names}
        """The matrices on disk of every quantized weight."""
        self.hub_modules = {
            name.removesuffix(".weight"): matrices[0].module
            for name, matrices in self.matrices.items()
            if name not in served.layout.quantized_experts
        }
        """Quantized linears: name in memory -> name on disk."""

    def write_configs(self, folder: Path) -> None:
        layout = self.served.layout
        files = {"config.json": _model_config(layout)}
        for file, added in self.format.configs(layout, self.hub_modules, self.served.manifest).items():
            files[file] = files.get(file, {}) | added
        for file, config in files.items():
            (folder / file).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def file_groups(self) -> Iterator[FileGroup]:
        """The modules on disk, in the order of the model."""

        def module_of(bundle: tuple[tuple[str, ...], tuple[str, ...]]) -> object:
            names, keys = bundle
            return _owner(keys[0]) if len(keys) == 1 else names

        for _, bundles in groupby(self.served.layout.bundles.items(), key=module_of):
            yield from self._split([names for names, _ in bundles])

    def _split(self, bundles: Sequence[tuple[str, ...]]) -> Iterator[FileGroup]:
        """The modules on disk of some bundles. An expert parameter, which is several modules, is asked for once."""
        sizes = {key: tensor.nbytes for names in bundles for key, tensor in self._on_disk(names, on_meta=True).items()}
        loaded: dict[str, Tensor] = {}

        def load(keys: Sequence[str]) -> dict[str, Tensor]:
            if not loaded:
                loaded.update({key: tensor for names in bundles for key, tensor in self._on_disk(names).items()})
            return {key: loaded.pop(key).cpu().contiguous() for key in keys}

        for _, keys in groupby(sizes, key=_owner):
            of_one = list(keys)
            yield FileGroup(sum(sizes[key] for key in of_one), partial(load, of_one))

    def _on_disk(self, names: tuple[str, ...], *, on_meta: bool = False) -> dict[str, Tensor]:
        """The tensors on disk of a bundle; with `on_meta` tensors like them on the meta device, without any weight."""
        layout = self.served.layout
        if self.served.is_quantized(names[0]):
            weight = self._described(names[0]) if on_meta else self.served.quantized(names[0])
            return {
                key: tensor
                for matrix in self.matrices[names[0]]
                for key, tensor in self.format.tensors(matrix.module, _part(weight, matrix)).items()
            }
        return layout.to_hub({name: layout.tensors[name] if on_meta else self.served.plain(name) for name in names})

    def _described(self, name: str) -> QuantizedTensor:
        """A quantized weight on the meta device."""
        *experts, num_rows, num_columns = self.served.layout.tensors[name].shape
        num_slots = math.prod(experts)
        with torch.device("meta"):
            return QuantizedTensor(
                torch.empty(num_slots, num_rows, num_columns // 2, dtype=torch.uint8),
                torch.empty(num_slots, num_rows, num_columns // BLOCK_SIZE, dtype=torch.float8_e4m3fn),
                torch.empty(num_slots),
                None if self.served.input_scale(name) is None else torch.empty(1),
            )


def _part(weight: QuantizedTensor, matrix: HubMatrix) -> QuantizedTensor:
    """One slot, of a matrix on disk. Scales are copied: safetensors writes no memory twice."""
    slot = matrix.expert or 0
    rows = slice(None) if matrix.rows is None else matrix.rows
    return QuantizedTensor(
        weight.codes[slot : slot + 1, rows],
        weight.block_scales[slot : slot + 1, rows],
        weight.global_scale[slot : slot + 1].clone(),
        None if weight.input_scale is None else weight.input_scale.clone(),
    )


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _model_config(layout: HubLayout) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(layout.served_config.to_json_string(use_diff=True))
    # The path that the model was trained from is private.
    config.pop("_name_or_path", None)
    for part in config.values():
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = "bfloat16"
    # Code that is not in the folder cannot be loaded from there; on a hub its name begins with that of its repository.
    auto_map = config.pop("auto_map", None)
    if auto_map and has_own_code(layout.served_config):
        config["auto_map"] = {name: code.rpartition("--")[2] for name, code in auto_map.items()}
    return config | {"architectures": [layout.architecture], "dtype": "bfloat16"}


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    # Transformers notes how the tokenizer was loaded. A run and a later export load it from different places.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
