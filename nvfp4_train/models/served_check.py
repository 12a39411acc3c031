"""Compares the model that trains with the transformers class that will serve it, module by module, on one short batch.

The plain class is built on the meta device. Its forward runs once, and borrows the served values of one unit at a time from the
training model, so the check takes the memory of one decoder layer. Both forwards get the same tensors, so they compute the same
bits unless one of them reads a parameter, a dtype or a buffer that the other does not. Where inputs are quantized, those of the plain
class are by `kernels.reference`, linear by linear.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from nvfp4_train.kernels import reference
from nvfp4_train.models.causal_lm import compute_logits, plain_class
from nvfp4_train.models.served_dtype import served_dtypes
from nvfp4_train.quant.expert_inputs import open_inputs
from nvfp4_train.quant.experts import input_module
from nvfp4_train.quant.inputs import InputQuantizers
from nvfp4_train.quant.served import SERVED_DTYPE, modules_of_unit, served_parameters, units_of
from nvfp4_train.quant.undisturbed import undisturbed

Outputs = dict[str, list[list[Tensor]]]
"""The floating-point tensors that a module returned, by its name, call after call."""


@torch.no_grad()
def check_served(
    model: PreTrainedModel,
    input_ids: Tensor,
    compute_dtype: torch.dtype = SERVED_DTYPE,
    inputs: InputQuantizers | None = None,
) -> int:
    """Raise ValueError, naming the first module, where the output of a module differs between training model and plain class.

    `model` was made by `build_model`, and is in the state in which it trains next. input_ids are int64 [B, T]. `inputs` are the
    quantizers of its inputs, where it has any. A module that does not repeat its own output is passed over with a warning. Under FSDP2
    call it on every rank. Returns the number of modules compared.
    """
    input_scales = inputs.scales() if inputs is not None and inputs.is_enabled else {}
    with undisturbed(model):
        trained = _outputs_of(model, input_ids)
        first = _first_difference(model, input_ids, compute_dtype, input_scales, trained)
        if first is None:
            return len(trained)
        again = _outputs_of(model, input_ids)
    name, difference = first
    if not _same(trained[name], again[name]):
        warnings.warn(
            f"{name} gives another output each time, so it could not be compared with the model that is served", stacklevel=2
        )
        return len(trained)
    kind = type(model.get_submodule(name)).__name__
    raise ValueError(
        f"the model that trains must compute what the model that is served computes, but {name or 'the model'} ({kind}) is the first "
        f"module with another output, by up to {difference:.3g}; please report the model type {model.config.model_type}. "
        "callbacks.served_check=null trains nevertheless: its losses are not those of the exported model"
    )


def _outputs_of(model: nn.Module, input_ids: Tensor) -> Outputs:
    outputs: Outputs = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda module, args, output: outputs[name].append([tensor.clone() for tensor in _tensors(output)])

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        compute_logits(model, input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return dict(outputs)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    return _largest_difference(first, second) == 0


def _largest_difference(first: list[list[Tensor]], second: list[list[Tensor]]) -> float:
    """Largest difference over all calls and tensors; infinite where their numbers or shapes differ, or only one has NaN."""
    if [len(tensors) for tensors in first] != [len(tensors) for tensors in second]:
        return math.inf
    pairs = [(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)]
    return max((_difference(x.double(), y.double()) for x, y in pairs), default=0.0)


def _difference(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return math.inf
    is_equal = (x == y) | (x.isnan() & y.isnan())
    return (x - y).abs().masked_fill(is_equal, 0.0).nan_to_num(nan=math.inf).flatten().max().item() if x.numel() else 0.0


def _first_difference(
    model: PreTrainedModel,
    input_ids: Tensor,
    compute_dtype: torch.dtype,
    input_scales: Mapping[str, Tensor],
    trained: Outputs,
) -> tuple[str, float] | None:
    """The first module of the plain class to end with another output, and the difference."""
    plain = plain_class(model, compute_dtype)
    # So that modules have the names that they have in the training model.
    open_inputs(plain, input_scales)
    dtypes = served_dtypes(model)
    _take_buffers(plain, model, dtypes, compute_dtype)
    calls: dict[str, int] = defaultdict(int)
    found: list[tuple[str, float]] = []

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call, calls[name] = calls[name], calls[name] + 1
            difference = _largest_difference(trained.get(name, [])[call : call + 1], [_tensors(output)])
            if difference and not found:
                found.append((name, difference))

        return hook

    for name, module in plain.named_modules():
        module.register_forward_hook(compare(name))
    for name, scale in input_scales.items():
        input_module(plain, name).register_forward_pre_hook(_quantizing_by_reference(scale))
    for name, unit in units_of(model):
        lender = _Lender(name, unit, plain, model, dtypes, compute_dtype)
        plain.get_submodule(name).register_forward_pre_hook(lender.lend)
        plain.get_submodule(name).register_forward_hook(lender.take_back)
    compute_logits(plain, input_ids)
    return found[0] if found else None


def _quantizing_by_reference(input_scale: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that quantizes the input of a linear."""
    return lambda module, args: (reference.fake_quant_input(args[0], input_scale), *args[1:])


class _Lender:
    """Lends the training model's shown parameters to one unit of the plain class while that unit runs."""

    def __init__(
        self,
        name: str,
        unit: nn.Module,
        plain: nn.Module,
        model: nn.Module,
        dtypes: Mapping[str, torch.dtype],
        compute_dtype: torch.dtype,
    ) -> None:
        self._unit = unit
        names = {module: f"{path}." if path else "" for path, module in model.named_modules()}
        self._borrowers = {module: plain.get_submodule(names[module].removesuffix(".")) for module in modules_of_unit(unit)}
        self._names = names
        self._dtypes = dtypes
        self._compute_dtype = compute_dtype
        self._own: list[tuple[nn.Module, dict[str, Any]]] = []

    def lend(self, *_: Any) -> None:
        if isinstance(self._unit, FSDPModule):
            self._unit.unshard()
        for module, shown in served_parameters(self._unit, self._compute_dtype):
            borrower = self._borrowers[module]
            self._own.append((borrower, borrower._parameters))
            shown_there: Any = {
                leaf: None if value is None else self._as_read(self._names[module] + leaf, value)
                for leaf, value in shown.items()
            }
            borrower._parameters = shown_there

    def _as_read(self, name: str, value: Tensor) -> Tensor:
        """The value in the dtype in which a reader holds it; a view where it has that dtype already."""
        dtype = self._dtypes[name]
        return value.detach().to(dtype).to(self._compute_dtype if dtype is SERVED_DTYPE else dtype)

    def take_back(self, *_: Any) -> None:
        for borrower, own in self._own:
            borrower._parameters = own
        self._own.clear()
        if isinstance(self._unit, FSDPModule):
            self._unit.reshard()


def _take_buffers(
    plain: PreTrainedModel, model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], compute_dtype: torch.dtype
) -> None:
    """Give the plain class its buffers: saved ones from the model, others as the plain class computes them in bf16."""
    computed = dict((plain if compute_dtype is SERVED_DTYPE else plain_class(model)).named_buffers())
    of_model, saved = dict(model.named_buffers()), model.state_dict().keys()
    for name in computed:
        owner = plain.get_submodule(name.rpartition(".")[0])
        value = (of_model[name] if name in saved else computed[name]).to(dtypes[name])
        wide = compute_dtype if dtypes[name] is SERVED_DTYPE else dtypes[name]
        owner._buffers[name.rpartition(".")[2]] = value.to(device=of_model[name].device, dtype=wide)
