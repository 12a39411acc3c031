"""One line for whatever the folder or hub name of a model or tokenizer fails with: what was asked for, the file, the way out."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from nvfp4_train.errors import one_line

SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.index.json")
"""Files of a folder that are JSON, as patterns."""

LFS_POINTER = b"version https://git-lfs"
"""What stands in a checkout of Git LFS in place of a file that was not fetched begins so."""

KNOWN = (OSError, ValueError, ImportError, SafetensorError, pickle.UnpicklingError, StrictDataclassError)
"""What the loaders raise for what the user can correct. All else is a fault, and a traceback."""


@contextmanager
def reading(what: str, path: str, *others: type[Exception]) -> Iterator[None]:
    """Raise ValueError in place of what a loader raises: `KNOWN` and `others`. `what` names the option, and begins the line."""
    try:
        yield
    except Exception as error:
        # `tokenizers` raises the class Exception itself. A damaged file may lead to anything.
        if not isinstance(error, (*KNOWN, *others)) and type(error) is not Exception and damaged_settings(path) is None:
            raise
        raise ValueError(f"{what}: {_fault(error, path)}") from error


def _fault(error: Exception, path: str) -> str:
    if found := damaged_settings(path):
        return found
    if isinstance(error, ImportError):
        return f"a package is not installed: {one_line(error)}"
    if isinstance(error, pickle.UnpicklingError):
        return "its pickled weights are damaged, or hold more than tensors, and are not loaded; bring them as safetensors"
    if isinstance(error, OSError) and (place := cache_of(error)):
        return f"the cache {place} cannot be used ({one_line(error)}); set HF_HOME to a folder that can be written"
    if isinstance(error, OSError) and not Path(path).exists():
        return f"could not be read as a local folder or reached as a hub name: {one_line(error)}"
    return one_line(error) if isinstance(error, KNOWN) else f"{type(error).__name__}: {one_line(error)}"


def damaged_settings(path: str) -> str | None:
    """What is wrong with the JSON files of a local folder; None if nothing is, or for a hub name."""
    for pattern in SETTINGS:
        for file in sorted(Path(path).glob(pattern)):
            if not file.exists():
                return f"{file} is a link to a file that does not exist"
            content = file.read_bytes()
            if content.startswith(LFS_POINTER):
                return lfs_pointer(file)
            try:
                settings = json.loads(content)
            except ValueError as error:
                return f"{file} is damaged: {one_line(error)}; download it again"
            if not isinstance(settings, dict):
                return f"{file} must hold a JSON object, got a {type(settings).__name__}"
    return None


def lfs_pointer(file: Path) -> str:
    return f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"


def cache_of(error: OSError) -> str | None:
    """The folder of Hugging Face's cache that an error is about; None if it is about another place."""
    if not isinstance(error.filename, str):
        return None
    place, cache = Path(error.filename), Path(constants.HF_HOME)
    return str(cache) if place.is_relative_to(cache) or cache.is_relative_to(place) else None
