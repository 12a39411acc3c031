"""Quantized inputs under DDP and FSDP2: the forward is that of one device, and both have the same gradients."""

import pytest
import torch
from ranks import run_ranks
from tiny_models import tiny_config
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nvfp4_train.models.build import kept_in_fp32
from nvfp4_train.models.causal_lm import compute_logits, decoder_layers, load_model
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.served_check import check_served
from nvfp4_train.models.sharding import fsdp_units, gathered_as_served, shard_model
from nvfp4_train.quant.inputs import InputQuantizers, record_inputs
from nvfp4_train.quant.linear import quantize_inputs
from nvfp4_train.quant.policy import QuantConfig, select
from nvfp4_train.quant.served import served_units, show_served
from nvfp4_train.quant.sharded import ShardedWeightStore
from nvfp4_train.quant.store import ReplicatedWeightStore, WeightStore

WAYS = {"FSDP2": {}, "FSDP2, recomputing": {"gradient_checkpointing": True}, "FSDP2, compiled": {"compiled": True}}


def device() -> torch.device:
    return torch.device("cpu" if distributed.get_backend() == "gloo" else "cuda")


def build(
    family: str, compute_dtype: torch.dtype, *, sharded: bool = False, compiled: bool = False, **options: bool
) -> tuple[nn.Module, WeightStore, InputQuantizers]:
    torch.manual_seed(0)
    model = load_model(tiny_config(family, **options), compute_dtype)
    manifest = select(model, QuantConfig(), HubLayout(model.config)).manifest
    scale = torch.tensor([2.0**-9], device=device())
    quantizers = quantize_inputs(model, manifest, lambda group: scale)
    kept = kept_in_fp32(model)
    units = fsdp_units(model, kept=kept, compute_dtype=compute_dtype) if sharded else []
    shown_units = [*served_units(model), *(module for unit in units for module in unit.modules if module is not model)]
    gathered = gathered_as_served(units)
    shown = show_served(
        model, list(dict.fromkeys(shown_units)), kept=kept, gathered_as_served=gathered, compute_dtype=compute_dtype
    )
    model.to(device())
    for layer in decoder_layers(model) if compiled else ():
        layer.compile(backend="aot_eager")
    if sharded:
        shard_model(init_device_mesh(device().type, (distributed.get_world_size(),)), units)
        in_fp32 = {module for unit in units if unit.in_fp32 for module in unit.modules}
        store: WeightStore = ShardedWeightStore(model, manifest, gathered_in_fp32=in_fp32, compute_dtype=compute_dtype)
    else:
        store = ReplicatedWeightStore(model, manifest, shown, compute_dtype=compute_dtype)
    store.update()
    quantizers.enable()
    return model, store, quantizers


def step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = compute_logits(model, ids)
    logits.float().logsumexp(-1).mean().backward()
    whole = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    gradients = {
        name.removeprefix("module."): (grad.full_tensor() if hasattr(grad, "full_tensor") else grad) for name, grad in whole
    }
    return logits.detach(), gradients


def compared(family: str, compute_dtype: torch.dtype) -> dict[str, bool | int]:
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(distributed.get_rank())).to(device())
    one, _, _ = build(family, compute_dtype)
    logits, _ = step(one, ids)
    replicated, _, _ = build(family, compute_dtype)
    ddp_logits, ddp_gradients = step(DistributedDataParallel(replicated), ids)
    found: dict[str, bool | int] = {"DDP": torch.equal(logits, ddp_logits), "gradients": len(ddp_gradients)}
    for name, options in WAYS.items():
        model, _, quantizers = build(family, compute_dtype, sharded=True, **options)
        sharded_logits, gradients = step(model, ids)
        found[name] = torch.equal(logits, sharded_logits)
        found[f"gradients of {name}"] = sum(torch.equal(ddp_gradients[key], gradient) for key, gradient in gradients.items())
    found["checked"] = check_served(model, ids[:1], compute_dtype, quantizers)
    found["sampled"] = len(record_inputs(model, quantizers, lambda: compute_logits(model, ids)))
    return found


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_way_to_hold_a_model_has_the_same_forward_and_gradients(compute_dtype: torch.dtype) -> None:
    for found in run_ranks(2, compared, "llama", compute_dtype):
        assert {name: equal for name, equal in found.items() if equal is False} == {}
        assert {found[f"gradients of {name}"] for name in WAYS} == {found["gradients"]}
        assert found["checked"] > 10
        assert found["sampled"] == 8
