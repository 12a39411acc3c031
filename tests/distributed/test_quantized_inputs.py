"""Quantized inputs under DDP and FSDP2: the forward is that of one device, and both have the same gradients."""

import pytest
import torch
from ranks import run_ranks
from tiny_models import tiny_config
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nvfp4_train.models.build import BuiltModel, build_model
from nvfp4_train.models.causal_lm import compute_logits, decoder_layers
from nvfp4_train.models.served_check import check_served
from nvfp4_train.quant.input_statistics import InputClipping
from nvfp4_train.quant.inputs import record_inputs
from nvfp4_train.quant.policy import QuantConfig
from nvfp4_train.quant.statistics import sum_over_ranks

WAYS = {"FSDP2": {}, "FSDP2, recomputing": {"gradient_checkpointing": True}, "FSDP2, compiled": {"compiled": True}}


def device() -> torch.device:
    return torch.device("cpu" if distributed.get_backend() == "gloo" else "cuda")


def build(
    family: str, compute_dtype: torch.dtype, *, sharded: bool = False, compiled: bool = False, **options: bool
) -> BuiltModel:
    torch.manual_seed(0)
    mesh = init_device_mesh(device().type, (distributed.get_world_size(),)) if sharded else None
    built = build_model(tiny_config(family, **options), QuantConfig(), device(), compute_dtype=compute_dtype, mesh=mesh)
    built.model.to(device())
    for layer in decoder_layers(built.model) if compiled else ():
        layer.compile(backend="aot_eager")
    for group in built.store.manifest.groups:
        built.store.state.input_scale(group[0]).fill_(2.0**-9)
    built.store.update()
    built.inputs.enable()
    return built


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
    logits, _ = step(build(family, compute_dtype).model, ids)
    ddp_logits, ddp_gradients = step(DistributedDataParallel(build(family, compute_dtype).model), ids)
    found: dict[str, bool | int] = {"DDP": torch.equal(logits, ddp_logits), "gradients": len(ddp_gradients)}
    for name, options in WAYS.items():
        built = build(family, compute_dtype, sharded=True, **options)
        sharded_logits, gradients = step(built.model, ids)
        found[name] = torch.equal(logits, sharded_logits)
        found[f"gradients of {name}"] = sum(torch.equal(ddp_gradients[key], gradient) for key, gradient in gradients.items())
    found["checked"] = check_served(built.model, ids[:1], compute_dtype, built.inputs)
    found["sampled"] = len(record_inputs(built.model, built.inputs, lambda: compute_logits(built.model, ids)))
    found["clipped, FSDP2"] = clipped(built, ids)
    found["clipped"] = clipped(build(family, compute_dtype), ids)
    return found


def clipped(built: BuiltModel, ids: Tensor) -> dict[str, float]:
    """The share of clipped input blocks of every weight over the inputs of both ranks."""
    statistic = InputClipping()
    for group in built.store.manifest.groups:
        # So small that some blocks behind a norm are clipped.
        built.store.state.input_scale(group[0]).fill_(2.0**-10)
    built.inputs.enable()
    statistic.measure(built.model, built.inputs, lambda: compute_logits(built.model, ids))
    names, (table,) = sum_over_ranks(built.store.local_weights(), [statistic])
    return {name: statistic.finish(sums)["input_clipped_share"] for name, sums in zip(names, table, strict=True)}


@pytest.mark.parametrize(
    ("family", "compute_dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float32), ("mixtral", torch.bfloat16), ("gpt_oss", torch.bfloat16)],
    ids=str,
)
def test_every_way_to_hold_a_model_has_the_same_forward_and_gradients(family: str, compute_dtype: torch.dtype) -> None:
    for found in run_ranks(2, compared, family, compute_dtype):
        assert {name: equal for name, equal in found.items() if equal is False} == {}
        assert {found[f"gradients of {name}"] for name in WAYS} == {found["gradients"]}
        assert found["checked"] > 10
        assert found["sampled"] == 8
        assert found["clipped"] == found["clipped, FSDP2"]
        assert any(0 < share < 1 for share in found["clipped"].values())
