"""Checksums of the files of a checkpoint, made while they are written and checked on all cores.

The folder of a sharded checkpoint holds those of its files in `checksums.json`: a CRC-32 of every piece of 64 MiB. A checkpoint in one
file is a zip archive, which has a CRC-32 of every record.
"""

import errno
import io
import json
import os
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_train.parallel import in_threads

CHECKSUMS = "checksums.json"
PIECE_BYTES = 1 << 26
"""Bytes under one checksum, so that several threads can check a file."""
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Checksums:
    """Of a file."""

    num_bytes: int
    pieces: tuple[int, ...]
    """CRC-32 of each piece of `PIECE_BYTES`; the last may be shorter."""


class ChecksummedFile(io.BufferedWriter):
    """A new file that is on disk when it is closed, and knows the checksums of what was written, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._num_bytes = 0
        self._pieces: list[int] = []

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        super().write(rest)
        num_bytes = len(rest)
        while rest:
            filled = self._num_bytes % PIECE_BYTES
            if filled == 0:
                self._pieces.append(0)
            part = rest[: PIECE_BYTES - filled]
            self._pieces[-1] = zlib.crc32(part, self._pieces[-1])
            self._num_bytes += len(part)
            rest = rest[len(part) :]
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            try:
                self.flush()
                os.fsync(self.fileno())
            finally:
                super().close()

    @property
    def checksums(self) -> Checksums:
        return Checksums(self._num_bytes, tuple(self._pieces))


def write_checksums(folder: Path, files: Mapping[str, Checksums]) -> None:
    """Write the checksums of the files in a folder, by name."""
    listed = {name: {"bytes": file.num_bytes, "crc32": list(file.pieces)} for name, file in sorted(files.items())}
    content = {"files": listed, "crc32": _of_listing(listed)}
    with ChecksummedFile(folder / CHECKSUMS) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def read_checksums(folder: Path) -> dict[str, Checksums] | None:
    """The checksums of the files in a folder, by name. None where it has none, as older checkpoints. ValueError for damaged ones."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        listed = content["files"]
        if content["crc32"] != _of_listing(listed):
            raise ValueError("its checksum is another")
        return {name: Checksums(file["bytes"], tuple(file["crc32"])) for name, file in listed.items()}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{CHECKSUMS} does not have its checksum") from error


def _of_listing(listed: Any) -> int:
    return zlib.crc32(json.dumps(listed, sort_keys=True).encode())


def damaged_file(folder: Path, files: Mapping[str, Checksums]) -> str | None:
    """The name of the first file of a folder that does not have its size and checksums. None where all have them."""
    for name, file in files.items():
        if (folder / name).stat().st_size != file.num_bytes:
            return name
    pieces = [(name, number) for name, file in files.items() for number in range(len(file.pieces))]

    def is_damaged(piece: tuple[str, int]) -> bool:
        name, number = piece
        return _crc32(folder / name, number * PIECE_BYTES) != files[name].pieces[number]

    return next((name for (name, _), found in zip(pieces, in_threads(is_damaged, pieces), strict=True) if found), None)


def _crc32(path: Path, start: int) -> int:
    """Of the piece that begins there."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = PIECE_BYTES
        while left and (data := file.read(min(left, READ_BYTES))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
    return crc


def damaged_record(path: Path, *, without: str | None = None) -> str | None:
    """The name of the first record of a zip archive that does not have its checksum, without the archive's folder. None where all have.

    Records in a folder of the archive named `without` are not read.
    """
    # Since Python 3.12 threads that share an archive move each other's place in the file.
    own, opened = threading.local(), []

    def is_damaged(record: zipfile.ZipInfo) -> bool:
        try:
            if not hasattr(own, "archive"):
                own.archive = zipfile.ZipFile(path)
                opened.append(own.archive)
            with own.archive.open(record) as file:
                while file.read(READ_BYTES):
                    pass
        except DAMAGE as error:
            _reraise_error_of_the_disk(error)
            return True
        return False

    try:
        with zipfile.ZipFile(path) as archive:
            names = {record: record.filename.partition("/")[2] or record.filename for record in archive.infolist()}
        records = [record for record, name in names.items() if without is None or not name.startswith(f"{without}/")]
        found = zip(records, in_threads(is_damaged, records), strict=True)
        return next((names[record] for record, is_bad in found if is_bad), None)
    except DAMAGE as error:
        _reraise_error_of_the_disk(error)
        return "the directory of the archive"
    finally:
        for archive in opened:
            archive.close()


DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OverflowError, OSError)
"""What `zipfile` raises where the bytes of an archive were changed; OSError where that leads to a place before the first byte."""


def _reraise_error_of_the_disk(error: BaseException) -> None:
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        raise error
