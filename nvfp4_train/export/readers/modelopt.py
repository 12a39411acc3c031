"""Model Optimizer's `NVFP4` and `W4A16_NVFP4`, as TensorRT-LLM (hf_quant_config.json) and vLLM and SGLang (config.json) read them."""

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from nvfp4_train.export.readers.base import ExportError, Reader, require
from nvfp4_train.export.readers.disk import E4M3_TABLE, decode_rows, encode_input_rows

ARGS = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
GROUPS = {
    "NVFP4": {"targets": ["Linear"], "weights": ARGS, "input_activations": ARGS},
    "W4A16_NVFP4": {"targets": ["Linear"], "weights": ARGS},
}
"""The only group that goes with an algorithm. A reader that finds others takes the folder for another one than it is."""
KEYS = {"quant_method", "quant_algo", "producer", "ignore", "config_groups"}
FILE_KEYS = {"quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"}


class ModelOptReader(Reader):
    marker = block_scales = "weight_scale"
    codes = "weight"
    stored_scale = "weight_scale_2"
    """The multiplier s2."""
    stored_input_scale = "input_scale"
    """The multiplier 1 / g."""
    input_scale_shape = ()

    def parts(self, num_rows: int, num_columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            self.codes: ("U8", (num_rows, num_columns // 2)),
            self.block_scales: ("F8_E4M3", (num_rows, num_columns // 16)),
            self.stored_scale: ("F32", ()),
        }

    def check_config(self, folder: Path, config: Mapping[str, Any]) -> Callable[[str], bool]:
        quantization: Any = config.get("quantization_config")
        require("config", isinstance(quantization, dict), "config.json holds no quantization_config")
        method = quantization.get("quant_method")
        require("config", method == "modelopt", f"quant_method must be 'modelopt', got {method!r}")
        require("config", quantization.keys() == KEYS, f"keys must be {sorted(KEYS)}, got {sorted(quantization)}")
        algorithm, groups = quantization["quant_algo"], quantization["config_groups"]
        require("config", algorithm in GROUPS, f"quant_algo must be one of {', '.join(GROUPS)}, got {algorithm!r}")
        wanted = {"group_0": GROUPS[algorithm]}
        require("config", groups == wanted, f"config_groups must be {wanted} with {algorithm}, got {groups}")
        producer = quantization["producer"]
        is_named = (
            isinstance(producer, dict) and producer.get("name") == "modelopt" and isinstance(producer.get("version"), str)
        )
        require("config", is_named, f"producer must have the name 'modelopt' and a version, got {producer!r}")
        ignore = quantization["ignore"]
        is_list = isinstance(ignore, list) and all(isinstance(name, str) for name in ignore)
        require("config", is_list, f"ignore must be a list of names, got {ignore!r}")
        _check_file(folder / "hf_quant_config.json", quantization)
        require("scheme", "lm_head" in ignore, "ignore must hold lm_head")
        return lambda name: not _is_excluded(name, ignore)

    def quantizes_inputs(self, config: Mapping[str, Any]) -> bool:
        return config["quantization_config"]["quant_algo"] == "NVFP4"

    def global_scale(self, stored_scale: np.float32) -> np.float32:
        return stored_scale

    def input_scale(self, stored_input_scale: np.float32) -> np.float32:
        return stored_input_scale

    def encode_input(self, x: np.ndarray, stored_input_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
        return encode_input_rows(x, np.float32(1) / stored_input_scale)

    def decode(self, codes: np.ndarray, block_scales: np.ndarray, stored_scale: np.float32) -> np.ndarray:
        return decode_rows(codes, E4M3_TABLE[block_scales] * stored_scale)


def _check_file(path: Path, quantization: Mapping[str, Any]) -> None:
    """Check the file of TensorRT-LLM, which must say what config.json says."""
    try:
        content = json.loads(path.read_text())
        saved, producer = content["quantization"], content["producer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"config: {path.name} does not load, or lacks quantization or producer: {error!r}") from error
    is_complete = isinstance(saved, dict) and saved.keys() == FILE_KEYS
    require("config", is_complete, f"quantization in {path.name} must have the keys {sorted(FILE_KEYS)}, got {saved!r}")
    require("config", producer == quantization["producer"], f"{path.name} names the producer {producer!r}, config.json another")
    for key, value in (("quant_algo", quantization["quant_algo"]), ("exclude_modules", quantization["ignore"])):
        message = f"{key} in {path.name} must be what config.json has, {value!r}, got {saved[key]!r}"
        require("config", saved[key] == value, message)
    for key, value in (("group_size", 16), ("kv_cache_quant_algo", None)):
        require("config", saved[key] == value, f"{key} in {path.name} must be {value!r}, got {saved[key]!r}")


def _is_excluded(name: str, entries: list[str]) -> bool:
    """Entries are wildcards for whole names; vLLM takes one for a part of a name, too."""
    return any(fnmatchcase(name, entry) or entry in name for entry in entries)


READER = ModelOptReader()
