"""Which linears of a class have their weight read by others, past their own forward. Transformers does not load their packed folders.

A reader puts codes in place of the weight, and decodes them when the linear is called.
"""

import copy
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

from nvfp4_train.models.served_dtype import class_of
from nvfp4_train.quant.served import SERVED_DTYPE, set_parameters

NUM_TOKENS = 8


class _Watched(dict[str, Any]):
    """Parameters of a linear that note who reads them."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.is_called = self.is_read_past = False

    def enter(self, *_: Any) -> None:
        self.is_called = True

    def leave(self, *_: Any) -> None:
        self.is_called = False

    def __getitem__(self, name: str) -> Any:
        self.is_read_past |= not self.is_called
        return super().__getitem__(name)


@torch.no_grad()
def read_past_forward(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Of the linears of these names those whose parameters are read past their forward.

    They are found by the initialization and a forward of the class of `model`, with tensors that have no values, as far as these run
    without any.
    """
    watched: dict[str, _Watched] = {}
    # A class may do things that need values.
    with FakeTensorMode(allow_non_fake_inputs=True), suppress(Exception):
        config = copy.deepcopy(model.config)
        probe = class_of(model)._from_config(config, dtype=SERVED_DTYPE, attn_implementation="eager").eval()
        for name in names:
            linear = probe.get_submodule(name)
            watched[name] = _Watched(linear._parameters)
            set_parameters(linear, watched[name])
            linear.register_forward_pre_hook(watched[name].enter)
            linear.register_forward_hook(watched[name].leave)
        # Transformers does so while it loads, for what has no weight in the folder.
        for module in probe.modules():
            if not isinstance(module, nn.Linear):
                probe._init_weights(module)
        probe(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.int64), use_cache=False)
    return [name for name, parameters in watched.items() if parameters.is_read_past]
