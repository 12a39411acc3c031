"""The folder in which `datasets` keeps what was read and tokenized. Where it cannot be written, a ValueError names it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import config


@contextmanager
def cache_errors() -> Iterator[None]:
    """Raise ValueError in place of an OSError: what runs inside reads and writes nothing but the cache."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the cache of datasets, {config.HF_DATASETS_CACHE}, cannot be written ({error}); make room, or set HF_HOME, or "
            "HF_DATASETS_CACHE, to a folder that can"
        ) from error


def check_data_cache() -> None:
    """Raise ValueError where the cache cannot be written: there is no reading of data without it."""
    folder = Path(config.HF_DATASETS_CACHE)
    with cache_errors():
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
