"""What a process of a run begins and ends with."""

import netrc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from nvfp4_train.callbacks.preemption import INTERRUPTED_EXIT_CODE


def default_to_offline_wandb() -> None:
    """Without an API key wandb would stop the run at a prompt."""
    try:
        has_login = any("wandb" in host for host in netrc.netrc().hosts)
    except (FileNotFoundError, netrc.NetrcParseError):
        has_login = False
    if "WANDB_API_KEY" not in os.environ and not has_login:
        os.environ.setdefault("WANDB_MODE", "offline")


@contextmanager
def finishing_wandb() -> Iterator[None]:
    """Ends the wandb run of this process, if it has one, with the process's own exit code.

    The next job of a sweep logs into a run of its own. Lightning ends an interrupted run with 1; here it ends with 130.
    """
    exit_code = 1
    try:
        yield
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = INTERRUPTED_EXIT_CODE
        raise
    except SystemExit as exit:
        if isinstance(exit.__context__, KeyboardInterrupt):
            exit.code = INTERRUPTED_EXIT_CODE
        # A message in place of a code is printed, and the code is 1.
        exit_code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        raise
    finally:
        # Only the logger imports wandb, which takes a second.
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=exit_code)


def leave_process_group() -> None:
    """For ranks that end together: join gloo's threads. One that frees a tensor while Python ends may abort the process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
