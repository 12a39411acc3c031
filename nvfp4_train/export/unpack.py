"""Unpacks an NVFP4 folder to bf16, for readers that know the model but no NVFP4 of its kind.

The new folder is laid out as the authors of the model published it. Weights have the values that readers of NVFP4 decode.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvfp4_train.export.folder import check_target, replacing_folder
from nvfp4_train.export.readers.base import Reader
from nvfp4_train.export.readers.disk import StoredTensor
from nvfp4_train.export.registry import find_reader
from nvfp4_train.export.shards import FileGroup, write_shards
from nvfp4_train.export.verify import check_index, layout_on_disk
from nvfp4_train.models.architecture import read_exported_config
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.served import SERVED_DTYPE

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool}
TORCH_DTYPES |= {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


def unpack_export(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str = "compressed_tensors",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write the folder `out`, in bf16, of an exported folder. Returns its path.

    Raises:
        FileExistsError: `out` exists and is not to be replaced.
        ExportError: The folder is none of the format.
        ValueError: It holds a dtype that is not known.
    """
    folder, target = Path(folder), check_target(out, overwrite)
    reader = find_reader(format)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    reader.check_config(folder, config)
    stored = check_index(folder)
    plain = HubLayout(read_exported_config(folder))
    unpacked = _Unpacked(reader, stored, plain, layout_on_disk(reader, plain, stored))
    with replacing_folder(target, overwrite) as partial_folder:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copy2(path, partial_folder)
        # What tells of another format misleads readers.
        (partial_folder / "hf_quant_config.json").unlink(missing_ok=True)
        del config["quantization_config"]
        (partial_folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_shards(partial_folder, unpacked.file_groups(), max_shard_bytes)
    return target


class _Unpacked:
    """The tensors of a bf16 folder, made of those of a packed one."""

    def __init__(self, reader: Reader, stored: Mapping[str, StoredTensor], plain: HubLayout, packed: HubLayout) -> None:
        self.reader = reader
        self.stored = stored
        self.plain = plain
        self.packed = packed

    def file_groups(self) -> Iterator[FileGroup]:
        """The tensors on disk of every bundle, and then those that the model has no part for."""
        known: set[str] = set()
        for names, keys in self.plain.bundles.items():
            size = sum(self.plain.hub_tensors[key].nbytes for key in keys)
            yield FileGroup(size, partial(self._bundle, names))
            known.update(self._sources(names))
        for key in self.stored.keys() - known:
            yield FileGroup(self.stored[key].num_bytes, partial(self._alone, key))

    def _alone(self, key: str) -> dict[str, Tensor]:
        return {key: self._read(key)}

    def _bundle(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        if not self._is_changed(names):
            return {key: self._read(key) for key in self.plain.bundles[names]}
        (name,) = names
        weight = self.plain.experts.get(name)
        whole = torch.empty(self.packed.tensors[name].shape, dtype=self.plain.served_dtype(name))
        for key, part in self.packed.to_hub({name: whole}).items():
            module = key.removesuffix(".weight")
            part.copy_(self._read(key) if key in self.stored else self._decode(module, part))
        as_in_class = whole.mT if weight is not None and weight.is_transposed else whole
        return {key: tensor.contiguous() for key, tensor in self.plain.to_hub({name: as_in_class}).items()}

    def _is_changed(self, names: tuple[str, ...]) -> bool:
        """Whether a bundle lies otherwise in the packed folder than in that of the authors."""
        return any(key not in self.stored or self._is_packed(key.removesuffix(".weight")) for key in self.plain.bundles[names])

    def _is_packed(self, module: str) -> bool:
        return f"{module}.{self.reader.marker}" in self.stored

    def _sources(self, names: tuple[str, ...]) -> set[str]:
        """What a bundle is made of."""
        sources: set[str] = set()
        for key in self.packed.bundles[names]:
            module = key.removesuffix(".weight")
            is_packed = key.endswith(".weight") and self._is_packed(module)
            sources |= {stored for stored in self.stored if stored.rpartition(".")[0] == module} if is_packed else {key}
        return sources

    def _read(self, key: str) -> Tensor:
        tensor = self.stored[key]
        if tensor.dtype not in TORCH_DTYPES:
            raise ValueError(f"{key} must have one of the dtypes {', '.join(TORCH_DTYPES)} to be unpacked, got {tensor.dtype}")
        return torch.from_numpy(tensor.bytes().copy()).view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)

    def _decode(self, module: str, like: Tensor) -> Tensor:
        num_rows, num_columns = like.shape
        codes, scales = (
            self.stored[f"{module}.{part}"].bytes().reshape(num_rows, -1)
            for part in (self.reader.codes, self.reader.block_scales)
        )
        stored_scale = self.stored[f"{module}.{self.reader.stored_scale}"].bytes().view(np.float32)[0]
        return torch.from_numpy(self.reader.decode(codes, scales, stored_scale)).to(SERVED_DTYPE)
