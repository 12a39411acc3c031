"""Check an exported folder against what its readers require, from its bytes on disk and the architecture in its config.

The checks by name, in order; a failure is an ExportError whose message begins with the name:

    config     config.json holds exactly the quantization config of the format; the folder has nothing that misleads a reader
    index      the files are whole, and the index lists every tensor once
    keys       the tensors are those of the model, with each quantized weight replaced by its three
    tensors    dtypes and shapes
    scheme     `targets` and `ignore` select exactly the quantized linears, by names in memory and on disk
    inputs     no scales of activations (weights only)
    scales     block scales are positive finite E4M3, global scales positive and finite, and their inverse too
    siblings   modules that serving engines fuse have one global scale, and are all quantized or none
    values     decoded and plain tensors equal the expected ones bit for bit

Without power-of-two global scales, 1 / s2 is rounded on disk: there a decoded value may be the bf16 beside the expected one, if
the exact product lies within 2^-21 of the boundary between the two.
"""

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from nvfp4_train.export.disk import E4M3_TABLE, StoredTensor, decode_rows, read_header, to_bf16_bits
from nvfp4_train.export.layout import HubLayout, shown
from nvfp4_train.quant.policy import sibling_set

PARTS = {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"}
FORBIDDEN_IN_KEYS = ("base_layer", "_orig_mod", "_fsdp", "quantizer", "amax", "zero_point", "weight_shape")
WEIGHTS_ARGS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": False,
}
GROUP_KEYS = {"targets", "format", "weights", "input_activations", "output_activations"}
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
ELEMENTS_AT_ONCE = 1 << 22
"""Reading in pieces of this size keeps the check's memory small next to the largest matrix."""


class ExportError(ValueError):
    """An exported folder that a reader would reject or decode to other weights. Begins with the name of the failed check."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verified folder holds."""

    tensors: int
    bytes: int
    """Of all tensors."""
    quantized_parameters: int
    bits_per_weight: float
    """Of the quantized weights: codes, block scales and global scales."""
    subnormal_share: float
    """Of all block scales; some weight-only kernels take these for zero."""
    compared: int
    """Model tensors whose values were compared with the expected ones."""

    def __str__(self) -> str:
        values = f"{self.compared} compared with the model" if self.compared else "values not compared"
        return (
            f"verified {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB, {values}; {self.quantized_parameters:,} parameters "
            f"at {self.bits_per_weight:.3f} bits, {self.subnormal_share:.2%} subnormal block scales"
        )


def verify_export(folder: str | os.PathLike, expected: Mapping[str, Tensor] | None = None) -> VerifyReport:
    """Check a folder; `expected` holds the compute weight of every tensor of the model by `state_dict` name."""
    folder = Path(folder)
    quantization = _check_config(folder)
    layout = HubLayout(AutoConfig.from_pretrained(folder, local_files_only=True))
    stored = _check_index(folder)
    quantized = _check_keys(stored, layout)
    _check_tensors(stored, quantized, layout)
    _check_scheme(quantization, quantized, layout)
    _require(
        "inputs",
        not (names := [key for key in stored if "input_" in key and key.endswith("_scale")]),
        f"{shown(names)} present",
    )
    subnormal, num_blocks = _check_scales(stored, quantized)
    _check_siblings(stored, quantized, layout)
    compared = 0 if expected is None else _check_values(stored, quantized, layout, expected)

    num_parameters = sum(2 * stored[f"{module}.weight_packed"].num_bytes for module in quantized)
    part_bytes = sum(stored[f"{module}.{part}"].num_bytes for module in quantized for part in PARTS)
    return VerifyReport(
        tensors=len(stored),
        bytes=sum(tensor.num_bytes for tensor in stored.values()),
        quantized_parameters=num_parameters,
        bits_per_weight=8 * part_bytes / num_parameters,
        subnormal_share=subnormal / num_blocks,
        compared=compared,
    )


def _require(check: str, condition: bool, message: str) -> None:
    if not condition:
        raise ExportError(f"{check}: {message}")


def _check_config(folder: Path) -> dict[str, Any]:
    """The quantization config of the folder."""
    _require("config", not (folder / "hf_quant_config.json").exists(), "hf_quant_config.json makes readers take another format")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"config: config.json does not load: {error}") from error
    _require("config", config.get("dtype") == "bfloat16", f"dtype must be bfloat16, got {config.get('dtype')!r}")
    quantization = config.get("quantization_config")
    _require("config", isinstance(quantization, dict), "config.json holds no quantization_config")
    fixed = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed"}
    for key, value in fixed.items():
        _require("config", quantization.get(key) == value, f"{key} must be {value!r}, got {quantization.get(key)!r}")
    known = {*fixed, "ignore", "kv_cache_scheme", "config_groups"}
    _require("config", quantization.keys() <= known, f"unknown keys {shown(quantization.keys() - known)}")
    _require("config", quantization.get("kv_cache_scheme") is None, "kv_cache_scheme must be null")
    _require("config", list(quantization.get("config_groups", {})) == ["group_0"], "config_groups must hold group_0 only")
    group = quantization["config_groups"]["group_0"]
    _require("config", group.keys() == GROUP_KEYS, f"group_0 must have the keys {sorted(GROUP_KEYS)}, got {sorted(group)}")
    _require("config", group["weights"] == WEIGHTS_ARGS, f"weights must be {WEIGHTS_ARGS}, got {group['weights']}")
    _require("config", group["format"] == fixed["format"], f"group_0 has the format {group['format']!r}")
    no_activations = group["input_activations"] is None and group["output_activations"] is None
    _require("config", no_activations, "activations must be null: weights only")
    for key, names in (("targets", group["targets"]), ("ignore", quantization.get("ignore"))):
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        _require("config", is_list, f"{key} must be a list of names, got {names!r}")
    if importlib.util.find_spec("compressed_tensors"):
        from compressed_tensors.quantization import QuantizationConfig

        try:
            QuantizationConfig.model_validate(quantization)
        except ValueError as error:
            raise ExportError(f"config: compressed-tensors rejects it: {error}") from error
    return quantization


def _check_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor on disk by name."""
    index_path = folder / "model.safetensors.index.json"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    stored: dict[str, StoredTensor] = {}
    try:
        for file in files:
            tensors = read_header(folder / file)
            _require("index", not (twice := stored.keys() & tensors.keys()), f"{shown(twice)} in more than one file")
            stored |= tensors
        index = json.loads(index_path.read_text()) if index_path.exists() else None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExportError(f"index: a header or the index does not parse: {error!r}") from error
    except ValueError as error:
        raise error if isinstance(error, ExportError) else ExportError(f"index: {error}") from error
    if index is None:
        _require("index", files == ["model.safetensors"], f"without an index model.safetensors is required, got {files}")
    else:
        weight_map = {name: tensor.path.name for name, tensor in stored.items()}
        _require("index", index.get("weight_map") == weight_map, "weight_map does not list each tensor with its file")
        total = sum(tensor.num_bytes for tensor in stored.values())
        listed = index.get("metadata", {}).get("total_size")
        _require("index", listed == total, f"total_size must be {total}, got {listed}")
    bad = [key for key in stored if any(part in key for part in FORBIDDEN_IN_KEYS)]
    _require("index", not bad, f"names of training state: {shown(bad)}")
    return stored


def _check_keys(stored: Mapping[str, StoredTensor], layout: HubLayout) -> set[str]:
    """Modules on disk with a packed weight."""
    quantized = {key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")}
    _require("keys", bool(quantized), "nothing is quantized")
    required = set(layout.hub_shapes)
    for module in quantized:
        _require(
            "keys", f"{module}.weight" in required, f"{module}.weight_packed belongs to no weight of {layout.architecture}"
        )
        required.remove(f"{module}.weight")
        required |= {f"{module}.{part}" for part in PARTS}
    # Scales of activations have a check of their own.
    present = {key for key in stored if not (key.endswith("_scale") and "input_" in key)}
    _require("keys", not (missing := required - present), f"missing {shown(missing)}")
    _require("keys", not (extra := present - required), f"unexpected {shown(extra)}")
    return quantized


def _check_tensors(stored: Mapping[str, StoredTensor], quantized: set[str], layout: HubLayout) -> None:
    required: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    buffers = {key for name in layout.buffers & layout.shapes.keys() for key in layout.hub_names(name)}
    for key, shape in layout.hub_shapes.items():
        required[key] = (None if key in buffers else "BF16", tuple(shape))
    for module in quantized:
        rows, columns = required.pop(f"{module}.weight")[1]
        _require("tensors", columns % 16 == 0, f"{module} has {columns} inputs, no multiple of 16")
        shapes = ((rows, columns // 2), (rows, columns // 16), (1,))
        required |= {f"{module}.{part}": (PARTS[part], shape) for part, shape in zip(PARTS, shapes, strict=True)}
    for key, (dtype, wanted) in required.items():
        got = stored[key]
        is_right = got.shape == wanted and dtype in (None, got.dtype)
        _require("tensors", is_right, f"{key} must be {dtype or 'any dtype'} {wanted}, got {got.dtype} {got.shape}")


def _check_scheme(quantization: Mapping[str, Any], quantized: set[str], layout: HubLayout) -> None:
    ignore: list[str] = quantization["ignore"]
    targets: list[str] = quantization["config_groups"]["group_0"]["targets"]

    def matches(name: str, entries: list[str]) -> bool:
        return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in entries)

    _require("scheme", "lm_head" in ignore, "ignore must hold lm_head")
    linears = layout.linears()
    unknown = quantized - set(linears.values())
    _require("scheme", not unknown, f"{shown(unknown)} is quantized but no linear layer")
    for name, hub_name in linears.items():
        for known_as in (name, hub_name or name):
            is_selected = ("Linear" in targets or matches(known_as, targets)) and not matches(known_as, ignore)
            state = "selected by targets and ignore" if is_selected else "not selected by targets and ignore"
            is_quantized = hub_name in quantized
            _require("scheme", is_selected == is_quantized, f"{known_as} is {state}, quantized on disk: {is_quantized}")
    for name in layout.matrices_outside_linears():
        _require("scheme", matches(name, ignore), f"ignore must hold {name}, which serving engines take for a linear layer")


def _check_scales(stored: Mapping[str, StoredTensor], quantized: set[str]) -> tuple[int, int]:
    """Number of subnormal block scales and of all."""
    num_subnormal = num_blocks = 0
    for module in quantized:
        counts = np.bincount(stored[f"{module}.weight_scale"].bytes(), minlength=256)
        bad = [byte for byte in np.flatnonzero(counts).tolist() if not 0 < E4M3_TABLE[byte] <= 448]
        _require(
            "scales", not bad, f"{module}.weight_scale holds the bytes {[hex(byte) for byte in bad]}: not positive and finite"
        )
        global_scale = _global_scale(stored, module)
        with np.errstate(divide="ignore", over="ignore"):
            is_usable = bool(np.isfinite(global_scale) and global_scale > 0 and np.isfinite(np.float32(1) / global_scale))
        _require(
            "scales", is_usable, f"{module}.weight_global_scale is {global_scale}: it or its inverse is not positive and finite"
        )
        num_subnormal += int(counts[1:8].sum())
        num_blocks += int(counts.sum())
    return num_subnormal, num_blocks


def _check_siblings(stored: Mapping[str, StoredTensor], quantized: set[str], layout: HubLayout) -> None:
    linears = set(layout.linears().values())
    for module in quantized:
        for sibling in sibling_set(module):
            if sibling in linears:
                _require("siblings", sibling in quantized, f"{module} is quantized but {sibling} is not")
                first, second = _global_scale(stored, module), _global_scale(stored, sibling)
                _require("siblings", first == second, f"{module} has the global scale {first}, {sibling} has {second}")


def _check_values(
    stored: Mapping[str, StoredTensor], quantized: set[str], layout: HubLayout, expected: Mapping[str, Tensor]
) -> int:
    """Number of model tensors compared."""
    missing, unknown = layout.shapes.keys() - expected.keys(), expected.keys() - layout.shapes.keys() - layout.aliases.keys()
    _require("values", not missing and not unknown, f"expected weights: missing {shown(missing)}; unknown {shown(unknown)}")
    packed = {f"{module}.weight" for module in quantized}
    for name in layout.shapes:
        want = expected[name].detach()
        for key, tensor in layout.to_hub(name, want if name in layout.buffers else want.to(torch.bfloat16)).items():
            tensor = tensor.cpu().contiguous()
            if key in packed:
                _compare_packed(stored, key.removesuffix(".weight"), tensor)
                continue
            dtype = DTYPES[tensor.dtype]
            _require("values", stored[key].dtype == dtype, f"{key} is {stored[key].dtype}, expected {dtype}")
            wanted = tensor.view(-1).view(torch.uint8).numpy()
            is_equal = all(np.array_equal(piece, wanted[where]) for where, piece in stored[key].pieces(ELEMENTS_AT_ONCE))
            _require("values", is_equal, f"{key} differs from the expected weight")
    return len(layout.shapes)


def _compare_packed(stored: Mapping[str, StoredTensor], module: str, expected: Tensor) -> None:
    num_rows, num_columns = expected.shape
    want = expected.view(torch.int16).numpy().view(np.uint16)
    global_scale = _global_scale(stored, module)
    is_power_of_two = np.frexp(global_scale)[0] == 0.5
    step = max(1, ELEMENTS_AT_ONCE // num_columns)
    num_wrong = 0
    for row in range(0, num_rows, step):
        count = min(step, num_rows - row)
        packed = stored[f"{module}.weight_packed"].bytes(row, count)
        decoded = decode_rows(packed, stored[f"{module}.weight_scale"].bytes(row, count), global_scale)
        right = to_bf16_bits(decoded) == want[row : row + count]
        if not is_power_of_two:
            for factor in (np.float32(1 - 2.0**-21), np.float32(1 + 2.0**-21)):
                right |= to_bf16_bits(decoded * factor) == want[row : row + count]
        num_wrong += int(np.count_nonzero(~right))
    if num_wrong:
        raise ExportError(
            f"values: {module} decodes to {num_wrong} of {expected.numel()} values that differ from the expected weight"
        )


def _global_scale(stored: Mapping[str, StoredTensor], module: str) -> np.float32:
    return stored[f"{module}.weight_global_scale"].bytes().view(np.float32)[0]
