"""What a process of a run begins and ends with."""

import netrc
import os
import sys

from torch import distributed


def default_to_offline_wandb() -> None:
    """Without an API key wandb would stop the run at a prompt."""
    try:
        has_login = any("wandb" in host for host in netrc.netrc().hosts)
    except (FileNotFoundError, netrc.NetrcParseError):
        has_login = False
    if "WANDB_API_KEY" not in os.environ and not has_login:
        os.environ.setdefault("WANDB_MODE", "offline")


def finish_wandb(exit_code: int) -> None:
    """End the wandb run of this process, if it has one, as the process ends. The next job of a sweep logs into a run of its own."""
    # Only the logger imports wandb, which takes a second.
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code)


def leave_process_group() -> None:
    """For ranks that end together: join gloo's threads. One that frees a tensor while Python ends may abort the process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
