"""Turns an NVFP4 folder of one format into one of another, or into plain bf16, without a GPU, the masters or the original weights.

Codes and block scales keep their bytes, and files their names and their share of the tensors, so a folder that is converted there and
back is what it was. One file at a time is in memory. Source and result are verified, and compared by the readers of their formats.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from nvfp4_train.export.card import FILE as CARD_FILE
from nvfp4_train.export.card import adapted, format_section
from nvfp4_train.export.folder import check_target, replacing_folder
from nvfp4_train.export.formats.base import Format, QuantizedTensor
from nvfp4_train.export.ignored import translate
from nvfp4_train.export.masters import rows_at_once
from nvfp4_train.export.readers.base import require
from nvfp4_train.export.readers.disk import StoredTensor, read_header, to_bf16_bits
from nvfp4_train.export.registry import find_format, find_reader
from nvfp4_train.export.shards import FileGroup, write_shards
from nvfp4_train.export.verify import VerifyReport, verify_export
from nvfp4_train.kernels.fp4_kernel import fp4_dequantize
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import SERVED_DTYPE

FORMAT_OF_METHOD = {"compressed-tensors": "compressed_tensors", "modelopt": "modelopt"}
"""`quant_method` in config.json -> the format that has it."""
PLAIN = "bf16"
"""The target with decoded weights, for readers that know no NVFP4. Inputs are not quantized there."""
TARGETS = (*FORMAT_OF_METHOD.values(), PLAIN)
INDEX = "model.safetensors.index.json"
PIECE_BYTES = 1 << 24
MAX_SHARD_BYTES = 5_000_000_000
"""Of a plain folder, whose files cannot be those of its source: they would be 3.6 times as large."""


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
        lines = [f"{self.folder}: {self.quantized} linears {done}, from {self.source_format} to {self.target_format}"]
        if self.verified is not None:
            lines.append(str(self.verified))
        if self.rounded and self.verified is not None:
            lines.append(f"note: {self.rounded} global scales are no powers of two; their inverses are rounded in the last bit")
        return "\n".join(lines)


def convert_folder(source: str | os.PathLike, target: str | os.PathLike, *, to: str, overwrite: bool = False) -> ConvertReport:
    """Write the folder `target`, of the format `to` (of `TARGETS`), from an NVFP4 folder. All other files are copied.

    Raises:
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
    origin = _Folder(path, name)
    with replacing_folder(folder, overwrite) as partial:
        _copy_other_files(origin, partial)
        if to == PLAIN:
            _write_json(partial / "config.json", {key: v for key, v in origin.config.items() if key != "quantization_config"})
            write_shards(partial, origin.decoded(), MAX_SHARD_BYTES)
            verified = None
            _compare_plain(origin, partial)
        else:
            _write_configs(origin, to, partial)
            _write_files(origin, find_format(to), partial)
            verified = verify_export(partial, format=to)
            _compare(origin, _Folder(partial, to))
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


def format_of(folder: Path) -> str:
    """The format of an NVFP4 folder by its config. Raises ValueError where it has none that is known."""
    try:
        quantization = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
        method = quantization.get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} must be an NVFP4 folder, but its config.json does not load: {error}") from error
    if method not in FORMAT_OF_METHOD:
        known = " or ".join(FORMAT_OF_METHOD)
        raise ValueError(f"{folder} must be an NVFP4 folder, with quant_method {known} in its config.json, got {method!r}")
    return FORMAT_OF_METHOD[method]


class _Folder:
    """A verified folder."""

    def __init__(self, path: Path, format: str) -> None:
        self.path = path
        self.format = format
        self.reader = find_reader(format)
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.files = sorted(path.glob("*.safetensors"))
        self.stored: dict[str, StoredTensor] = {key: t for file in self.files for key, t in read_header(file).items()}
        marker = f".{self.reader.marker}"
        self.quantized = {key.removesuffix(marker): None for key in sorted(self.stored) if key.endswith(marker)}
        """Modules with a weight in NVFP4, by name on disk."""
        self._opened: tuple[Path, Any] | None = None

    @cached_property
    def layout(self) -> HubLayout:
        return HubLayout(AutoConfig.from_pretrained(self.path, local_files_only=True))

    def part(self, module: str, part: str) -> StoredTensor:
        return self.stored[f"{module}.{part}"]

    def parts_of(self, key: str) -> tuple[str, str] | None:
        """Module and part of a tensor of a quantized weight, or None."""
        module, _, part = key.rpartition(".")
        of_weight = {*self.reader.parts(1, 16), self.reader.stored_input_scale}
        return (module, part) if module in self.quantized and part in of_weight else None

    def plain_keys(self) -> set[str]:
        """Tensors that are no part of a quantized weight."""
        return {key for key in self.stored if self.parts_of(key) is None}

    def global_scale(self, module: str) -> np.float32:
        return self.reader.global_scale(self._number(module, self.reader.stored_scale))

    def input_scale(self, module: str) -> np.float32 | None:
        part = self.reader.stored_input_scale
        if part is None or f"{module}.{part}" not in self.stored:
            return None
        return self.reader.input_scale(self._number(module, part))

    def tensor(self, key: str) -> Tensor:
        # One file is open at a time, so that no more is mapped.
        file = self.stored[key].path
        if self._opened is None or self._opened[0] != file:
            self._opened = file, safe_open(file, "pt")
        return self._opened[1].get_tensor(key)

    def weight(self, module: str) -> QuantizedTensor:
        input_scale = self.input_scale(module)
        return QuantizedTensor(
            self.tensor(f"{module}.{self.reader.codes}")[None],
            self.tensor(f"{module}.{self.reader.block_scales}")[None],
            torch.tensor([self.global_scale(module).item()]),
            None if input_scale is None else torch.tensor([input_scale.item()]),
        )

    def decoded(self) -> Iterator[FileGroup]:
        """Every tensor, with decoded weights."""
        for key, stored in self.stored.items():
            found = self.parts_of(key)
            if found is None:
                yield FileGroup(stored.num_bytes, partial(lambda key: {key: self.tensor(key)}, key))
            elif found[1] == self.reader.codes:
                # Two codes a byte become two bf16.
                yield FileGroup(4 * stored.num_bytes, partial(self._decode, found[0]))

    def _decode(self, module: str) -> dict[str, Tensor]:
        (codes,), (block_scales,), (s2,), _ = self.weight(module)
        num_rows = rows_at_once(2 * codes.shape[1])
        pieces = zip(codes.split(num_rows), block_scales.split(num_rows), strict=True)
        return {f"{module}.weight": torch.cat([fp4_dequantize(*piece, s2, dtype=SERVED_DTYPE) for piece in pieces])}

    def _number(self, module: str, part: str) -> np.float32:
        return self.part(module, part).bytes().view(np.float32)[0]


def _copy_other_files(origin: _Folder, target: Path) -> None:
    """Everything but weights and configs, through links."""
    own = {INDEX, "config.json", *_configs(origin, origin.format)}
    for entry in sorted(origin.path.iterdir()):
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        elif entry.name not in own and entry not in origin.files:
            shutil.copyfile(entry, target / entry.name)


def _adapt_card(origin: _Folder, format: str, verified: VerifyReport | None, path: Path) -> None:
    """Let a card that an export has written tell of the new format. Any other README.md stays as it is."""
    if not path.exists():
        return
    if verified is None:
        note, checked = None, [f"nvfp4_train's reader in NumPy: every value is that of the {origin.format} folder"]
    else:
        note = find_format(format).note(origin.layout, _quantized(origin))
        checked = verified.readers()
        checked[0] += f"; codes, block scales and all else compared with the {origin.format} folder, bit for bit"
    section = format_section(format, _activations(origin), checked, note)
    text = adapted(path.read_text(encoding="utf-8"), origin.format, format, section)
    if text is not None:
        path.write_text(text, encoding="utf-8")


def _activations(origin: _Folder) -> str:
    return "nvfp4" if origin.reader.quantizes_inputs(origin.config) else "none"


def _quantized(origin: _Folder) -> dict[str, str]:
    """Quantized modules: name in memory -> name on disk."""
    hub_names = {name: hub_name or name for name, hub_name in origin.layout.linears().items()}
    quantized = {name: hub_name for name, hub_name in hub_names.items() if hub_name in origin.quantized}
    return quantized | {module: module for module in origin.quantized if module not in hub_names.values()}


def _configs(origin: _Folder, format: str) -> dict[str, dict[str, Any]]:
    """What a format has to say about the folder, by file."""
    quantized = _quantized(origin)
    # No config tells of groups or rules.
    names = tuple(f"{name}.weight" for name in quantized)
    manifest = QuantManifest(groups=(names,), rule=ScaleRule(), activations=_activations(origin))
    return find_format(format).configs(origin.layout, quantized, manifest)


def _write_configs(origin: _Folder, format: str, target: Path) -> None:
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


def _write_files(origin: _Folder, format: Format, target: Path) -> None:
    """Every file with the tensors of its modules in another format."""
    weight_map: dict[str, str] = {}
    num_bytes = 0
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
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if (origin.path / INDEX).exists():
        _write_json(target / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})


def _compare(origin: _Folder, written: _Folder) -> None:
    """Both readers find the same bytes and the same scales."""
    require("convert", written.quantized == origin.quantized, "the quantized modules are not those of the source")
    for module in origin.quantized:
        for part in ("codes", "block_scales"):
            tensors = (folder.part(module, getattr(folder.reader, part)) for folder in (origin, written))
            require("convert", _is_same(*tensors), f"{module} has other {part.replace('_', ' ')} than in the source")
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


def _compare_plain(origin: _Folder, target: Path) -> None:
    """The source, decoded by its reader, is the plain folder."""
    stored = {key: tensor for file in target.glob("*.safetensors") for key, tensor in read_header(file).items()}
    weights = {f"{module}.weight" for module in origin.quantized}
    require("convert", weights <= stored.keys(), "weights are missing")
    for module in origin.quantized:
        codes, scales = (origin.part(module, part) for part in (origin.reader.codes, origin.reader.block_scales))
        scale, written = origin.part(module, origin.reader.stored_scale), stored[f"{module}.weight"]
        num_rows, num_columns = codes.shape[0], 2 * codes.shape[1]
        require("convert", written.shape == (num_rows, num_columns), f"{module} has the shape {written.shape}")
        step = rows_at_once(num_columns)
        for row in range(0, num_rows, step):
            count = min(step, num_rows - row)
            of_source = codes.bytes(row, count), scales.bytes(row, count), scale.bytes().view(np.float32)[0]
            got = written.bytes(row, count).view(np.uint16)
            # Of a global scale that is no power of two, the inverse is rounded: the value beside is as right.
            distance = np.abs(to_bf16_bits(origin.reader.decode(*of_source)).astype(np.int32) - got.astype(np.int32))
            limit = 0 if np.frexp(of_source[2])[0] == 0.5 else 1
            require("convert", int(distance.max(initial=0)) <= limit, f"{module} has other values than the source")
    _compare_others(origin, stored, stored.keys() - weights)


def _compare_others(origin: _Folder, stored: Mapping[str, StoredTensor], keys: set[str]) -> None:
    require("convert", keys == origin.plain_keys(), "the unquantized tensors are not those of the source")
    for key in keys:
        require("convert", _is_same(origin.stored[key], stored[key]), f"{key} differs from the source")


def _is_same(first: StoredTensor, second: StoredTensor) -> bool:
    pieces = zip(first.pieces(PIECE_BYTES), second.pieces(PIECE_BYTES), strict=True)
    is_alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    return is_alike and all(np.array_equal(a, b) for (_, a), (_, b) in pieces)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
