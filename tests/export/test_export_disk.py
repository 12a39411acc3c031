"""A disk that takes no more ends an export with one line, and nothing is left of it."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from export_models import Trained
from safetensors import SafetensorError
from test_export_checkpoint import run_script, save_checkpoint

from nvfp4_train.errors import RunError
from nvfp4_train.export import shards
from nvfp4_train.export.convert import convert_folder
from nvfp4_train.export.folder import replacing_folder


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """The system ends the writing of larger files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_system_says_to_safetensors_is_named(
    cases: Callable[[str], Trained], own_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = own_copy("llama"), tmp_path / "out"
    for write in (
        lambda: cases("llama").export(out),
        lambda: convert_folder(source, out, to="modelopt"),
        lambda: convert_folder(source, out, to="bf16"),
    ):
        with files_up_to(20_000), pytest.raises(RunError) as caught:
            write()
        message = f"the file is larger than {tmp_path} or a limit of the system allows: the export was not written to {out}"
        assert str(caught.value) == message
        assert os.listdir(tmp_path) == ["llama"]


def test_a_full_disk_ends_the_script_with_one_line(
    cases: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    checkpoint = save_checkpoint(cases("llama"), tmp_path / "run" / "last.ckpt")
    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(SystemExit, match=rf"^error: the disk of {tmp_path} is full, with [\d,.]+ MB free: the export was not"):
        run_script(monkeypatch, checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(RunError, match=f"^the disk of {tmp_path} is read-only: the export was not written to {tmp_path}/out$"):
        replacing_folder(tmp_path / "out").__enter__()


@pytest.mark.parametrize("error", [ValueError("other words"), KeyError("other words")])
def test_what_did_not_come_from_the_disk_keeps_its_words(error: Exception, tmp_path: Path) -> None:
    if isinstance(error, ValueError):
        error.__cause__ = OSError(errno.EACCES, "of a file that was read")

    def write() -> None:
        with replacing_folder(tmp_path / "out"):
            raise error

    with pytest.raises(type(error), match="other words"):
        write()
    assert os.listdir(tmp_path) == []
