"""Write tensors as one safetensors file, or as several with an index."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from nvfp4_train.export.phases import Phases, silent

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class FileGroup:
    """Tensors that belong into one file. Their size is known before they are in memory."""

    num_bytes: int
    load: Callable[[], dict[str, Tensor]]
    """The tensors by their names on disk, on the CPU and contiguous."""


def write_shards(folder: Path, groups: Iterable[FileGroup], max_shard_bytes: int, progress: Phases = silent) -> int:
    """Write groups into as many files as needed, with an index if there are several. Returns the number of files.

    Only the tensors of one file are in memory: a group is loaded when those before it are written, or when it fits beside them.
    """
    keys_of: list[list[str]] = []

    def flush(shard: dict[str, Tensor]) -> None:
        # The final name has the number of files in it, which is known at the end only.
        save_file(shard, folder / f"{len(keys_of)}.shard", metadata={"format": "pt"})
        keys_of.append(list(shard))
        shard.clear()

    shard: dict[str, Tensor] = {}
    shard_bytes = 0
    groups = list(groups)
    total_bytes = sum(group.num_bytes for group in groups)
    with progress("writing", total=total_bytes, unit="B") as bar:
        for group in groups:
            if shard and shard_bytes + group.num_bytes > max_shard_bytes:
                flush(shard)
                shard_bytes = 0
            shard |= group.load()
            shard_bytes += group.num_bytes
            bar.advance(group.num_bytes)
        flush(shard)

    num_shards = len(keys_of)
    if num_shards == 1:
        (folder / "0.shard").rename(folder / "model.safetensors")
        return 1
    weight_map = {}
    for index, keys in enumerate(keys_of):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        (folder / f"{index}.shard").rename(folder / file)
        weight_map.update(dict.fromkeys(keys, file))
    index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2, sort_keys=True) + "\n")
    return num_shards
