"""Check an exported folder against what its readers require, from its bytes on disk and the architecture in its config.

The checks by name, in order; a failure is an ExportError whose message begins with the name:

    config     config.json holds exactly the quantization config of the format; the folder has nothing that misleads a reader
    index      the files are whole, and the index lists every tensor once
    keys       the tensors are those of the model, with each quantized weight replaced by its parts
    tensors    dtypes and shapes
    scheme     the config selects exactly the quantized linears, by names in memory and on disk
    inputs     input scales are there exactly where the config has inputs quantized: powers of two, one for siblings, and the
               expected ones; the codes that a reader makes of some inputs of the training forward are those of that forward
    scales     block scales are finite and at least E4M3's floor, global scales positive and finite, and their inverse too
    passed     tensors that transformers does not build have the bytes of the original folder
    siblings   modules that serving engines fuse have one global scale, and are all quantized or none
    values     decoded and plain tensors equal the expected ones bit for bit

Bytes are read and decoded by `readers`, which share nothing with the writer. The names, shapes and dtypes that a model must have come
from `HubLayout`, the siblings from the policy, the floor of block scales from the kernels' reference. The writer uses these as well,
so a mistake in them does not show here. It shows where transformers or a serving engine loads the folder.

Without power-of-two global scales, 1 / s2 is rounded on disk. A decoded value may then be the bf16 beside the expected one, if the
exact product lies within 2^-21 of the boundary between the two.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvfp4_train.export.passed_through import PassedThrough, passed_through_on_disk
from nvfp4_train.export.phases import Phases, silent
from nvfp4_train.export.readers.base import ExportError, Reader, require
from nvfp4_train.export.readers.disk import E4M3_TABLE, StoredTensor, read_header
from nvfp4_train.export.registry import find_reader
from nvfp4_train.export.values import Packed, Piece, compare, plain_pieces
from nvfp4_train.kernels.reference import BLOCK_SIZE, E4M3_MIN
from nvfp4_train.models.architecture import read_exported_config
from nvfp4_train.models.layout import HubLayout, shown
from nvfp4_train.models.stored_dtypes import STORED_NAMES
from nvfp4_train.parallel import in_threads
from nvfp4_train.quant.inputs import InputSample
from nvfp4_train.quant.policy import sibling_set

FORBIDDEN_IN_KEYS = ("base_layer", "_orig_mod", "_fsdp", "quantizer", "amax", "zero_point", "weight_shape")
SCALES_OF_ACTIVATIONS = (".input_scale", ".input_global_scale")
ELEMENTS_AT_ONCE: int | None = None
"""Elements that a thread reads at once; None for what is fastest. Fewer take less memory beside the largest matrix."""
SCALE_BYTES = np.flatnonzero((E4M3_TABLE >= E4M3_MIN) & (E4M3_TABLE <= 448))
"""Block scales that a folder may hold, as bytes: E4M3 ascends with them."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verified folder holds."""

    tensors: int
    bytes: int
    """Bytes of all tensors."""
    quantized_parameters: int
    bits_per_weight: float
    """Bits of a quantized weight: codes, block scales and global scales."""
    compared: int
    """Model tensors whose values were compared with the expected ones."""
    quantizes_inputs: bool = False
    """Whether readers quantize the inputs of quantized modules (W4A4)."""
    input_codes: int = 0
    """Codes of inputs that were made anew and compared with those of the training forward."""
    passed_through: int = 0
    """Tensors that were compared with those of the original folder."""
    packages: tuple[str, ...] = ()
    """Packages of others, with their versions, that accept the config."""

    def readers(self) -> list[str]:
        """Which readers have checked the folder, and which have not."""
        extent = f"all {self.compared} tensors of the model, bit for bit" if self.compared else "names, shapes and scales"
        codes = f", and {self.input_codes:,} codes of inputs" if self.input_codes else ""
        own = f"nvfp4_train's reader in NumPy: {extent}{codes}"
        return [own, *(f"{package}: the config" for package in self.packages), "not run: transformers and serving engines"]

    def __str__(self) -> str:
        values = f"{self.compared} compared with the model" if self.compared else "values not compared"
        codes = f"{self.input_codes:,} of their codes compared" if self.input_codes else "their codes not compared"
        inputs = f"; inputs in NVFP4, {codes}" if self.quantizes_inputs else ""
        passed = f", {self.passed_through} with the original folder" if self.passed_through else ""
        return (
            f"verified {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB, {values}{passed}; {self.quantized_parameters:,} parameters "
            f"at {self.bits_per_weight:.3f} bits{inputs}"
        )


def verify_export(
    folder: str | os.PathLike,
    expected: Mapping[str, Tensor] | None = None,
    *,
    format: str = "compressed_tensors",
    input_scales: Mapping[str, Tensor] | None = None,
    inputs: Sequence[InputSample] = (),
    passed_through: PassedThrough | None = None,
    progress: Phases = silent,
) -> VerifyReport:
    """Check a folder on all cores, raising ExportError.

    Args:
        folder: The folder.
        expected: The compute weight of every tensor of the model by `state_dict` name. Values are not compared without.
        format: A name of `registry.known_formats`.
        input_scales: 1 / g of the input of every quantized weight, float32 [1], by `state_dict` name.
        inputs: Inputs of the training forward, with their codes.
        passed_through: Tensors of the original folder that the model's class does not build. Without, those that the class knows of are
            accepted as they are.
        progress: Told of the bytes that were compared.
    """
    folder, reader = Path(folder), find_reader(format)
    is_selected, quantizes_inputs = _check_config(folder, reader)
    stored = check_index(folder)
    layout = layout_on_disk(reader, HubLayout(read_exported_config(folder)), stored)
    layout.not_built = passed_through_on_disk(layout, stored) if passed_through is None else passed_through.on_meta()
    exported = _Exported(reader, layout, stored, _check_keys(reader, layout, stored))
    _check_tensors(exported)
    _check_scheme(exported, is_selected)
    input_codes = _check_inputs(exported, quantizes_inputs, input_scales, inputs)
    _check_scales(exported)
    _check_siblings(exported)
    passed = 0 if passed_through is None else passed_through.check(stored)
    compared = 0 if expected is None else _check_values(exported, expected, progress)

    num_parameters = sum(2 * exported.part(module, reader.codes).num_bytes for module in exported.quantized)
    part_bytes = sum(exported.part(module, part).num_bytes for module in exported.quantized for part in exported.parts(module))
    return VerifyReport(
        tensors=len(stored),
        bytes=sum(tensor.num_bytes for tensor in stored.values()),
        quantized_parameters=num_parameters,
        bits_per_weight=8 * part_bytes / num_parameters,
        compared=compared,
        quantizes_inputs=quantizes_inputs,
        input_codes=input_codes,
        passed_through=passed,
        packages=tuple(reader.packages()),
    )


@dataclass(frozen=True)
class _Exported:
    """A folder whose tensors have the right names."""

    reader: Reader
    layout: HubLayout
    stored: Mapping[str, StoredTensor]
    quantized: frozenset[str]
    """Quantized modules, by name on disk."""

    def parts(self, module: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Required dtype and shape of each part of a quantized module."""
        return self.reader.parts(*self.layout.hub_tensors[f"{module}.weight"].shape)

    def part(self, module: str, part: str) -> StoredTensor:
        return self.stored[f"{module}.{part}"]

    def stored_scale(self, module: str) -> np.float32:
        """The global scale, as the format stores it."""
        return self.part(module, self.reader.stored_scale).bytes().view(np.float32)[0]

    def stored_input_scale(self, module: str) -> np.float32:
        """That of its input."""
        assert self.reader.stored_input_scale is not None
        return self.part(module, self.reader.stored_input_scale).bytes().view(np.float32)[0]


def layout_on_disk(reader: Reader, layout: HubLayout, stored: Mapping[str, StoredTensor]) -> HubLayout:
    """The layout with those experts quantized that are so on disk: their first matrix tells."""
    matrices = {name: layout.matrices(name) for name in layout.experts}
    return layout.with_quantized([name for name, m in matrices.items() if m and f"{m[0].module}.{reader.marker}" in stored])


def _check_config(folder: Path, reader: Reader) -> tuple[Callable[[str], bool], bool]:
    """Whether a loader takes a module for quantized, by name, and whether it quantizes inputs."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"config: config.json does not load: {error}") from error
    require("config", config.get("dtype") == "bfloat16", f"dtype must be bfloat16, got {config.get('dtype')!r}")
    return reader.check_config(folder, config), reader.quantizes_inputs(config)


def check_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor on disk by name."""
    index_path = folder / "model.safetensors.index.json"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    stored: dict[str, StoredTensor] = {}
    try:
        for file in files:
            tensors = read_header(folder / file)
            require("index", not (twice := stored.keys() & tensors.keys()), f"{shown(twice)} in more than one file")
            stored |= tensors
        index = json.loads(index_path.read_text()) if index_path.exists() else None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExportError(f"index: a header or the index does not parse: {error!r}") from error
    except ValueError as error:
        raise error if isinstance(error, ExportError) else ExportError(f"index: {error}") from error
    if index is None:
        require("index", files == ["model.safetensors"], f"without an index model.safetensors is required, got {files}")
    else:
        weight_map = {name: tensor.path.name for name, tensor in stored.items()}
        require("index", index.get("weight_map") == weight_map, "weight_map does not list each tensor with its file")
        total = sum(tensor.num_bytes for tensor in stored.values())
        listed = index.get("metadata", {}).get("total_size")
        require("index", listed == total, f"total_size must be {total}, got {listed}")
    bad = [key for key in stored if any(part in key for part in FORBIDDEN_IN_KEYS)]
    require("index", not bad, f"names of training state: {shown(bad)}")
    return stored


def _scales_of_activations(layout: HubLayout, stored: Mapping[str, StoredTensor]) -> set[str]:
    return {key for key in stored.keys() - layout.hub_tensors.keys() if key.endswith(SCALES_OF_ACTIVATIONS)}


def _check_keys(reader: Reader, layout: HubLayout, stored: Mapping[str, StoredTensor]) -> frozenset[str]:
    """Check the names on disk. Returns the modules on disk with a quantized weight."""
    marker = f".{reader.marker}"
    quantized = frozenset(key.removesuffix(marker) for key in stored if key.endswith(marker))
    require("keys", bool(quantized), "nothing is quantized")
    required = layout.hub_tensors.keys() | layout.not_built.keys()
    for module in quantized:
        weight = f"{module}.weight"
        require("keys", weight in required, f"{module}{marker} belongs to no weight of {layout.architecture}")
        is_matrix = layout.hub_tensors[weight].dim() == 2
        require("keys", is_matrix, f"{module}{marker} belongs to {weight}, which is no matrix")
        required.remove(weight)
        required |= {f"{module}.{part}" for part in reader.parts(*layout.hub_tensors[weight].shape)}
    # Scales of activations have a check of their own.
    present = stored.keys() - _scales_of_activations(layout, stored)
    require("keys", not (missing := required - present), f"missing {shown(missing)}")
    require("keys", not (extra := present - required), f"unexpected {shown(extra)}")
    return quantized


def _check_tensors(exported: _Exported) -> None:
    tensors = exported.layout.hub_tensors | exported.layout.not_built
    required = {key: (STORED_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    for module in exported.quantized:
        _, (_, columns) = required.pop(f"{module}.weight")
        require("tensors", columns % BLOCK_SIZE == 0, f"{module} has {columns} inputs, no multiple of {BLOCK_SIZE}")
        required |= {f"{module}.{part}": wanted for part, wanted in exported.parts(module).items()}
    for key, wanted in required.items():
        got = exported.stored[key].dtype, exported.stored[key].shape
        require("tensors", got == wanted, f"{key} must be {wanted[0]} {wanted[1]}, got {got[0]} {got[1]}")


def _check_scheme(exported: _Exported, is_selected: Callable[[str], bool]) -> None:
    linears, of_experts = exported.layout.linears(), exported.layout.quantized_expert_modules()
    unknown = exported.quantized - set(linears.values()) - of_experts
    require("scheme", not unknown, f"{shown(unknown)} is quantized but no linear layer")
    for name in of_experts:
        require("scheme", name in exported.quantized, f"{name} is not quantized, but others of its experts are")
        require("scheme", is_selected(name), f"{name} is not selected by the config, but quantized on disk")
    for name, hub_name in linears.items():
        for known_as in (name, hub_name or name):
            state = "selected by the config" if is_selected(known_as) else "not selected by the config"
            is_quantized = hub_name in exported.quantized
            require(
                "scheme", is_selected(known_as) == is_quantized, f"{known_as} is {state}, quantized on disk: {is_quantized}"
            )
    for name in exported.layout.matrices_outside_linears():
        message = f"{name} is selected by the config; serving engines take it for a linear layer, but it is not quantized"
        require("scheme", not is_selected(name), message)


def _check_inputs(
    exported: _Exported, is_quantized: bool, expected: Mapping[str, Tensor] | None, samples: Sequence[InputSample]
) -> int:
    """Check the scales of inputs, and compare codes. Returns the number of codes."""
    present = _scales_of_activations(exported.layout, exported.stored)
    if not is_quantized:
        require("inputs", not present, f"{shown(present)} present, but the config has no inputs quantized")
        require("inputs", not expected and not samples, "the model quantizes inputs (W4A4), but the config has none quantized")
        return 0
    required = {f"{module}.{exported.reader.stored_input_scale}" for module in exported.quantized}
    require("inputs", not (missing := required - present), f"missing {shown(missing)}")
    require("inputs", not (extra := present - required), f"unexpected {shown(extra)}")
    for key in required:
        got = exported.stored[key].dtype, exported.stored[key].shape
        wanted = exported.reader.input_scale_shape
        require("inputs", got == ("F32", wanted), f"{key} must be F32 {wanted}, got {got[0]} {got[1]}")
    _check_input_scales(exported, expected or {})
    return sum(_compare_input(exported, sample) for sample in samples)


def _check_input_scales(exported: _Exported, expected: Mapping[str, Tensor]) -> None:
    scales = {module: exported.stored_input_scale(module) for module in sorted(exported.quantized)}
    for module, scale in scales.items():
        # Under another scale engines part ways: some multiply by 1 / g, which is rounded.
        is_power_of_two = bool(np.isfinite(scale) and np.frexp(scale)[0] == 0.5)
        require("inputs", is_power_of_two, f"the input scale of {module} is stored as {scale}, which is no power of two")
    for module, scale in scales.items():
        for sibling in scales.keys() & set(sibling_set(module)):
            other = scales[sibling]
            require("inputs", scale == other, f"{module} has the input scale {scale} on disk, {sibling} has {other}")
    for name, wanted in expected.items():
        for module in [matrix.module for matrix in exported.layout.matrices(name)]:
            got = exported.reader.input_scale(scales[module])
            require(
                "inputs",
                got == wanted.item(),
                f"the input of {module} has the scale {got} on disk, {wanted.item()} in training",
            )


def _compare_input(exported: _Exported, sample: InputSample) -> int:
    """Make the codes of an input anew. Returns their number."""
    module = exported.layout.matrices(sample.name)[0].module
    codes, scales = exported.reader.encode_input(sample.x.float().numpy(), exported.stored_input_scale(module))
    num_wrong = int(np.count_nonzero(scales != sample.scales.view(torch.uint8).numpy()))
    require(
        "inputs", num_wrong == 0, f"a reader gives {num_wrong} blocks of the input of {module} another scale than training did"
    )
    num_wrong = int(np.count_nonzero(codes != sample.packed.numpy()))
    require(
        "inputs", num_wrong == 0, f"a reader makes {num_wrong} bytes of codes of the input of {module} that training did not"
    )
    return 2 * codes.size


def _check_scales(exported: _Exported) -> None:
    modules = sorted(exported.quantized)
    for module, bad in zip(modules, in_threads(lambda module: _bad_block_scales(exported, module), modules), strict=True):
        message = f"{module} holds the block scales {bad}: not finite, or below {E4M3_MIN}, which some kernels take for zero"
        require("scales", not bad, message)
        stored_scale = exported.stored_scale(module)
        with np.errstate(divide="ignore", over="ignore"):
            is_usable = bool(np.isfinite(stored_scale) and stored_scale > 0 and np.isfinite(np.float32(1) / stored_scale))
        message = f"the global scale of {module} is stored as {stored_scale}: it or its inverse is not positive and finite"
        require("scales", is_usable, message)


def _bad_block_scales(exported: _Exported, module: str) -> list[str]:
    scales = exported.part(module, exported.reader.block_scales).bytes()
    if SCALE_BYTES[0] <= scales.min(initial=SCALE_BYTES[0]) and scales.max(initial=SCALE_BYTES[0]) <= SCALE_BYTES[-1]:
        return []
    return [hex(byte) for byte in np.setdiff1d(scales, SCALE_BYTES).tolist()]


def _check_siblings(exported: _Exported) -> None:
    linears = set(exported.layout.linears().values()) | exported.layout.quantized_expert_modules()
    for module in exported.quantized:
        for sibling in sibling_set(module):
            if sibling in linears:
                require("siblings", sibling in exported.quantized, f"{module} is quantized but {sibling} is not")
                first, second = exported.stored_scale(module), exported.stored_scale(sibling)
                require("siblings", first == second, f"{module} has the global scale {first} on disk, {sibling} has {second}")


def _check_values(exported: _Exported, expected: Mapping[str, Tensor], progress: Phases) -> int:
    """Compare every tensor of the model. Returns their number."""
    layout = exported.layout
    missing, unknown = layout.tensors.keys() - expected.keys(), expected.keys() - layout.tensors.keys() - layout.aliases.keys()
    require("values", not missing and not unknown, f"expected weights: missing {shown(missing)}; unknown {shown(unknown)}")
    num_bytes = sum(tensor.num_bytes for key, tensor in exported.stored.items() if key not in layout.not_built)
    with progress("verifying", total=num_bytes, unit="B") as bar:
        compare(_pieces(exported, expected), bar)
    return len(layout.tensors)


def _pieces(exported: _Exported, expected: Mapping[str, Tensor]) -> Iterator[Piece]:
    """All tensors of the model, each with the expected values, which are asked for one bundle at a time."""
    layout, reader = exported.layout, exported.reader
    for names in layout.bundles:
        tensors = {name: expected[name].detach().to(layout.served_dtype(name)) for name in names}
        for key, tensor in layout.to_hub(tensors).items():
            tensor = tensor.cpu().contiguous()
            module = key.removesuffix(".weight")
            if key != module and module in exported.quantized:
                codes, block_scales = (exported.part(module, part) for part in (reader.codes, reader.block_scales))
                packed = Packed(reader, codes, block_scales, exported.stored_scale(module), ELEMENTS_AT_ONCE)
                yield from packed.pieces(module, tensor.view(torch.int16).numpy().view(np.uint16))
            else:
                raw = tensor.view(-1).view(torch.uint8).numpy()
                yield from plain_pieces(key, exported.stored[key], raw, ELEMENTS_AT_ONCE)
