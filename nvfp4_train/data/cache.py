"""The folder in which `datasets` keeps what was read and tokenized."""

import tempfile
from pathlib import Path

from datasets import config


def check_data_cache() -> None:
    """Raise ValueError where the cache of `datasets` cannot be written: there is no reading of data without it."""
    folder = Path(config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"the cache of datasets, {folder}, cannot be written ({error.strerror}); set HF_HOME, or HF_DATASETS_CACHE, to a folder "
            "that can"
        ) from error
