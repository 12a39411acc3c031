"""The tensors of a plain bf16 folder, laid out as the authors of the model published it, from those of an NVFP4 folder.

So readers that know the model, and no NVFP4 of its kind, load them: experts are one tensor again where they were published as one.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nvfp4_train.export.masters import rows_at_once
from nvfp4_train.export.packed_folder import PackedFolder
from nvfp4_train.export.shards import FileGroup
from nvfp4_train.export.values import Packed
from nvfp4_train.kernels.fp4_kernel import fp4_dequantize
from nvfp4_train.quant.served import SERVED_DTYPE

Decode = Callable[[PackedFolder, str], Tensor]
"""Decodes the weight of a quantized module, by name on disk, to bf16 [N, K]."""


def decode(folder: PackedFolder, module: str) -> Tensor:
    """By the operator that training uses."""
    (codes,), (block_scales,), (s2,), _ = folder.weight(module)
    num_rows = rows_at_once(2 * codes.shape[1])
    pieces = zip(codes.split(num_rows), block_scales.split(num_rows), strict=True)
    return torch.cat([fp4_dequantize(*piece, s2, dtype=SERVED_DTYPE) for piece in pieces])


def decode_by_reader(folder: PackedFolder, module: str) -> Tensor:
    """By the reader of the format, in NumPy."""
    reader = folder.reader
    codes, scales = (folder.part(module, part) for part in (reader.codes, reader.block_scales))
    stored_scale = folder.part(module, reader.stored_scale).bytes().view(np.float32)[0]
    bits = Packed(reader, codes, scales, stored_scale).decode_all()
    return torch.from_numpy(bits.view(np.int16)).view(SERVED_DTYPE)


class Unpacked:
    """The tensors of the plain folder, by name on disk."""

    def __init__(self, folder: PackedFolder, decode: Decode) -> None:
        self._folder = folder
        self._decode = decode
        self._bundles = folder.published.bundles

    def keys(self) -> set[str]:
        return {key for keys in self._bundles.values() for key in keys} | self._not_built()

    def file_groups(self) -> Iterator[FileGroup]:
        """The tensors of every bundle, and then those that no class builds."""
        sizes = self._folder.published.hub_tensors
        for names, keys in self._bundles.items():
            yield FileGroup(sum(sizes[key].nbytes for key in keys), partial(self._load, names))
        for key in sorted(self._not_built()):
            yield FileGroup(self._folder.stored[key].num_bytes, partial(self._alone, key))

    def _not_built(self) -> set[str]:
        return set(self._folder.layout.not_built)

    def _alone(self, key: str) -> dict[str, Tensor]:
        return {key: self._folder.tensor(key)}

    def _load(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        folder = self._folder
        if all(key in folder.stored and folder.parts_of(key) is None for key in self._bundles[names]):
            return {key: folder.tensor(key) for key in self._bundles[names]}
        # A quantized weight is a bundle of its own, and so are biases that lie beside matrices of experts.
        (name,) = names
        whole = torch.empty(folder.layout.tensors[name].shape, dtype=folder.published.served_dtype(name))
        for key, part in folder.layout.to_hub({name: whole}).items():
            module = key.removesuffix(".weight")
            part.copy_(self._decode(folder, module) if module in folder.quantized and key != module else folder.tensor(key))
        weight = folder.published.experts.get(name)
        in_class = whole.mT if weight is not None and weight.is_transposed else whole
        return {key: tensor.contiguous() for key, tensor in folder.published.to_hub({name: in_class}).items()}
