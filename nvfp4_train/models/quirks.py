"""What transformers and PyTorch do not let us ask for, in one place. Seen in transformers 5.17 to 5.24."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import masking_utils


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters made in the context take no memory, buffers are computed on the CPU: whatever a class keeps in them is right."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is on the meta device already is tied to another.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        # Its memory is given back before anything is written to it: random initial values are drawn after the registration.
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def take_rows_for_single_sequences() -> None:
    """Spare transformers its search for several sequences in a row: in every forward the host would wait for its answer."""
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
