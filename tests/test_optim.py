import pytest
import torch
from torch import nn

from nvfp4_train.optim import OptimConfig, build_optimizer, lr_factor, parameter_groups


def test_only_matrices_decay() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 5), "norm": nn.LayerNorm(4)})
    model["head"] = nn.Linear(4, 5, bias=False)
    model["head"].weight = model["embed"].weight
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [id(p) for p in decayed["params"]] == [id(model["linear"].weight)]
    assert kept["weight_decay"] == 0.0
    assert sum(p.numel() for group in (decayed, kept) for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_schedule_warms_up_and_ends_at_the_minimum() -> None:
    schedule = [lr_factor(step, warmup_steps=4, total_steps=20, min_lr_ratio=0.1) for step in range(21)]
    assert schedule[0] == 0.25
    assert schedule[3] == schedule[4] == 1.0
    assert schedule[20] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in zip(schedule[4:], schedule[5:], strict=False))


def test_optimizer_steps_at_the_scheduled_rate() -> None:
    model = nn.Linear(2, 2)
    optimizer, schedule = build_optimizer(model, OptimConfig(lr=0.5, warmup_steps=2), total_steps=10)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    assert rates == [0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": float("inf")},
        {"eps": float("nan")},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"weight_decay": -1.0},
        {"warmup_steps": -1},
        {"min_lr_ratio": 2.0},
    ],
)
def test_impossible_options_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"optim.{name} must be"):
        OptimConfig(**options)
