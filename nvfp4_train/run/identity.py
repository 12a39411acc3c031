"""What names a run: one run folder on all ranks, and one wandb run per folder."""

import hashlib
import os
import re
import time
from pathlib import Path

from torch.distributed import TCPStore

from nvfp4_train.ranks import is_rank_zero


def choose_run_id() -> str:
    """The name of the run folder, the same on every rank: RUN_ID, or the id that torchrun was given, or the time.

    Raises ValueError where the ranks have no way to agree on one.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    run_id = os.environ.get("RUN_ID", os.environ.get("TORCHELASTIC_RUN_ID", "none"))
    if run_id != "none":
        return run_id
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return now
    if not has_agent_store():
        raise ValueError("set RUN_ID to one value on all ranks: this launcher gives them none, and they share a run folder")
    # "none" is the id of every run to which none was given.
    return of_rank_zero("run_id", now)


_jobs: dict[str, list[str]] = {}
"""By name of a value, the run folders of the jobs of a sweep that asked for it: ranks go through them in the same order."""


def of_rank_zero(name: str, value: str, run_dir: str = "") -> str:
    """The value of rank 0 on every rank that torchrun started, for the run in a folder; without torchrun, the rank's own."""
    if not has_agent_store():
        return value
    # torchrun's own store, which outlives a restart of the ranks.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    jobs = _jobs.setdefault(name, [])
    if run_dir not in jobs:
        jobs.append(run_dir)
    job = jobs.index(run_dir)
    key = f"nvfp4_train/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" + (f"/{job}" if job else "")
    if is_rank_zero():
        store.set(key, value)
    return store.get(key).decode()


def wandb_id(run_dir: str) -> str:
    """Id of a folder's wandb run. A run that is started again in its folder continues it; no other folder has it."""
    path = Path(run_dir).resolve()
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', path.name)}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def has_agent_store() -> bool:
    """Whether torchrun's ranks can tell each other something before there is a process group."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
