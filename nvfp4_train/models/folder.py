"""The weights of a Hugging Face folder, read by rows: each rank of a sharded model reads its own rows only.

A model and its folder may differ in names (Mixtral's `mlp.gate` is `block_sparse_moe.gate` on disk) and in layout (a parameter with
the experts of a layer, [E, ...], is several tensors per expert on disk). Transformers has the reverse of that map, with which it
saves; it says where each row of a parameter is. `load_model`, which needs memory for the whole model, loads all else: tensors that
are joined in yet other ways, weights that are quantized or in other files than safetensors, and folders with other names than
transformers writes.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor, distributed
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nvfp4_train.load_errors import reading
from nvfp4_train.models.causal_lm import ModelConfig, empty_model, read_original, refuse_other_tensors
from nvfp4_train.models.sharding import local_rows
from nvfp4_train.models.weight_files import safetensors_files
from nvfp4_train.progress import progress
from nvfp4_train.quant.experts import held_rows_first
from nvfp4_train.quant.served import SERVED_DTYPE


@dataclass(frozen=True, kw_only=True)
class _ExpertPart:
    """A tensor on disk that is part of one expert's row of a parameter [E, ...]."""

    key: str
    """Name on disk of expert 0's tensor."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Strides of its elements in the row; `offset` is the place of the first."""
    offset: int

    def key_of(self, expert: int) -> str:
        # The number of the layer stands before that of the expert.
        before, after = self.key.rsplit(".0.", 1)
        return f"{before}.{expert}.{after}"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows of a tensor on disk, or all of it, and where they go."""

    key: str
    rows: slice | None
    target: Tensor


def open_folder(
    config: ModelConfig, compute_dtype: torch.dtype = SERVED_DTYPE
) -> "tuple[PreTrainedModel, FolderWeights] | None":
    """The model of `model.path` without memory for its parameters, and the weights to fill it with once it is sharded.

    Returns None where the weights cannot be read by rows, see the module's docstring. Raises ValueError where a tensor is missing,
    unexpected or of another shape.
    """
    hf_config, quantization = read_original(config)
    # Configs may name files of their own.
    names_files = getattr(type(hf_config), "extra_files", ()) or getattr(hf_config, "transformers_weights", None)
    if config.path is None or quantization or names_files or not (files := safetensors_files(config.path)):
        return None
    model = empty_model(config, compute_dtype)
    weights = FolderWeights(config.path, files)
    return (model, weights) if weights.find_all_of(model) else None


class FolderWeights:
    """Tensors in the safetensors files of `path`, and which of them make up each tensor of a model."""

    def __init__(self, path: str, files: list[str]) -> None:
        self.path = path
        self._file_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with reading(f"model.path={path!r}: {file}", path), safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    self._file_of[key] = file
                    self._shapes[key] = tuple(opened.get_slice(key).get_shape())
        self._key_of: dict[str, str] = {}
        """Name on disk by name in the model, for tensors that are the same in both."""
        self._experts: dict[str, list[_ExpertPart]] = {}
        """Parts of an expert parameter by its name in the model."""
        self._copies: dict[str, str] = {}
        """Second copies of tied tensors: key on disk -> name of the first in the model."""

    def find_all_of(self, model: PreTrainedModel) -> bool:
        """Find every tensor of a model by name and shape. Returns whether all can be read by rows. Raises as `open_folder` does."""
        aliases = model.all_tied_weights_keys
        state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in aliases}
        required = dict(revert_weight_conversion(model, state))
        if not self._find_layout(model, state, required):
            return False
        for alias, name in aliases.items():
            (key,) = revert_weight_conversion(model, {alias: state[name]})
            source = self._key_of[name]
            if key in self._file_of and source in self._file_of:
                self._copies[key] = name
            elif key in self._file_of:
                required[key] = required.pop(source)
                self._key_of[name] = key
        missing = required.keys() - self._file_of.keys()
        unexpected = {key for key in self._file_of.keys() - required.keys() - self._copies.keys() if not is_ignored(model, key)}
        if missing and unexpected:
            # The names may be those of an older transformers, or of the authors. Transformers may know how to rename them.
            return False
        others = [
            f"{key} {self._shapes[key]} instead of {tuple(tensor.shape)}"
            for key, tensor in required.items()
            if key not in missing and self._shapes[key] != tensor.shape
        ]
        refuse_other_tensors(self.path, missing, unexpected, others)
        return True

    def _find_layout(self, model: PreTrainedModel, state: Mapping[str, Tensor], required: Mapping[str, Tensor]) -> bool:
        """Find the tensors on disk that make up each tensor of a model. Returns whether all can be read by rows."""
        names = {id(tensor): name for name, tensor in state.items()}
        self._key_of = {names[id(tensor)]: key for key, tensor in required.items() if id(tensor) in names}
        found = set(self._key_of.values())
        for name in state.keys() - self._key_of.keys():
            self._experts[name] = _expert_parts(model, name, state[name])
            found |= {part.key_of(expert) for part in self._experts[name] for expert in range(len(state[name]))}
        return found == required.keys() and all(self._experts.values())

    @torch.no_grad()
    def read_into(self, model: PreTrainedModel) -> None:
        """Fill this rank's rows of every tensor, cast to its dtype. At any time only the rows read from one file are mapped."""
        state, rows_first = model.state_dict(), held_rows_first(model)
        by_file: dict[str, list[_Piece]] = defaultdict(list)
        for name in self._key_of | self._experts:
            for piece in self._pieces(name, state[name], name in rows_first):
                by_file[self._file_of[piece.key]].append(piece)
        total = sum(piece.target.numel() for pieces in by_file.values() for piece in pieces)
        with progress("loading", total=total, unit="weights", is_shown=_is_first_rank()) as bar:
            for file, pieces in by_file.items():
                with safe_open(file, "pt") as opened:
                    for piece in pieces:
                        piece.target.copy_(_read(opened, piece))
                        bar.advance(piece.target.numel())
        self._check_copies(state)

    def _pieces(self, name: str, tensor: Tensor, is_rows_first: bool) -> Iterator[_Piece]:
        rows, first = local_rows(tensor)
        if name in self._key_of and rows.numel():
            own = slice(first, first + len(rows)) if rows.dim() else None
            yield _Piece(key=self._key_of[name], rows=own, target=rows.mT if is_rows_first else rows)
        for index, row in enumerate(rows if name in self._experts else ()):
            for part in self._experts[name]:
                places = [*part.stride, part.offset]
                if is_rows_first:
                    # Element (k, n) of the class, whose place is k N + n, is held as (n, k).
                    num_rows, num_inputs = row.shape
                    places = [place % num_rows * num_inputs + place // num_rows for place in places]
                target = row.as_strided(part.shape, places[:-1], row.storage_offset() + places[-1])
                yield _Piece(key=part.key_of(first + index), rows=None, target=target)

    def _check_copies(self, state: Mapping[str, Tensor]) -> None:
        for key, name in self._copies.items():
            rows, first = local_rows(state[name])
            with safe_open(self._file_of[key], "pt") as opened:
                copy = _read(opened, _Piece(key=key, rows=slice(first, first + len(rows)), target=rows))
                if self._shapes[key] != state[name].shape or not rows.equal(copy.to(rows)):
                    raise ValueError(
                        f"model.path={self.path!r}: {key} and {self._key_of[name]} differ, but its config ties them; set "
                        "tie_word_embeddings to false there"
                    )


def _is_first_rank() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _read(opened: safe_open, piece: _Piece) -> Tensor:
    return opened.get_tensor(piece.key) if piece.rows is None else opened.get_slice(piece.key)[piece.rows]


def _expert_parts(model: PreTrainedModel, name: str, parameter: Tensor) -> list[_ExpertPart]:
    """Where one expert's tensors on disk lie in its row of a parameter [E, ...]; empty if strides cannot describe that."""
    if parameter.dim() < 3 or (row_numel := parameter[0].numel()) >= 2**31:
        return []
    # Transformers rearranges the indices of the elements as it would the elements.
    numbers = torch.arange(row_numel, dtype=torch.int32).view(1, *parameter.shape[1:])
    parts = []
    for key, part in revert_weight_conversion(model, {name: numbers}).items():
        offset = int(part.flatten()[0])
        stride = tuple(int(part.select(dim, -1).flatten()[0]) - offset for dim in range(part.dim()))
        stride = tuple(span // max(1, size - 1) for span, size in zip(stride, part.shape, strict=True))
        if ".0." not in key or not part.equal(numbers.as_strided(part.shape, stride, offset)):
            return []
        parts.append(_ExpertPart(key=key, shape=tuple(part.shape), stride=stride, offset=offset))
    return parts if sum(math.prod(part.shape) for part in parts) == row_numel else []


def is_ignored(model: PreTrainedModel, key: str) -> bool:
    """Whether transformers drops a tensor on disk: one of another part of a published model, or a buffer that once was saved."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    return any(re.search(pattern, key) for pattern in patterns)
