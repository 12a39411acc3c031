"""Formats by name: NAME is the file formats/NAME.py, which writes it, and readers/NAME.py, which reads it back.

A new format is these two files; nothing lists them. A format that an existing reader can read names that reader, and is one file.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from nvfp4_train.export import formats, readers
from nvfp4_train.export.formats.base import Format
from nvfp4_train.export.readers.base import Reader

BOTH = "both"
"""The option that stands for `FORMATS_OF_BOTH`, each in a folder of its own: one folder of two formats misleads readers."""
FORMATS_OF_BOTH = ("compressed_tensors", "modelopt")


def known_formats() -> list[str]:
    return sorted({found.name for found in iter_modules(formats.__path__)} - {"base"})


def folders_of(option: str, folder: Path) -> dict[str, Path]:
    """The folders to write for a name of a format, or for `both`: by name of their formats, the first in `folder` itself and the second
    in `folder_modelopt` beside it. Raises ValueError for other options.
    """
    if option == BOTH:
        first, second = FORMATS_OF_BOTH
        return {first: folder, second: folder.with_name(f"{folder.name}_{second}")}
    find_format(option)
    return {option: folder}


def find_format(name: str) -> Format:
    """The writer of a format. Raises ValueError where there is none of that name."""
    if name not in known_formats():
        raise ValueError(f"callbacks.export.format must be one of {', '.join([*known_formats(), BOTH])}, got {name!r}")
    return import_module(f"{formats.__name__}.{name}").FORMAT


def find_reader(name: str) -> Reader:
    """The reader of a format that `find_format` finds."""
    reader = getattr(find_format(name), "reader", None) or name
    return import_module(f"{readers.__name__}.{reader}").READER
