"""Which rank this process is, and what all ranks have."""

import os
from typing import Any

from torch import distributed


def is_rank_zero() -> bool:
    """Whether this is rank 0, by the environment of the process: before there is a process group, too."""
    # Of torchrun, of Lightning's own launcher, of srun.
    return next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0") == "0"


def rank_and_world_size() -> tuple[int, int]:
    """Of the default process group; 0 and 1 without one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_from_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in their order. A collective."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    by_rank: list[Any] = [None] * world_size
    distributed.all_gather_object(by_rank, value)
    return by_rank


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sums by name over all ranks. A collective."""
    by_rank = gather_from_ranks(values)
    return {name: sum(found[name] for found in by_rank) for name in values}
