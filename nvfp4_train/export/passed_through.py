"""Tensors of the original folder that no class builds, on their way to the export: read again from the original, one at a time."""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from nvfp4_train.export.readers.base import require
from nvfp4_train.export.readers.disk import PIECE_BYTES, StoredTensor
from nvfp4_train.export.shards import FileGroup
from nvfp4_train.models.folder import is_ignored
from nvfp4_train.models.layout import HubLayout, prefixes, shown
from nvfp4_train.models.not_built import KEPT_DTYPES, NotBuilt, describe, original_files, read_kept
from nvfp4_train.models.stored_dtypes import STORED_DTYPES
from nvfp4_train.parallel import in_threads


class PassedThrough:
    """The tensors that are kept of an original.

    Raises ValueError where the folder at `path` has not all of them, with the dtypes and shapes that it had when it was trained from.
    """

    def __init__(self, not_built: NotBuilt, path: str | None) -> None:
        self._not_built = not_built
        self.path = path
        what = (
            f"the export needs {len(not_built.kept)} tensors of the original folder that transformers does not build "
            f"({', '.join(f'{prefix}.*' for prefix in prefixes(not_built.kept))})"
        )
        way_out = "launch/export.py --original FOLDER says where it is, and --without-original leaves them out"
        try:
            self._file_of = original_files(path) if path is not None else {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{what}, but {path} could not be read: {error}; {way_out}") from error
        if missing := not_built.kept.keys() - self._file_of.keys():
            raise ValueError(f"{what}, but {path} has no {shown(missing)}; {way_out}")
        for key, (_, shape) in describe(self._file_of, list(not_built.kept)).items():
            if shape != not_built.kept[key][1]:
                raise ValueError(f"{what}, but {key} of {path} has the shape {shape}, not {not_built.kept[key][1]}; {way_out}")

    def on_meta(self) -> dict[str, Tensor]:
        """The tensors, on the meta device."""
        return self._not_built.on_meta()

    def read(self, key: str) -> Tensor:
        return read_kept(self._not_built, self._file_of, key)

    def file_groups(self) -> Iterator[FileGroup]:
        """The tensors module by module, file after file of the original."""
        tensors = self.on_meta()

        def load(keys: list[str]) -> Callable[[], dict[str, Tensor]]:
            return lambda: {key: self.read(key).contiguous() for key in keys}

        in_order = sorted(tensors, key=lambda key: (self._file_of[key], key))
        for _, keys in groupby(in_order, key=lambda key: (self._file_of[key], key.rpartition(".")[0])):
            of_one = list(keys)
            yield FileGroup(sum(tensors[key].nbytes for key in of_one), load(of_one))

    def check(self, stored: Mapping[str, StoredTensor]) -> int:
        """Compare the bytes on disk with the original. Raises ExportError. Returns the number of tensors."""

        def is_equal(key: str) -> bool:
            wanted = self.read(key).contiguous().view(-1).view(torch.uint8).numpy()
            return all(np.array_equal(piece, wanted[where]) for where, piece in stored[key].pieces(PIECE_BYTES))

        for key, equal in zip(self._not_built.kept, in_threads(is_equal, self._not_built.kept), strict=True):
            require("passed", equal, f"{key} differs from the tensor of {self.path}")
        return len(self._not_built.kept)


def passed_through_on_disk(layout: HubLayout, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of an exported folder that its class does not build, on the meta device, where the original is not known."""
    return {
        key: torch.empty(tensor.shape, dtype=STORED_DTYPES[tensor.dtype], device="meta")
        for key, tensor in stored.items()
        if key not in layout.hub_tensors and STORED_DTYPES.get(tensor.dtype) in KEPT_DTYPES and is_ignored(layout.model, key)
    }
