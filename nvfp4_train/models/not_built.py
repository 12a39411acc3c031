"""Tensors of a folder that the model's class does not build, such as layers that predict further tokens (MTP).

Transformers passes over them, by patterns of the class. An export copies them, so that it can do all that the original can. What
belongs into a layer that is built, or is a buffer that is computed, would not be read by anybody: it is left out, and said.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nvfp4_train.load_errors import reading
from nvfp4_train.models.causal_lm import ModelConfig, read_original
from nvfp4_train.models.folder import is_ignored
from nvfp4_train.models.layout import prefixes, shown
from nvfp4_train.models.originals import SCALES_OF_FP8, SCALES_OF_INPUTS, block_of, dequantize_blocks
from nvfp4_train.models.stored_dtypes import STORED_DTYPES, STORED_NAMES
from nvfp4_train.models.weight_files import weight_files
from nvfp4_train.quant.served import SERVED_DTYPE

COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids)$")
"""Buffers that every reader computes."""

FP8 = torch.float8_e4m3fn
KEPT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
"""Dtypes that are copied as they are."""


@dataclass(frozen=True, kw_only=True)
class NotBuilt:
    """Tensors of a folder that the class of its model does not build, as plain data."""

    kept: Mapping[str, tuple[str, tuple[int, ...]]]
    """Dtype, as torch names it, and shape in the export, by name on disk. FP8 weights become bf16; others stay as they are."""
    left_out: tuple[str, ...] = ()
    """Names of those that nobody would read."""
    block: tuple[int, int] | None = None
    """Rows and columns that one scale of an FP8 weight is for."""

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers alone, because checkpoints are read with weights_only."""
        kept = {name: [dtype, list(shape)] for name, (dtype, shape) in self.kept.items()}
        return {"kept": kept, "left_out": list(self.left_out), "block": None if self.block is None else list(self.block)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "NotBuilt":
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError where `saved` is none."""
        return cls(
            kept={name: (str(dtype), tuple(shape)) for name, (dtype, shape) in saved["kept"].items()},
            left_out=tuple(saved["left_out"]),
            block=None if saved["block"] is None else tuple(saved["block"]),
        )

    def on_meta(self) -> dict[str, Tensor]:
        """The tensors that are kept, on the meta device."""
        return {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (dtype, shape) in self.kept.items()
        }

    def __str__(self) -> str:
        """Lines for the user."""
        lines = []
        if self.kept:
            blocks = ", ".join(f"{prefix}.*" for prefix in prefixes(self.kept))
            lines.append(
                f"copied to the export as they are: {len(self.kept)} tensors that transformers does not build, {blocks}"
            )
        if self.left_out:
            lines.append(f"left out of the export, since no reader uses them: {shown(self.left_out)}")
        return "\n".join(lines)


def find_not_built(config: ModelConfig, model: PreTrainedModel) -> NotBuilt | None:
    """What of the folder of `config` its model, which has been loaded, does not hold. None where that is nothing."""
    if config.path is None:
        return None
    _, quantization = read_original(config)
    file_of = original_files(config.path)
    names = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
    built = revert_weight_conversion(model, names).keys()
    missing = [key for key in sorted(file_of) if key not in built and is_ignored(model, key)]
    if not missing:
        return None
    layers = {layer for key in built if (layer := _layer(key))}
    left_out = [key for key in missing if COMPUTED.search(key) or _layer(key) in layers]
    block = None if quantization is None else block_of(quantization)
    kept: dict[str, tuple[str, tuple[int, ...]]] = {}
    described = describe(file_of, [key for key in missing if key not in left_out])
    for key, (dtype, shape) in described.items():
        if key.endswith(SCALES_OF_FP8) and key.removesuffix(SCALES_OF_FP8) in described:
            continue
        if block is not None and key.endswith(SCALES_OF_INPUTS):
            continue
        is_scaled_fp8 = dtype is FP8 and f"{key}{SCALES_OF_FP8}" in described and block is not None
        if dtype not in KEPT_DTYPES and not is_scaled_fp8:
            raise ValueError(
                f"model.path={config.path!r}: {key} is quantized in a way that is not undone here, and transformers builds no module "
                "for it; remove it from the folder, or bring the bf16 model"
            )
        kept[key] = (str(SERVED_DTYPE if dtype is FP8 else dtype).removeprefix("torch."), shape)
    return NotBuilt(kept=kept, left_out=tuple(left_out), block=block)


def _layer(key: str) -> str | None:
    """The name of a tensor up to its first number."""
    match = re.match(r"(.*?\.\d+)\.", key)
    return match.group(1) if match else None


def original_files(path: str) -> dict[str, str]:
    """The file on this machine of every tensor of a folder or hub name."""
    file_of: dict[str, str] = {}
    for file in weight_files(path):
        with opened(file) as tensors:
            file_of |= dict.fromkeys(tensors.keys(), file)
    return file_of


@contextmanager
def opened(file: str) -> Iterator[Any]:
    """The tensors of a file, with `keys`, `get_tensor` and, for safetensors, slices. Raises ValueError where it cannot be read."""
    is_pickled = not file.endswith(".safetensors")
    with reading(file, file):
        if is_pickled:
            # Files of PyTorch before 1.6 are no archives, which alone can be mapped.
            mmap = zipfile.is_zipfile(file)
            found: Any = nullcontext(_Pickled(torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)))
        else:
            found = safe_open(file, "pt")
    with found as tensors:
        yield tensors


@dataclass(frozen=True)
class _Described:
    tensor: Tensor

    def get_dtype(self) -> str | None:
        return STORED_NAMES.get(self.tensor.dtype)

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


class _Pickled(dict[str, Tensor]):
    """A file of an older kind, with the methods of safetensors."""

    def get_tensor(self, key: str) -> Tensor:
        return self[key]

    def get_slice(self, key: str) -> _Described:
        return _Described(self[key])


def describe(file_of: Mapping[str, str], keys: Sequence[str]) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Dtype and shape of some tensors by name, in the order of `keys`; None for a dtype that is not known. Reads no data."""
    found = {}
    for file in dict.fromkeys(file_of[key] for key in keys):
        with opened(file) as tensors:
            for key in keys:
                if file_of[key] == file:
                    described = tensors.get_slice(key)
                    found[key] = (STORED_DTYPES.get(described.get_dtype()), tuple(described.get_shape()))
    return {key: found[key] for key in keys}


def read_kept(not_built: NotBuilt, file_of: Mapping[str, str], key: str) -> Tensor:
    """A tensor that is kept, as it is exported: with the bytes of the original, or in bf16 where that is in FP8."""
    with opened(file_of[key]) as tensors:
        tensor = tensors.get_tensor(key)
    if tensor.dtype is not FP8:
        return tensor
    assert not_built.block is not None
    scales = f"{key}{SCALES_OF_FP8}"
    with opened(file_of[scales]) as tensors:
        return dequantize_blocks(tensor, tensors.get_tensor(scales), not_built.block).to(SERVED_DTYPE)
