"""Turns an NVFP4 folder of one format into one of another, or into plain bf16, without a GPU, the masters or the original weights.

Codes and block scales keep their bytes, and files their names and their share of the tensors, so a folder that is converted there and
back is what it was. One file at a time is in memory. Source and result are verified, and compared by the readers of their formats.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from nvfp4_train.export.card import FILE as CARD_FILE
from nvfp4_train.export.card import adapted, format_section
from nvfp4_train.export.folder import check_target, replacing_folder
from nvfp4_train.export.formats.base import Format
from nvfp4_train.export.ignored import translate
from nvfp4_train.export.packed_folder import FORMAT_OF_METHOD, PackedFolder, format_of
from nvfp4_train.export.phases import Phases, silent
from nvfp4_train.export.readers.base import require
from nvfp4_train.export.readers.disk import StoredTensor, read_header
from nvfp4_train.export.registry import find_format
from nvfp4_train.export.shards import MAX_SHARD_BYTES, write_shards
from nvfp4_train.export.unpack import Unpacked, decode, decode_by_reader
from nvfp4_train.export.values import is_same
from nvfp4_train.export.verify import VerifyReport, verify_export
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.models.stored_dtypes import STORED_NAMES
from nvfp4_train.parallel import in_threads
from nvfp4_train.quant.manifest import QuantManifest

PLAIN = "bf16"
"""The target with decoded weights, for readers that know no NVFP4. Inputs are not quantized there."""
TARGETS = (*FORMAT_OF_METHOD.values(), PLAIN)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What a conversion wrote."""

    folder: Path
    source_format: str
    target_format: str
    quantized: int
    """Modules with a weight in NVFP4 in the source."""
    rounded: int
    """Global scales that are no power of two: their inverse is rounded, so the way back may change their last bit."""
    verified: VerifyReport | None
    """None of a plain folder, of which every tensor was compared."""

    def __str__(self) -> str:
        done = "decoded to bf16" if self.verified is None else "with the same codes and block scales, bit for bit"
        lines = [f"{self.folder}: {self.quantized} matrices {done}, from {self.source_format} to {self.target_format}"]
        if self.verified is not None:
            lines.append(str(self.verified))
        if self.rounded and self.verified is not None:
            lines.append(f"note: {self.rounded} global scales are no powers of two; their inverses are rounded in the last bit")
        return "\n".join(lines)


def convert_folder(
    source: str | os.PathLike, target: str | os.PathLike, *, to: str, overwrite: bool = False, progress: Phases = silent
) -> ConvertReport:
    """Write the folder `target`, of the format `to` (of `TARGETS`), from an NVFP4 folder. All other files are copied.

    `progress` is told of the bytes that were written, and compared.

    Raises:
        DiskError: The disk takes no more; nothing is left of what was written.
        FileExistsError: The target exists and is not to be replaced.
        ValueError: The source is no NVFP4 folder, has that format already, or one of the folders lies in the other.
        ExportError: The source does not pass its verification, or the written folder does not; nothing is left of it.
    """
    if to not in TARGETS:
        raise ValueError(f"the format to convert to must be one of {', '.join(TARGETS)}, got {to!r}")
    path, folder = Path(os.path.realpath(source)), check_target(target, overwrite)
    name = format_of(path)
    if name == to:
        raise ValueError(f"{source} has the format {to} already")
    if folder == path or folder in path.parents or path in folder.parents:
        raise ValueError(f"source and target must be two folders beside each other, got {path} and {folder}")
    verify_export(path, format=name)
    origin = PackedFolder(path, name)
    with replacing_folder(folder, overwrite) as partial:
        _copy_other_files(origin, partial)
        if to == PLAIN:
            _write_json(partial / "config.json", {key: v for key, v in origin.config.items() if key != "quantization_config"})
            # Files cannot be those of the source: they would be 3.6 times as large.
            write_shards(partial, Unpacked(origin, decode).file_groups(), MAX_SHARD_BYTES, progress)
            verified = None
            _compare_plain(origin, partial, progress)
        else:
            _write_configs(origin, to, partial)
            _write_files(origin, find_format(to), partial, progress)
            verified = verify_export(partial, format=to)
            _compare(origin, PackedFolder(partial, to))
        _adapt_card(origin, to, verified, partial / CARD_FILE)
    scales = [origin.global_scale(module) for module in origin.quantized]
    return ConvertReport(
        folder=folder,
        source_format=name,
        target_format=to,
        quantized=len(origin.quantized),
        rounded=sum(bool(np.frexp(scale)[0] != 0.5) for scale in scales),
        verified=verified,
    )


def _copy_other_files(origin: PackedFolder, target: Path) -> None:
    """Everything but weights and configs, through links."""
    own = {INDEX, "config.json", *_configs(origin, origin.format)}
    for entry in sorted(origin.path.iterdir()):
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        elif entry.name not in own and entry not in origin.files:
            shutil.copyfile(entry, target / entry.name)


def _adapt_card(origin: PackedFolder, format: str, verified: VerifyReport | None, path: Path) -> None:
    """Let a card that an export has written tell of the new format. Any other README.md stays as it is."""
    if not path.exists():
        return
    if verified is None:
        note, checked = None, [f"nvfp4_train's reader in NumPy: every value is that of the {origin.format} folder"]
    else:
        note = find_format(format).note(origin.layout, _quantized(origin))
        checked = verified.readers()
        checked[0] += f"; codes, block scales and all else compared with the {origin.format} folder, bit for bit"
    section = format_section(format, origin.layout.architecture, _activations(origin), checked, note)
    text = adapted(path.read_text(encoding="utf-8"), origin.format, format, section)
    if text is not None:
        path.write_text(text, encoding="utf-8")


def _activations(origin: PackedFolder) -> str:
    return "nvfp4" if origin.reader.quantizes_inputs(origin.config) else "none"


def _quantized(origin: PackedFolder) -> dict[str, str]:
    """Quantized linears: name in memory -> name on disk."""
    hub_names = {name: hub_name or name for name, hub_name in origin.layout.linears().items()}
    return {name: hub_name for name, hub_name in hub_names.items() if hub_name in origin.quantized}


def _configs(origin: PackedFolder, format: str) -> dict[str, dict[str, Any]]:
    """What a format has to say about the folder, by file."""
    quantized = _quantized(origin)
    # No config tells of groups or rules.
    names = tuple(f"{name}.weight" for name in quantized)
    manifest = QuantManifest(groups=(names,), rule=ScaleRule(), activations=_activations(origin))
    return find_format(format).configs(origin.layout, quantized, manifest)


def _write_configs(origin: PackedFolder, format: str, target: Path) -> None:
    usual = _configs(origin, origin.format)["config.json"]["quantization_config"]["ignore"]
    more = [name for name in origin.config["quantization_config"]["ignore"] if name not in usual]
    for file, content in _configs(origin, format).items():
        _add_ignored(content, [translate(name, format) for name in more])
        _write_json(target / file, (origin.config if file == "config.json" else {}) | content)


def _add_ignored(content: dict[str, Any], names: list[str]) -> None:
    for part in content.values():
        for key in ("ignore", "exclude_modules"):
            if isinstance(part, dict) and key in part:
                part[key] = list(dict.fromkeys([*part[key], *names]))


def _write_files(origin: PackedFolder, format: Format, target: Path, progress: Phases) -> None:
    """Every file with the tensors of its modules in another format."""
    weight_map: dict[str, str] = {}
    num_bytes = 0
    with progress("writing", total=sum(stored.num_bytes for stored in origin.stored.values()), unit="B") as bar:
        for file in origin.files:
            tensors: dict[str, Tensor] = {}
            for key in (key for key, stored in origin.stored.items() if stored.path == file):
                found = origin.parts_of(key)
                if found is None:
                    tensors[key] = origin.tensor(key)
                elif found[1] == origin.reader.codes:
                    # With its parts, should they lie in other files.
                    tensors |= format.tensors(found[0], origin.weight(found[0]))
            tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(tensors, target / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
            of_file = sum(tensor.nbytes for tensor in tensors.values())
            num_bytes += of_file
            bar.advance(of_file)
    if (origin.path / INDEX).exists():
        _write_json(target / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})


def _compare(origin: PackedFolder, written: PackedFolder) -> None:
    """Both readers find the same bytes and the same scales."""
    require("convert", written.quantized == origin.quantized, "the quantized modules are not those of the source")
    parts = [(module, part) for module in origin.quantized for part in ("codes", "block_scales")]

    def is_kept(of: tuple[str, str]) -> bool:
        module, part = of
        return is_same(*(folder.part(module, getattr(folder.reader, part)) for folder in (origin, written)))

    for (module, part), same in zip(parts, in_threads(is_kept, parts), strict=True):
        require("convert", same, f"{module} has other {part.replace('_', ' ')} than in the source")
    for module in origin.quantized:
        first, second = origin.global_scale(module), written.global_scale(module)
        # Each reader may have taken a rounded inverse.
        limit = 0.0 if np.frexp(first)[0] == 0.5 else 2.0**-22 * float(first)
        is_close = abs(float(first) - float(second)) <= limit
        require("convert", is_close, f"{module} has the global scale {second}, in the source {first}")
        inputs = origin.input_scale(module), written.input_scale(module)
        require(
            "convert", inputs[0] == inputs[1], f"the input of {module} has the scale {inputs[1]}, in the source {inputs[0]}"
        )
    _compare_others(origin, written.stored, written.plain_keys())


def _compare_plain(origin: PackedFolder, target: Path, progress: Phases) -> None:
    """The source, decoded by its reader, is the plain folder."""
    stored = {key: tensor for file in target.glob("*.safetensors") for key, tensor in read_header(file).items()}
    expected = Unpacked(origin, decode_by_reader)
    require("convert", stored.keys() == expected.keys(), "the tensors are not those of the source")
    scales = [origin.global_scale(module) for module in origin.quantized]
    # Of a global scale that is no power of two, the inverse is rounded: the value beside is as right.
    limit = 0 if all(np.frexp(scale)[0] == 0.5 for scale in scales) else 1
    with progress("comparing", total=sum(tensor.num_bytes for tensor in stored.values()), unit="B") as bar:
        for group in expected.file_groups():
            for key, tensor in group.load().items():
                shape = STORED_NAMES[tensor.dtype], tuple(tensor.shape)
                require("convert", (stored[key].dtype, stored[key].shape) == shape, f"{key} has another shape")
                got, wanted = stored[key].bytes(), tensor.contiguous().view(-1).view(torch.uint8).numpy()
                is_equal = np.array_equal(got, wanted)
                if not is_equal and limit and tensor.dtype is torch.bfloat16:
                    is_equal = int(np.abs(got.view(np.int16).astype(np.int32) - wanted.view(np.int16)).max(initial=0)) <= limit
                require("convert", is_equal, f"{key} has other values than the source")
                bar.advance(stored[key].num_bytes)


def _compare_others(origin: PackedFolder, stored: Mapping[str, StoredTensor], keys: set[str]) -> None:
    require("convert", keys == origin.plain_keys(), "the unquantized tensors are not those of the source")
    in_order = sorted(keys)
    for key, same in zip(in_order, in_threads(lambda key: is_same(origin.stored[key], stored[key]), in_order), strict=True):
        require("convert", same, f"{key} differs from the source")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
