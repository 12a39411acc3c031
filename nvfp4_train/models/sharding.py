"""Sharding of a causal LM over devices by FSDP2: fp32 masters, served values in the forward, fp32 reduction."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from nvfp4_train.models.architecture import modules_outside
from nvfp4_train.models.causal_lm import decoder_layers
from nvfp4_train.quant.local_weight import rows_per_rank
from nvfp4_train.quant.served import SERVED_DTYPE, ServedUnit

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FsdpUnit:
    """Modules that FSDP2 gathers together."""

    modules: list[nn.Module]
    in_fp32: bool
    """Parameters are gathered as they are held, and the forward rounds masters. Otherwise they are rounded to bf16 first."""
    is_layer: bool = False
    """With `reshard_after_forward`, freed after its forward and gathered again in the backward."""
    is_called: bool = True
    """False for towers: no forward of text calls them, so they are never gathered."""


def fsdp_units(model: nn.Module, *, kept: Collection[str] = (), compute_dtype: torch.dtype = SERVED_DTYPE) -> list[FsdpUnit]:
    """The decoder layers, towers, the input embedding unless the head has the same weight, and the root with all the rest.

    `kept` are names of parameters that are served in fp32. A unit that holds one is gathered in fp32, because FSDP2 reduces the
    gradients of a unit in one dtype. Layers that share parameters are one unit.
    """
    layers = _outermost(decoder_layers(model))
    if not layers:
        raise ValueError(f"trainer: {type(model).__name__} names no decoder layers to shard (_no_split_modules is empty)")
    kept_ids = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in kept}
    computes_in_fp32 = compute_dtype is not SERVED_DTYPE

    def holds_kept(parameters: Sequence[nn.Parameter]) -> bool:
        return any(id(p) in kept_ids for p in parameters)

    units = [
        FsdpUnit(
            modules=together,
            in_fp32=computes_in_fp32 or holds_kept([p for layer in together for p in layer.parameters()]),
            is_layer=True,
        )
        for together in _joined_by_parameters(layers)
    ]
    towers = modules_outside(model) if isinstance(model, PreTrainedModel) else []
    units += [FsdpUnit(modules=[tower], in_fp32=True, is_called=False) for tower in towers]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    is_tied = head is not None and head.weight is embedding.weight
    if not is_tied:
        # The embedding rounds the rows that it looks up, and sums their gradients in fp32.
        units.append(FsdpUnit(modules=[embedding], in_fp32=True, is_layer=True))
    gathered = {id(p) for unit in units for module in unit.modules for p in module.parameters()}
    rest = [p for p in model.parameters() if id(p) not in gathered]
    units.append(FsdpUnit(modules=[model], in_fp32=computes_in_fp32 or is_tied or holds_kept(rest)))
    return units


def gathered_as_served(units: Sequence[FsdpUnit]) -> set[nn.Module]:
    """The modules whose parameters FSDP2 rounds to bf16 before it gathers them, so that the forward need not round them."""
    tops = {module for unit in units for module in unit.modules}

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        yield module
        for child in module.children():
            if child not in tops:
                yield from inside(child)

    return {module for unit in units if not unit.in_fp32 for top in unit.modules for module in inside(top)}


def _outermost(layers: Sequence[nn.Module]) -> list[nn.Module]:
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if layer not in inside]


def _joined_by_parameters(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Layers in lists of one; those that share a parameter are in one list."""
    together: list[tuple[list[nn.Module], set[int]]] = []
    for layer in layers:
        own = {id(p) for p in layer.parameters()}
        joined = [group for group in together if group[1] & own]
        together = [group for group in together if not group[1] & own]
        modules = [module for group in joined for module in group[0]]
        together.append(([*modules, layer], own.union(*(group[1] for group in joined))))
    return [modules for modules, _ in together]


def shard_model(mesh: DeviceMesh, units: Sequence[FsdpUnit], *, reshard_after_forward: bool = True) -> None:
    """Apply `fully_shard` to the units of a model in their order, the root last, in place. Call `show_served` first.

    A mesh of two dimensions replicates over the first and shards over the second. With `reshard_after_forward` the layers are
    gathered again in the backward, which saves memory and costs traffic.
    """
    for unit in units:
        dtype = None if unit.in_fp32 else SERVED_DTYPE
        fully_shard(
            unit.modules if len(unit.modules) > 1 else unit.modules[0],
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            reshard_after_forward=unit.is_layer and reshard_after_forward,
        )
    root: Any = units[-1].modules[0]
    if not isinstance(root, ServedUnit):
        root.within = _call
    register_fsdp_forward_method(root, "within")


def shard_frozen(mesh: DeviceMesh, model: nn.Module) -> None:
    """Shard a model that takes no gradients. Its tensors travel in the dtype that they have, and no unit stays gathered."""
    shard_model(mesh, [replace(unit, in_fp32=True, is_layer=True) for unit in fsdp_units(model)])


def call_within(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` as if it were the model's forward; it may call submodules and read the root's parameters.

    See `ServedUnit.within`; a sharded model that shows no served values gathers its root's parameters alone.
    """
    return model.within(function, *args) if isinstance(model, ServedUnit | FSDPModule) else function(*args)  # type: ignore


def _call(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device memory, uninitialized, and move everything else, in place. Ties stay."""
    # to_empty would empty the buffers, too.
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a tensor of a sharded model, in the memory that FSDP2 uses, and the index of the first one."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    shard_dim = tensor.placements.index(Shard(0))
    # FSDP2 cuts as torch.chunk does: the last ranks may have fewer rows, or none.
    first = rows_per_rank(tensor.shape[0], tensor.device_mesh.size(shard_dim)) * tensor.device_mesh.get_local_rank(shard_dim)
    return tensor.to_local().detach(), min(first, tensor.shape[0])
