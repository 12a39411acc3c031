"""A verified NVFP4 folder of any format, as something to read from."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nvfp4_train.export.formats.base import QuantizedTensor
from nvfp4_train.export.passed_through import passed_through_on_disk
from nvfp4_train.export.readers.disk import StoredTensor, read_header
from nvfp4_train.export.registry import find_reader
from nvfp4_train.export.verify import layout_on_disk
from nvfp4_train.models.architecture import read_exported_config
from nvfp4_train.models.layout import HubLayout

FORMAT_OF_METHOD = {"compressed-tensors": "compressed_tensors", "modelopt": "modelopt"}
"""`quant_method` in config.json -> the format that has it."""


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


class PackedFolder:
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
    def published(self) -> HubLayout:
        """The layout that the authors of the model gave their folder."""
        return HubLayout(read_exported_config(self.path))

    @cached_property
    def layout(self) -> HubLayout:
        """That of this folder."""
        layout = layout_on_disk(self.reader, self.published, self.stored)
        layout.not_built = passed_through_on_disk(layout, self.stored)
        return layout

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

    def _number(self, module: str, part: str) -> np.float32:
        return self.part(module, part).bytes().view(np.float32)[0]
