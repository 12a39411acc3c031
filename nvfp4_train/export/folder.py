"""Replace a folder in one step, so that its name always leads to a complete folder."""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvfp4_train.disk import disk_errors_named

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(folder: str | os.PathLike, overwrite: bool) -> Path:
    """The absolute path of a folder that may be written. FileExistsError where it exists and must not be replaced."""
    target = Path(os.path.realpath(folder))
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{target} exists; choose another folder or allow it to be replaced with overwrite")
        if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
            raise FileExistsError(f"{target} is not replaced: it holds no config.json, so it is not a model folder")
    return target


@contextmanager
def replacing_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside the target, that takes the target's name if the body succeeds and is removed if it fails.

    An old target is removed only after that. A process that is killed leaves `.NAME.partial-*` behind, never half a target. Raises
    DiskError, after the removal, where the body failed because the disk takes no more.
    """
    target = check_target(folder, overwrite)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with disk_errors_named(target, "the export"):
        try:
            partial.mkdir(parents=True)
            yield partial
            if target.exists():
                _exchange(partial, target)
            else:
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def partial_folders(parent: Path) -> list[Path]:
    """What killed processes left in a folder of the folders that `replacing_folder` was to make there."""
    return sorted(parent.glob(".*.partial-*"))


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, in one step where the system can."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "renameat2"):
            status = libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
            if status == 0:
                return
    # Some systems and file systems (NFS) have no exchange. Between these renames the old folder has another name.
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
