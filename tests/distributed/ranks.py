"""Runs a function on several ranks of one machine: on GPUs where there are enough, else on CPU processes over gloo."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

# The server imports these once; every rank is then forked from it, in a moment.
PRELOAD = ["nvfp4_train.callbacks.requantize", "transformers.models.llama.modeling_llama"]


def on_gpus(world_size: int) -> bool:
    return torch.cuda.device_count() >= world_size


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, gpus: bool | None = None) -> list[Any]:
    """`function(*args)` on every rank of a process group; the plain data and tensors that it returned, by rank.

    `gpus` is by default whether there are enough.
    """
    gpus = on_gpus(world_size) if gpus is None else gpus
    multiprocessing.set_forkserver_preload(PRELOAD)
    # Imports ask for GPUs, and where there are any, no process forked after that may ask again.
    start_method = "spawn" if torch.cuda.is_available() else "forkserver"
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _rank, (world_size, folder, gpus, function, args), nprocs=world_size, start_method=start_method
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, gpus: bool, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(rank)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What torchrun sets; the address is never used, since the group exists when Lightning asks for one.
    os.environ |= {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "WORLD_SIZE": f"{world_size}",
        "LOCAL_WORLD_SIZE": f"{world_size}",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    # It writes many lines about every checkpoint.
    logging.getLogger("dcp_logger").setLevel(logging.ERROR)
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
