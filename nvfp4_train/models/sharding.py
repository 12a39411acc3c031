"""Sharding of a causal LM over devices by FSDP2: fp32 masters, bf16 compute, fp32 reduction."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from nvfp4_train.models.causal_lm import decoder_layers
from nvfp4_train.quant.linear import SERVED_DTYPE, NVFP4Linear


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, *, reshard_after_forward: bool = True) -> None:
    """Apply `fully_shard` to the decoder layers, the input embedding and the root, in place; `quantize_linears` comes before.

    A mesh of two dimensions replicates over the first and shards over the second. With `reshard_after_forward` the layers are
    gathered again in the backward, which saves memory and costs traffic.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"trainer: {type(model).__name__} names no decoder layers to shard (_no_split_modules is empty)")
    served = MixedPrecisionPolicy(param_dtype=SERVED_DTYPE, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The embedding rounds the rows that it looks up, and sums their gradients in fp32.
    as_master = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=served, reshard_after_forward=reshard_after_forward)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if not is_tied:
        fully_shard(embedding, mesh=mesh, mp_policy=as_master, reshard_after_forward=reshard_after_forward)
    # One parameter is in one group, with one dtype of gradients: a tied embedding makes the root's that of the masters, and
    # quantized weights, whose gradients are bf16, cannot stay in it.
    if is_tied:
        in_layers = {module for layer in layers for module in layer.modules()}
        for module in model.modules():
            if isinstance(module, NVFP4Linear) and module not in in_layers:
                fully_shard(module, mesh=mesh, mp_policy=served, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=as_master if is_tied else served, reshard_after_forward=False)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device memory, uninitialized, and move everything else, in place. Ties stay."""
    # to_empty would empty the buffers, too.
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a tensor of a sharded model, in the memory that FSDP2 uses, and the number of the first of them."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    shard_dim = tensor.placements.index(Shard(0))
    # Of torch.chunk, as FSDP2 cuts: the last ranks may have fewer rows, or none.
    rows_per_rank = -(-tensor.shape[0] // tensor.device_mesh.size(shard_dim))
    first = rows_per_rank * tensor.device_mesh.get_local_rank(shard_dim)
    return tensor.to_local().detach(), min(first, tensor.shape[0])
