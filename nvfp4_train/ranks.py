"""Which rank this process is, before there is a process group."""

import os


def is_rank_zero() -> bool:
    """Whether this is rank 0, by the environment of the process."""
    # Of torchrun, of Lightning's own launcher, of srun.
    return next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0") == "0"
