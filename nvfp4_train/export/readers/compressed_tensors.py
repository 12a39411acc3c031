"""compressed-tensors' `nvfp4-pack-quantized`. Where that package is installed, it checks the config as well."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nvfp4_train.export.readers.base import ExportError, Reader, require
from nvfp4_train.export.readers.disk import E4M3_TABLE, decode_rows, encode_input_rows

FIXED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed"}
WEIGHTS_ARGS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": False,
}
INPUT_ARGS = WEIGHTS_ARGS | {"dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
GROUP_KEYS = {"targets", "format", "weights", "input_activations", "output_activations"}


class CompressedTensorsReader(Reader):
    marker = codes = "weight_packed"
    block_scales = "weight_scale"
    stored_scale = "weight_global_scale"
    """The divisor 1 / s2."""
    stored_input_scale = "input_global_scale"
    """The divisor g."""

    def parts(self, num_rows: int, num_columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            self.codes: ("U8", (num_rows, num_columns // 2)),
            self.block_scales: ("F8_E4M3", (num_rows, num_columns // 16)),
            self.stored_scale: ("F32", (1,)),
        }

    def check_config(self, folder: Path, config: Mapping[str, Any]) -> Callable[[str], bool]:
        has_other = (folder / "hf_quant_config.json").exists()
        require("config", not has_other, "hf_quant_config.json makes readers take another format")
        quantization: Any = config.get("quantization_config")
        require("config", isinstance(quantization, dict), "config.json holds no quantization_config")
        for key, value in FIXED.items():
            require("config", quantization.get(key) == value, f"{key} must be {value!r}, got {quantization.get(key)!r}")
        unknown = quantization.keys() - {*FIXED, "ignore", "kv_cache_scheme", "config_groups"}
        require("config", not unknown, f"unknown keys {', '.join(sorted(unknown))}")
        require("config", quantization.get("kv_cache_scheme") is None, "kv_cache_scheme must be null")
        require("config", list(quantization.get("config_groups", {})) == ["group_0"], "config_groups must hold group_0 only")
        group = quantization["config_groups"]["group_0"]
        require("config", group.keys() == GROUP_KEYS, f"group_0 must have the keys {sorted(GROUP_KEYS)}, got {sorted(group)}")
        require("config", group["weights"] == WEIGHTS_ARGS, f"weights must be {WEIGHTS_ARGS}, got {group['weights']}")
        require("config", group["format"] == FIXED["format"], f"group_0 has the format {group['format']!r}")
        inputs, outputs = group["input_activations"], group["output_activations"]
        require("config", inputs in (None, INPUT_ARGS), f"input_activations must be null or {INPUT_ARGS}, got {inputs}")
        require("config", outputs is None, "output_activations must be null")
        targets, ignore = group["targets"], quantization.get("ignore")
        for key, names in (("targets", targets), ("ignore", ignore)):
            is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
            require("config", is_list, f"{key} must be a list of names, got {names!r}")
        _check_with_package(quantization)
        require("scheme", "lm_head" in ignore, "ignore must hold lm_head")
        return lambda name: ("Linear" in targets or _matches(name, targets)) and not _matches(name, ignore)

    def packages(self) -> list[str]:
        return [f"compressed-tensors {version}"] if (version := _package_version()) else []

    def quantizes_inputs(self, config: Mapping[str, Any]) -> bool:
        return config["quantization_config"]["config_groups"]["group_0"]["input_activations"] is not None

    def global_scale(self, stored_scale: np.float32) -> np.float32:
        return np.float32(1) / stored_scale

    def input_scale(self, stored_input_scale: np.float32) -> np.float32:
        return np.float32(1) / stored_input_scale

    def encode_input(self, x: np.ndarray, stored_input_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
        return encode_input_rows(x, stored_input_scale)

    def decode(self, codes: np.ndarray, block_scales: np.ndarray, stored_scale: np.float32) -> np.ndarray:
        return decode_rows(codes, E4M3_TABLE[block_scales] / stored_scale)


def _matches(name: str, entries: list[str]) -> bool:
    return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in entries)


def _package_version() -> str | None:
    return metadata.version("compressed-tensors") if importlib.util.find_spec("compressed_tensors") else None


def _check_with_package(quantization: dict[str, Any]) -> None:
    if _package_version():
        from compressed_tensors.quantization import QuantizationConfig

        try:
            QuantizationConfig.model_validate(quantization)
        except ValueError as error:
            raise ExportError(f"config: compressed-tensors rejects it: {error}") from error


READER = CompressedTensorsReader()
