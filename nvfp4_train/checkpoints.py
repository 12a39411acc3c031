"""Training checkpoints on disk: which of them is the newest that a run can continue from, and what they hold.

A replicated model writes a file, by `torch.save`. A sharded model writes a folder: the shards of weights and optimizer states in the
format of torch.distributed.checkpoint, and everything else in `meta.pt`. Both are read alike, and without a process group.

Reading runs no code that a checkpoint names. torch.distributed.checkpoint itself would: its index is a pickle, and so are the values
that are no tensors.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, Metadata, ReadItem
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from nvfp4_train.checksums import damaged_file, damaged_record, read_checksums

SHARDED_STATE = "meta.pt"
"""File in the folder of a sharded checkpoint, under Lightning's name, with everything that is not sharded."""
INDEX = ".metadata"
"""The index of its shards, as torch.distributed.checkpoint names it."""
ZIP_BEGIN = b"PK\x03\x04"
SET_ASIDE = "set-aside"
"""Folder among checkpoints with those that no run continues from, nor replaces."""
PARTIAL_SUFFIX = ".partial"
"""Suffix of the name of a checkpoint that is being written, see `saving`."""
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
)
"""What reading a damaged or foreign file raises: `torch.load`, `zipfile` and the unpickler of an index, on files damaged at random.

An error of the disk, OSError, is not among them.
"""


@dataclass(frozen=True)
class CheckpointFacts:
    """What a path holds."""

    path: Path
    step: int | None
    """The optimizer step. None where nothing tells it."""
    fault: str | None = None
    """Why no run can continue from it, as the end of a sentence that begins with the path. None where one can."""

    def __str__(self) -> str:
        return f"{self.path} {self.fault or f'holds step {self.step}'}"


CUT_SHORT = "was cut short"
NO_CHECKPOINT = "is no checkpoint of a run"
WEIGHTS_ONLY = "holds weights only, no state of the optimizer"


def inspect_checkpoint(path: Path, *, verify: bool = True) -> CheckpointFacts:
    """What a path holds. With `verify` all of it is read, on all cores, and compared with its checksums; else no weights are read."""
    if path.name.endswith(PARTIAL_SUFFIX):
        return CheckpointFacts(path, None, CUT_SHORT)
    if not path.exists():
        return CheckpointFacts(path, None, "does not exist")
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if damage := None if is_empty_folder else find_damage(path, verify=verify):
        return CheckpointFacts(path, None, damage)
    state = path / SHARDED_STATE if path.is_dir() else path
    if is_empty_folder or not zipfile.is_zipfile(state):
        return CheckpointFacts(path, None, NO_CHECKPOINT)
    try:
        found = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        return CheckpointFacts(path, None, f"{NO_CHECKPOINT}: {first_line(error)}")
    step = found.get("global_step") if isinstance(found, dict) else None
    if not isinstance(step, int):
        return CheckpointFacts(path, None, NO_CHECKPOINT)
    # Lightning leaves them out with save_weights_only, and has a list of them where there is no optimizer, too.
    return CheckpointFacts(path, step, None if "lr_schedulers" in found else WEIGHTS_ONLY)


def find_damage(path: Path, *, verify: bool = True) -> str | None:
    """What of a checkpoint is missing or was changed, as the end of a sentence that begins with the path. None where it is whole.

    With `verify` all of it is read, on all cores, and compared with its checksums. Checkpoints of older versions have none for shards.
    """
    try:
        return _damage_of_folder(path, verify) if path.is_dir() else _damage_of_file(path, verify)
    except UNREADABLE as error:
        return f"is damaged: {first_line(error)}"


def saved_step(path: Path) -> int | None:
    """The optimizer step of a checkpoint file or folder; None where it was cut short, or is none of ours. Reads no weights."""
    return inspect_checkpoint(path, verify=False).step


def newest_complete(folder: Path, *, verify: bool = True) -> tuple[Path | None, list[CheckpointFacts]]:
    """The checkpoint of the highest step in a folder that a run can continue from, and those that were passed over, by name.

    With `verify` the newest is read as a whole, see `inspect_checkpoint`, and those before it where it is damaged.
    """
    # A name with a metric (step=8-val/loss=3.1.ckpt) makes a folder.
    paths = [path for path in sorted(folder.rglob("*.ckpt")) if SET_ASIDE not in path.relative_to(folder).parts]
    found = [inspect_checkpoint(path, verify=False) for path in paths]
    passed_over = [facts for facts in found if facts.fault]
    newest = None
    for facts in sorted((facts for facts in found if not facts.fault), key=lambda facts: facts.step or 0, reverse=True):
        if verify:
            facts = inspect_checkpoint(facts.path)
        if not facts.fault:
            newest = facts.path
            break
        passed_over.append(facts)
    partial = [inspect_checkpoint(path) for path in folder.rglob(f"*.ckpt{PARTIAL_SUFFIX}")]
    return newest, sorted(passed_over + partial, key=lambda facts: facts.path)


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        begin = file.read(len(ZIP_BEGIN))
    return begin == ZIP_BEGIN[: len(begin)]


def _damage_of_file(path: Path, verify: bool) -> str | None:
    # The directory of a zip archive stands at its end, so a file without it was cut short.
    if not zipfile.is_zipfile(path):
        return f"{CUT_SHORT}: its end is missing, or damaged" if _begins_as_zip(path) else None
    record = damaged_record(path, without=None if verify else "data")
    return f"is damaged: {record} does not have its checksum" if record else None


def _damage_of_folder(path: Path, verify: bool) -> str | None:
    files = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    if not files.keys() & {SHARDED_STATE, INDEX} and not any(name.endswith(".distcp") for name in files):
        # The folder of a run, say.
        return None
    for name in (SHARDED_STATE, INDEX):
        if not files.get(name):
            return f"{CUT_SHORT}: {name} is {'empty' if name in files else 'missing'}"
    checksums = read_checksums(path) or {}
    for name, file in checksums.items():
        if files.get(name, 0) < file.num_bytes:
            has = f"has {files[name]} of {file.num_bytes} bytes" if name in files else "is missing"
            return f"{CUT_SHORT}: {name} {has}"
    checked = checksums if verify else {name: checksums[name] for name in (SHARDED_STATE, INDEX) if name in checksums}
    if damaged := damaged_file(path, checked):
        return f"is damaged: {damaged} does not have its checksum"
    if not zipfile.is_zipfile(path / SHARDED_STATE):
        return f"{CUT_SHORT}: {SHARDED_STATE} has no end"
    return _cut_short(path)


def _cut_short(folder: Path) -> str | None:
    """What is wrong where a piece that the index of a sharded checkpoint names does not lie within its file."""
    try:
        for piece in (SafeReader(folder).read_metadata().storage_data or {}).values():
            file = folder / piece.relative_path
            if not file.is_file():
                return f"{CUT_SHORT}: {file.name} is missing"
            if file.stat().st_size < piece.offset + piece.length:
                return f"{CUT_SHORT}: {file.name} has {file.stat().st_size} of at least {piece.offset + piece.length} bytes"
    except (FileNotFoundError, *UNREADABLE):
        return f"{CUT_SHORT}: {INDEX} is missing, or cannot be read"
    return None


def _refuse_cut_short(folder: Path) -> None:
    if fault := _cut_short(folder):
        raise ValueError(f"{folder} {fault}")


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, or its kind where it has none."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether the path is the folder of a sharded checkpoint."""
    return (path / SHARDED_STATE).is_file()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as a file holds it, on the CPU. Tensors of a file stay on disk until they are used, those of a folder do not."""
    if not is_sharded_checkpoint(path):
        # Only the zip format can be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    _refuse_cut_short(path)
    checkpoint = read_rest(path)
    state: dict[str, Any] = {}
    try:
        _load_state_dict(state, storage_reader=SafeReader(path), planner=_EmptyPlanner(), no_dist=True)
        checkpoint["state_dict"] = state.pop("state_dict")
        checkpoint["optimizer_states"] = [by_number(state[f"optimizer_{index}"]) for index in range(len(state))]
    except (CheckpointException, *UNREADABLE) as error:
        raise ValueError(f"the checkpoint {path} could not be loaded: {first_failure(error)}") from error
    return checkpoint


def first_failure(error: BaseException) -> BaseException:
    """What went wrong first where torch.distributed.checkpoint collected the errors of all ranks; else the error itself."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def read_rest(folder: Path) -> dict[str, Any]:
    """The part of a sharded checkpoint that is not sharded."""
    return torch.load(folder / SHARDED_STATE, map_location="cpu", weights_only=True)


def read_unsharded(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside shards, of either kind. Tensors of a file stay on disk until they are used."""
    return read_rest(path) if is_sharded_checkpoint(path) else read_checkpoint(path)


def shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name; () for a value of another kind."""
    return {name: tuple(getattr(value, "shape", ())) for name, value in state_dict.items()}


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """`shapes` of the weights of a sharded checkpoint, from its index."""
    prefix = "state_dict."
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    return {key.removeprefix(prefix): tuple(getattr(entries[key], "size", ())) for key in entries if key.startswith(prefix)}


def check_same_weights(path: Path, saved: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where the shapes in a checkpoint, by name, are not those of the model that is to take its weights."""
    for name in {**ours, **saved}:
        if saved.get(name) != ours.get(name):
            there, here = saved.get(name, "missing"), ours.get(name, "missing")
            options = "quant.*" if name.startswith("quant_state.") else "model.*"
            if name.startswith("quant_state.") and name.endswith(".history"):
                options = "callbacks.oscillation.action"
            raise ValueError(
                f"the checkpoint {path} was saved with another model: {name} is {there} there and {here} here; "
                f"set {options} as in the run that saved it"
            )


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(index_types, name, None) if module == index_types.__name__ else None
        if (
            (isinstance(found, type) and found.__module__ == module)
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
            or (module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"))
            or (module, name) in _INDEX_NAMES
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index of a sharded checkpoint must not name {module}.{name}")


_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


class SafeReader(FileSystemReader):
    """Reads an index that names only the types which an index consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or index_types.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """Reads values that are no tensors with weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class SavedTensors(Mapping[str, Tensor]):
    """Tensors of a sharded checkpoint, on the CPU; each is read from its shards whenever it is asked for, and not kept.

    The keys are the names in the checkpoint that begin with `prefix`, without it. Raises ValueError, which names the folder, where
    shards are missing or one cannot be read.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        _refuse_cut_short(folder)
        self._reader = SafeReader(folder)
        self._index = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        self._folder = folder
        self._prefix = prefix
        self._entries: dict[str, index_types.TensorStorageMetadata] = {}
        for key, entry in self._index.state_dict_metadata.items():
            if key.startswith(prefix):
                if not isinstance(entry, index_types.TensorStorageMetadata):
                    raise ValueError(f"{folder} must hold tensors only under {prefix}, got a value of another kind for {key}")
                self._entries[key.removeprefix(prefix)] = entry

    def meta(self, name: str) -> Tensor:
        """A tensor on the meta device with the shape and the dtype of the saved one, which is not read."""
        entry = self._entries[name]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.meta(name), device="cpu")
        planner = SafePlanner(flatten_state_dict=False)
        planner.set_up_planner({self._prefix + name: tensor}, self._index)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except UNREADABLE as error:
            raise ValueError(f"{name} could not be read from the shards of {self._folder}: {error}") from error
        return tensor

    # Mapping's own would read the tensor.
    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _EmptyPlanner(SafePlanner, _EmptyStateDictLoadPlanner):
    """Also takes the names and sizes from the checkpoint."""


def by_number(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """Convert an optimizer's state from parameter names to parameter numbers, as `torch.optim.Optimizer` has them."""
    names = [name for group in optimizer_state["param_groups"] for name in group["params"]]
    return _renamed(optimizer_state, {name: number for number, name in enumerate(names)})


def by_name(optimizer_state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Inverse of `by_number`; `names` are those of the optimizer's parameters in its own order."""
    return _renamed(optimizer_state, dict(enumerate(names)))


def _renamed(optimizer_state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    return {
        "state": {names[key]: state for key, state in optimizer_state["state"].items()},
        "param_groups": [
            group | {"params": [names[key] for key in group["params"]]} for group in optimizer_state["param_groups"]
        ],
    }
