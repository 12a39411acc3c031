"""Lines that say what was done with the data: once in a process, and on one rank."""

import functools
import logging
import os

log = logging.getLogger(__name__)


@functools.cache
def notice(message: str) -> None:
    """Log `message` as a warning. `prepare_data` and `setup` read the same data on every rank, and one line is enough."""
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        log.warning(message)
