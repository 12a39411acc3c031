"""Training checkpoints are written under another name, so that a name leads to a complete checkpoint or to none.

NAME.partial becomes NAME when all of it is on disk. A process that is killed meanwhile leaves NAME.partial behind.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

from nvfp4_train.checkpoints import PARTIAL_SUFFIX, SHARDED_STATE


def save_file(content: Any, path: Path) -> None:
    """`torch.save`, complete and on disk when the path appears."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    remove(partial)
    _save_synced(content, partial)
    _publish(partial, path)


def remove(path: Path) -> None:
    """Delete a checkpoint of either kind, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class ShardedWriter(FileSystemWriter):
    """Writes the folder of a sharded checkpoint, which takes its name when the last rank has written its shards."""

    def __init__(self, path: Path) -> None:
        super().__init__(_partial(path))
        self._target = path

    def start(self, rest: Any) -> None:
        """Write what is not sharded. Call it on rank 0, before any rank writes."""
        remove(_partial(self._target))
        _partial(self._target).mkdir(parents=True)
        _save_synced(rest, _partial(self._target) / SHARDED_STATE)

    def finish(self, *args: Any, **kwargs: Any) -> None:
        # Called on rank 0, with the results of all ranks; the other ranks wait for its end.
        super().finish(*args, **kwargs)
        _publish(_partial(self._target), self._target)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)


def _save_synced(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, path: Path) -> None:
    if partial.is_dir() or path.is_dir():
        # A folder cannot replace another. Until the new one has its name, the earlier checkpoint has another name.
        earlier = path.with_name(f"replaced-{path.name}")
        if path.exists() or path.is_symlink():
            remove(earlier)
            path.rename(earlier)
        partial.rename(path)
        remove(earlier)
    else:
        partial.replace(path)
