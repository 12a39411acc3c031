"""The bytes of a file, decompressed as its suffix says. What cannot be read is a `ReadError` with the file's name."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nvfp4_train.load_errors import LFS_POINTER

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_CHUNK_BYTES = 1 << 17
_POINTER_BYTES = 1024


class ReadError(ValueError):
    """A file, or a row of it, is not what it should be. The message names both."""


@contextmanager
def opened(file: str) -> Iterator[BinaryIO]:
    """`file` opened for reading its decompressed bytes. Raises ReadError, also for what goes wrong while it is being read."""
    try:
        with Path(file).open("rb") as raw:
            start = raw.peek(_POINTER_BYTES)[:_POINTER_BYTES]
            if len(start) < _POINTER_BYTES and start.startswith(LFS_POINTER):
                raise ReadError(f"{file} is a pointer of Git LFS in place of the data; fetch it with `git lfs pull`")
            suffix = Path(file).suffix.lower()
            if suffix in COMPRESSIONS and not start:
                raise ReadError(f"{file} is cut short: it has no bytes. Get a whole copy of it.")
            with _decompressed(raw, suffix) as stream:
                yield stream
    except ReadError:
        raise
    except EOFError as error:
        raise ReadError(f"{file} is cut short: {error}. Get a whole copy of it.") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise ReadError(f"{file} cannot be read: {error}") from error


def read_text(file: str) -> str:
    """The whole of a text file, without the byte order mark that some editors put first."""
    with opened(file) as stream:
        content = stream.read()
    return decode(content.removeprefix(BYTE_ORDER_MARK), file)


def decode(content: bytes, place: str) -> str:
    """`content` as UTF-8 text; `place` is the file, or its row, for the error."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReadError(
            f"{place} is not UTF-8 text: byte {content[error.start]:#04x} at position {error.start}. Convert it to UTF-8."
        ) from error


def _decompressed(raw: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), _CHUNK_BYTES)
    return raw


class _ZstdStream(io.RawIOBase):
    """The frames of a zstd file, one after the other. The reader of the package itself takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ReadError(f"{raw.name} is read with the package zstandard; install it: pip install zstandard") from error
        self._raw = raw
        self._error = zstandard.ZstdError
        # Frames written with `zstd --long=31` need a window of 2 GiB.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            try:
                if not self._advance():
                    return 0
            except self._error as error:
                raise OSError(f"damaged zstd data: {error}") from error
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _advance(self) -> bool:
        """Decompress the next piece. Returns False at the end of the file."""
        unused = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        piece = unused or self._raw.read(_CHUNK_BYTES)
        if not piece:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the last zstd frame has no end")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        self._output = memoryview(self._frame.decompress(piece))
        return True
