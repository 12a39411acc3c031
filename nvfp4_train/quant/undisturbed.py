"""Forwards that measure a model between the steps of its training."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with deterministic algorithms, and without compiled layers, which hooks would compile anew."""
    modules = list(model.modules())
    was_training = [module.training for module in modules]
    compiled = [module._compiled_call_impl for module in modules]
    is_deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        for module in modules:
            module.training, module._compiled_call_impl = False, None
        torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        for module, training, call in zip(modules, was_training, compiled, strict=True):
            module.training, module._compiled_call_impl = training, call
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward leaves unsharded, which is the root. The next forward gathers the parameters anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
