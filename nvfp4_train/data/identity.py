"""What a position in the training stream counts: the sequences of this data. A checkpoint keeps it, and a resumed run is held to it."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from nvfp4_train.data.config import DataConfig

FREE = ("batch_size", "val_batch_size", "val_sequences", "num_workers", "restart")
"""Options that change no training sequence."""
NUM_SEQUENCES = 64
"""Of the training sequences, so many are looked at."""


def identity(config: DataConfig, *, seed: int, tokenizer: str) -> dict[str, Any]:
    """The options that decide which sequence a position of the stream is, by their names on the command line."""
    values = dataclasses.asdict(config) | {"tokenizer": tokenizer}
    return {f"data.{name}": value for name, value in values.items() if name not in FREE} | {"seed": seed}


def fingerprint(sequences: Any, most: int | None = None) -> str:
    """A hash of the number of sequences and of their content; of `most`, evenly spaced, where there are more."""
    digest = hashlib.blake2b(str(len(sequences)).encode(), digest_size=16)
    count = len(sequences) if most is None else min(most, len(sequences))
    for number in range(count):
        for name, tensor in sorted(sequences[number * len(sequences) // count].items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def check_same_data(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ValueError where `given`, a state of the data module, trains on other sequences than `saved`, or in another order.

    A state from before fingerprints were kept has none, and passes.
    """
    if "fingerprint" not in saved:
        return
    is_same = saved["fingerprint"] == given["fingerprint"] and saved["identity"].get("seed") == given["identity"]["seed"]
    if is_same:
        return
    options = [name for name in given["identity"] if saved["identity"].get(name) != given["identity"][name]]
    differences = [
        f"{name}: {as_written(saved['identity'].get(name))} in the checkpoint's run, {as_written(given['identity'][name])} now"
        for name in options
    ]
    reason = "; ".join(differences) or f"the text of data.path={given['identity']['data.path']!r} has changed"
    raise ValueError(
        f"a resumed run must go on in the data of its checkpoint, whose position counts sequences of other data: {reason}. Give what "
        "the checkpoint's run had, or data.restart=true to start at the beginning of this data"
    )


def as_written(value: Any) -> str:
    """A value as it is written on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
