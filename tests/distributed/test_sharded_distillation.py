"""Distillation of a sharded student from a sharded teacher is that on one device."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_runs import Tokens, make_module, make_trainer
from tiny_models import tiny_config, tiny_model
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nvfp4_train.losses.distillation import DistillationLoss
from nvfp4_train.models.build import BuiltModel, ModelBuilder, build_model
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.quant.policy import QuantConfig

STEPS = 2


def device() -> torch.device:
    return torch.device("cpu" if distributed.get_backend() == "gloo" else "cuda")


def build(config: ModelConfig, teacher: str | None, dtype: torch.dtype, sharded: bool) -> tuple[BuiltModel, DistillationLoss]:
    torch.manual_seed(0)
    mesh = init_device_mesh(device().type, (distributed.get_world_size(),)) if sharded else None
    built = build_model(config, QuantConfig(), device(), compute_dtype=dtype, mesh=mesh)
    built.model.to(device())
    loss = DistillationLoss(cross_entropy=0.25, hidden=0.5, chunk_tokens=5, teacher_path=teacher)
    builder = ModelBuilder(student=built.model, config=config, device=device(), compute_dtype=dtype, mesh=mesh)
    loss.prepare(builder)
    built.store.update()
    return built, loss


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 64, (distributed.get_world_size(), 1, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None] > 3
    return [{"input_ids": own.to(device()), "loss_mask": mask.to(device())} for own in ids]


def compare(family: str, path: str | None, teacher: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Largest difference of losses, metrics and gradients, the latter by the largest gradient of a parameter."""
    config = ModelConfig(path=path) if path else tiny_config(family)
    built, loss = build(config, teacher, dtype, sharded=False)
    expected = torch.stack([loss(built.model, batch)[0] for batch in batches()])
    expected.mean().backward()
    gradients = {name: whole(p.grad) for name, p in built.model.named_parameters() if p.grad is not None}

    model, sharded = build(config, teacher, dtype, sharded=True)
    own = batches()[distributed.get_rank()]
    found: dict[str, Any] = {"loss": 0.0, "gradient": 0.0}
    for step in range(STEPS):
        value = sharded(model.model, own)[0]
        # The root of the student stays gathered for the backward, and nothing of the teacher.
        assert all(isinstance(p, DTensor) for p in sharded.teacher.parameters())
        assert not isinstance(model.model.lm_head.weight, DTensor)
        value.backward()
        found["loss"] = max(found["loss"], abs(value.item() - expected[distributed.get_rank()].item()))
        for name, gradient in gradients.items():
            # They add up over the steps.
            difference = (whole(model.model.get_parameter(name).grad) - (step + 1) * gradient).abs().max()
            found["gradient"] = max(found["gradient"], (difference / gradient.abs().max()).item())
    with torch.no_grad():
        pairs = zip(loss(built.model, own)[1].items(), sharded(model.model, own)[1].values(), strict=True)
        found["metrics"] = {name: (one - other).abs().item() for (name, one), other in pairs}
    found["equal teachers"] = all(
        whole(p).equal(whole(q)) and p.dtype == q.dtype
        for p, q in zip(loss.teacher.parameters(), sharded.teacher.parameters(), strict=True)
    )
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models. That of fp32 holds values that bf16 has not."""
    made = {}
    for name, family, dtype in (("llama", "llama", torch.bfloat16), ("in fp32", "qwen3", torch.float32)):
        made[name] = str(tmp_path_factory.mktemp("models") / family)
        tiny_model(family, dtype).save_pretrained(made[name])
    return made


@pytest.mark.parametrize(
    ("family", "path", "teacher", "dtype"),
    [
        ("llama", None, None, torch.float32),
        ("gemma2", None, None, torch.float32),
        ("llama", "llama", "in fp32", torch.float32),
        ("llama", "llama", None, torch.bfloat16),
    ],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_one_device(
    family: str, path: str | None, teacher: str | None, dtype: torch.dtype, folders: dict[str, str]
) -> None:
    names = (folders[name] if name else None for name in (path, teacher))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for found in run_ranks(2, compare, family, *names, dtype):
        assert found["equal teachers"]
        assert found["loss"] <= tolerance
        assert found["gradient"] <= tolerance
        assert max(found["metrics"].values()) <= tolerance


def train(how: str) -> dict[str, Any]:
    module = make_module({"compute_dtype": "float32"})
    module.loss = DistillationLoss()
    trainer = make_trainer(how, accumulate_grad_batches=2, limit_val_batches=1.0, max_steps=STEPS, val_check_interval=2)
    trainer.fit(module, Tokens(4 * STEPS))
    assert not any("teacher" in name for name in module.state_dict())
    return {"kl": trainer.callback_metrics["val/kl"].item(), **module.results}


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_run_reports_the_same_on_both_ranks(how: str) -> None:
    first, second = run_ranks(2, train, how)
    assert first == second
    assert first["val/kl_master_at_switch"] == pytest.approx(0, abs=1e-6)
    assert first["val/kl_ptq"] > 0
    assert first["kl"] == pytest.approx(first["val/kl_quantized"], rel=0.5)
