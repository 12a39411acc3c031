"""Lines that say what was done with the data: once in a process, and on one rank."""

import functools
import logging

from nvfp4_train.ranks import is_rank_zero

log = logging.getLogger(__name__)


@functools.cache
def notice(message: str) -> None:
    """Log `message` as a warning. `prepare_data` and `setup` read the same data on every rank, and one line is enough."""
    if is_rank_zero():
        log.warning(message)
