"""The files that hold a folder's weights, and whether they are whole, by their names, sizes and headers."""

import json
import zipfile
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from nvfp4_train.errors import one_line
from nvfp4_train.load_errors import LFS_POINTER, damaged_settings, lfs_pointer, reading

AGAIN = "download it again"


def safetensors_files(path: str, option: str = "model.path") -> list[str]:
    """Paths on this machine, downloaded if need be; none if the weights are stored in another way. Raises as `weight_files` does."""
    return _files(path, option, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def weight_files(path: str, option: str = "model.path") -> list[str]:
    """Paths on this machine, downloaded if need be: safetensors files, or else those of an older kind; none if there are none.

    Raises ValueError where one is missing or not whole.
    """
    return safetensors_files(path, option) or _files(path, option, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def check_folder(path: str, option: str = "model.path") -> None:
    """Raise ValueError where a file of a local folder is missing or not whole. Reads no weights; passes over a hub name."""
    if not Path(path).is_dir():
        return
    if damage := damaged_settings(path):
        raise ValueError(f"{option}={path!r}: {damage}")
    weight_files(path, option)


def _files(path: str, option: str, whole: str, index: str) -> list[str]:
    where = f"{option}={path!r}"
    with reading(where, path):
        if found := _find(path, whole):
            files = [found]
        elif found := _find(path, index):
            if not isinstance(json.loads(Path(found).read_text()).get("weight_map"), dict):
                raise ValueError(f"{found} has no weight_map; {AGAIN}")
            files = get_checkpoint_shard_files(path, found)[0]
        else:
            return []
    for file in files:
        if fault := _fault(Path(file), named_by=index if Path(found).name == index else None):
            raise ValueError(f"{where}: {fault}")
    return files


def _find(path: str, name: str) -> str | None:
    if (local := Path(path) / name).is_symlink() and not local.exists():
        raise ValueError(f"{local} is a link to a file that does not exist")
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)


def _fault(file: Path, *, named_by: str | None) -> str | None:
    """What is wrong with a file of weights, as far as its size and its header tell; None if nothing is."""
    if not file.exists():
        return f"{file.name}, which {named_by} names, is missing; {AGAIN}"
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(len(LFS_POINTER))
        if first == LFS_POINTER:
            return lfs_pointer(file)
        if file.suffix != ".safetensors":
            # Files of PyTorch before 1.6 are no archives.
            is_cut = not size or (first.startswith(b"PK") and not zipfile.is_zipfile(file))
            return f"{file} is cut short, at {size:,} bytes; {AGAIN}" if is_cut else None
        length = int.from_bytes(first[:8], "little")
        if size < 8 or length > size - 8:
            return f"{file} is no safetensors file, or cut short, at {size:,} bytes; {AGAIN}"
        opened.seek(8)
        try:
            header = json.loads(opened.read(length))
            end = (
                8
                + length
                + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return f"{file} is no safetensors file: its header is damaged ({one_line(error)}); {AGAIN}"
    if size != end:
        return f"{file} is {'cut short' if size < end else 'too long'}: its header says {end:,} bytes, it has {size:,}; {AGAIN}"
    return None
