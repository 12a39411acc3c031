"""Which checkpoint of a run is the newest one that was written to its end."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

_SHARDED_STATE = "meta.pt"
"""What Lightning writes last into the folder of a sharded checkpoint: everything that is not sharded."""


def saved_step(path: Path) -> int | None:
    """The optimizer step of a checkpoint file or folder; None where it was cut short. Reads no weights."""
    state = path / _SHARDED_STATE if path.is_dir() else path
    # The directory of a zip archive stands at its end, so a file without it was cut short.
    if not state.is_file() or not zipfile.is_zipfile(state) or (path.is_dir() and not _has_all_shards(path)):
        return None
    return torch.load(state, map_location="cpu", weights_only=True, mmap=True)["global_step"]


def newest_complete(folder: Path) -> tuple[Path | None, list[Path]]:
    """The complete checkpoint of the highest step in a folder, and the ones that were cut short."""
    steps = {path: saved_step(path) for path in sorted(folder.glob("*.ckpt"))}
    complete = {path: step for path, step in steps.items() if step is not None}
    newest = max(complete, key=lambda path: complete[path]) if complete else None
    return newest, [path for path in steps if path not in complete]


def _has_all_shards(folder: Path) -> bool:
    """Every piece that the index of a sharded checkpoint names lies within its file."""
    try:
        index = FileSystemReader(folder).read_metadata()
    except (FileNotFoundError, EOFError, pickle.UnpicklingError):
        return False
    return all(
        (folder / piece.relative_path).is_file()
        and (folder / piece.relative_path).stat().st_size >= piece.offset + piece.length
        for piece in (index.storage_data or {}).values()
    )
