"""What a disk that takes no more is called: full, over its quota, read-only, or closed to this user."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvfp4_train.errors import RunError

_OF_RUST = re.compile(r"os error (\d+)")
"""Packages in Rust (safetensors, tokenizers) raise errors of their own, with the number in the text."""


OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors that the user can correct, whatever was written."""


class DiskError(RunError, OSError):
    """Something could not be written, for a reason that lies with the disk. Its message is one line."""


def find_errno(error: BaseException | None) -> int | None:
    """The number of the system's error that an error came from; None where it came from none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := _OF_RUST.search(str(error)):
            return int(found[1])
        # `torch.save` raises a RuntimeError of its own while it handles that of the file.
        error = error.__cause__ or error.__context__
    return None


def not_written(path: Path, what: str, error: BaseException) -> DiskError | None:
    """The error to raise where `what`, at the path, could not be written: one line that names the disk's state.

    None where the error did not come from the system, or has words of its own. Call it when what was written has been removed.
    """
    if isinstance(error, DiskError):
        return error
    number = None if isinstance(error, ValueError) else find_errno(error)
    if number is None:
        return None
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    if number == errno.ENOSPC:
        why = f"the disk of {folder} is full, with {shutil.disk_usage(folder).free / 1e6:,.1f} MB free"
    elif number == errno.EDQUOT:
        why = f"the quota on the disk of {folder} is used up"
    elif number == errno.EFBIG:
        why = f"the file is larger than {folder} or a limit of the system allows"
    elif number == errno.EROFS:
        why = f"the disk of {folder} is read-only"
    elif number in (errno.EACCES, errno.EPERM):
        why = f"permission denied for {getattr(error, 'filename', None) or folder}"
    else:
        why = str(error) if isinstance(error, OSError) else os.strerror(number)
    return DiskError(f"{why}: {what} was not written to {path}")


def disk_error(error: BaseException, folder: Path) -> str | None:
    """The line of `not_written` for an error of the system while a file below the folder was written; None for any other error."""
    if not isinstance(error, OSError) or find_errno(error) not in OF_THE_DISK:
        return None
    if isinstance(error, DiskError):
        return str(error)
    # The system names a file where it was opened, but not where it was written.
    is_named = isinstance(error.filename, str | bytes)
    path = Path(os.fsdecode(error.filename)) if is_named else folder
    return str(not_written(path, path.name if is_named else "a file of the run", error))


@contextmanager
def disk_errors_named(path: Path, what: str) -> Iterator[None]:
    """Raise DiskError, see `not_written`, for an error of the disk in the body."""
    try:
        yield
    except Exception as error:
        named = not_written(path, what, error)
        if named is None:
            raise
        raise named from error


def replace_file(path: Path, content: str | bytes, *, what: str) -> None:
    """Write a small file under a temporary name, and give it its own when it is whole. DiskError, see `not_written`, names `what`."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with disk_errors_named(path, what):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
