"""Training checkpoints are written under another name, so that a name leads to a complete checkpoint or to none.

NAME.partial becomes NAME when all of it is on disk. A process that is killed meanwhile leaves NAME.partial behind. A full disk
does not. The files of a sharded checkpoint get checksums while they are written, see `checksums`.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nvfp4_train.checkpoints import (
    PARTIAL_SUFFIX,
    SET_ASIDE,
    SHARDED_STATE,
    first_failure,
    first_line,
    inspect_checkpoint,
    newest_complete,
)
from nvfp4_train.checksums import ChecksummedFile, Checksums, write_checksums
from nvfp4_train.disk import DiskError, find_errno, not_written


def save_file(content: Any, path: Path) -> None:
    """`torch.save`, complete and on disk when the path appears. DiskError where the disk does not take it; nothing is left then."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        with ChecksummedFile(partial) as file:
            torch.save(content, file)
        _publish(partial, path)
    except Exception as error:
        with suppress(OSError):
            remove(partial)
        named = _not_saved(path, content.get("global_step"), error)
        if named is None:
            raise
        raise named from error


def remove(path: Path) -> None:
    """Delete a checkpoint of either kind, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_checkpoint(path: Path, target: Path) -> None:
    """Give a checkpoint of either kind a second name. Both share the bytes on disk, where the disk can do that."""
    partial = _partial(target)
    remove(partial)
    if path.is_dir():
        shutil.copytree(path, partial, copy_function=_link)
    else:
        _link(path, partial)
    _publish(partial, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def set_aside(path: Path) -> Path:
    """Move a checkpoint into the folder `SET_ASIDE` beside it, where no run looks for one or replaces one. Returns where it is."""
    target, number = path.parent / SET_ASIDE / path.name, 0
    while target.exists():
        number += 1
        target = target.with_name(f"{path.stem}.{number}{path.suffix}")
    target.parent.mkdir(exist_ok=True)
    return path.rename(target)


def remove_partials(folder: Path) -> list[Path]:
    """Delete what killed processes left of checkpoints, and return the paths. No other run may write to the folder."""
    partials = sorted(folder.rglob(f"*.ckpt{PARTIAL_SUFFIX}"))
    for path in partials:
        remove(path)
    return partials


class ShardedWriter(FileSystemWriter):
    """Writes the folder of a sharded checkpoint, which takes its name when the last rank has written its shards."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        # The files are synced when they are closed.
        super().__init__(_partial(path), sync_files=False)
        self.fs = self._files = _ChecksummedFiles()
        self._target = path
        self._step = step

    def start(self, rest: Mapping[str, Any]) -> None:
        """Write what is not sharded. Call it on rank 0, before any rank writes."""
        remove(_partial(self._target))
        _partial(self._target).mkdir(parents=True)
        with self._files.create_stream(_partial(self._target) / SHARDED_STATE, "wb") as file:
            torch.save(rest, file)

    def write_data(self, *args: Any, **kwargs: Any) -> Future[list[WriteResult]]:
        try:
            results: list[WriteResult] = super().write_data(*args, **kwargs).wait()
        except Exception as error:
            number = find_errno(error)
            if number is None:
                raise
            # Of an error that goes to another rank, the one that caused it is lost.
            raise OSError(number, first_line(error)) from error
        if results:
            results[0] = _WithChecksums(**vars(results[0]), checksums=dict(self._files.checksums))
        finished: Future[list[WriteResult]] = Future()
        finished.set_result(results)
        return finished

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        # Called on rank 0, with the results of all ranks; the other ranks wait for its end.
        super().finish(metadata, results)
        checksums = dict(self._files.checksums)
        for result in (result for of_rank in results for result in of_rank if isinstance(result, _WithChecksums)):
            checksums |= result.checksums
        write_checksums(_partial(self._target), checksums)
        _publish(_partial(self._target), self._target)

    def failure(self, error: BaseException) -> Exception:
        """The error to raise where writing failed on any rank, and no rank writes any more: DiskError where the disk is the reason.

        Removes what was written, from every rank: the first to raise may end the others.
        """
        shutil.rmtree(_partial(self._target), ignore_errors=True)
        return _not_saved(self._target, self._step, first_failure(error)) or RuntimeError(
            f"the checkpoint {self._target} could not be written; an earlier one is kept, and ckpt_path=auto continues from it"
        )


@dataclass(frozen=True)
class _WithChecksums(WriteResult):
    """The first of a rank's results, with the checksums of the rank's files by name."""

    checksums: Mapping[str, Checksums]


class _ChecksummedFiles(FileSystem):
    """Files that are written once."""

    def __init__(self) -> None:
        self.checksums: dict[str, Checksums] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with ChecksummedFile(Path(path)) as file:
            yield file
        self.checksums[Path(path).name] = file.checksums

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


def _not_saved(path: Path, step: int | None, error: BaseException) -> DiskError | None:
    what = "the checkpoint" if step is None else f"the checkpoint of step {step}"
    named = not_written(path, what, error)
    if named is None:
        return None
    kept, _ = newest_complete(path.parent, verify=False)
    if kept is None:
        return DiskError(f"{named}; there is no earlier one")
    return DiskError(f"{named}; {kept.name} of step {inspect_checkpoint(kept, verify=False).step} is kept")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)


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
