"""Formats by name: NAME is the file formats/NAME.py, which writes it, and readers/NAME.py, which reads it back.

A new format is these two files; nothing lists them. A format that an existing reader can read names that reader, and is one file.
"""

from importlib import import_module
from pkgutil import iter_modules

from nvfp4_train.export import formats, readers
from nvfp4_train.export.formats.base import Format
from nvfp4_train.export.readers.base import Reader


def known_formats() -> list[str]:
    return sorted({found.name for found in iter_modules(formats.__path__)} - {"base"})


def find_format(name: str) -> Format:
    """The writer of a format. Raises ValueError where there is none of that name."""
    if name not in known_formats():
        raise ValueError(f"callbacks.export.format must be one of {', '.join(known_formats())}, got {name!r}")
    return import_module(f"{formats.__name__}.{name}").FORMAT


def find_reader(name: str) -> Reader:
    """The reader of a format that `find_format` finds."""
    reader = getattr(find_format(name), "reader", None) or name
    return import_module(f"{readers.__name__}.{reader}").READER
