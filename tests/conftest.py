"""Environment of the whole suite. Set before any test module imports triton or datasets."""

import gc
import os
import tempfile
from collections import Counter

import pytest
import torch
from tqdm import tqdm

if not torch.cuda.is_available():
    # Kernels then run on CPU tensors, in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
# Most tensors here are small, and two threads would wait for each other more than they compute.
torch.set_num_threads(1)
os.environ["WANDB_MODE"] = "offline"
# Tests neither use nor fill the user's caches.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nvfp4-tests-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

BAR = tqdm.__init__


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist would begin with the files that have the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests come first: among them are the longest ones, during which one of the two processes would idle at the end."""
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: counts[item.path])


def pytest_collection_finish() -> None:
    """What the imports made stays; collections of garbage need not go through it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def bars_as_they_are() -> None:
    """What a run does to the bars of its process ends with the test that made it here."""
    tqdm.__init__ = BAR  # type: ignore[method-assign]
