"""Patches of transformers and PyTorch, for what neither has an option for. Seen in transformers 5.17 to 5.24."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters made in the context take no memory. Buffers are computed on the CPU, so their values are right."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # A parameter that is on the meta device already is tied to another.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        # A parameter's memory is freed before anything is written to it: initial values are drawn after the registration.
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


_isolates_documents = ContextVar("isolates documents", default=False)


def take_rows_for_single_sequences() -> None:
    """Switch off transformers' search for several sequences in one row, but inside `several_documents_in_a_row`.

    The host would wait for its result in every forward.
    """
    masking_utils.find_packed_sequence_indices = _documents_of


@contextmanager
def several_documents_in_a_row() -> Iterator[None]:
    """Attention masks that are made in the context keep apart what the position ids of a forward count anew."""
    token = _isolates_documents.set(True)
    try:
        yield
    finally:
        _isolates_documents.reset(token)


def _documents_of(position_ids: Tensor) -> Tensor | None:
    """The number of each token's document in its row, of position_ids [B, T]; None where rows are single sequences."""
    if not _isolates_documents.get():
        return None
    steps = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1)
    return (steps != 1).cumsum(-1)


def give_text_outputs_images() -> None:
    """Llama 4's multimodal forward reads `image_outputs` of the text model's output, which has no such field in 5.24."""
    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None  # type: ignore[attr-defined]


def compute_buffers_as_loaded(model: PreTrainedModel) -> None:
    """Compute the buffers of a model with parameters on the meta device as `from_pretrained` does, in place.

    It builds a model first, with bf16 as the default dtype, and once the weights are read computes unsaved buffers anew, without it:
    GPT-J's sines differ.
    """
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()
