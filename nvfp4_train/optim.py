"""AdamW with decay only where it belongs, linear warm-up and cosine decay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Options of AdamW and its schedule; steps are optimizer steps."""

    lr: float = 1e-5
    """Peak learning rate."""
    betas: Sequence[float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decay of matrices; embeddings, norms and biases have none."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.1
    """Share of the peak that the cosine ends at."""
    frozen: Sequence[str] = ()
    """Shell patterns over parameter names that are not trained, such as *embed_tokens* and lm_head*."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be above 0 and finite, got {getattr(self, name)}")
        if isinstance(self.frozen, str):
            raise ValueError(f"optim.frozen must be a list of patterns, got the string {self.frozen!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optim.weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; embeddings (tied output embeddings with them), norms and biases do not."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def lr_factor(step: int, *, warmup_steps: int, total_steps: int, min_lr_ratio: float) -> float:
    """Factor of the peak learning rate at an optimizer step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module, config: OptimConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW (fused) over the model's parameters, and its schedule over `total_steps` optimizer steps."""
    beta1, beta2 = config.betas
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True
    )

    def factor(step: int) -> float:
        return lr_factor(step, warmup_steps=config.warmup_steps, total_steps=total_steps, min_lr_ratio=config.min_lr_ratio)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def take_options(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    config: OptimConfig,
) -> list[str]:
    """Give an optimizer and a schedule whose state was restored the options of a config; moments and steps stay.

    Returns a line for each option that the state had another value of.
    """
    given: dict[str, Any] = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    saved = _options_of(optimizer)
    groups = parameter_groups(model, config.weight_decay)
    for group, new, factor in zip(optimizer.param_groups, groups, schedule.lr_lambdas, strict=True):
        group |= given | {"weight_decay": new["weight_decay"], "initial_lr": config.lr}
        group["lr"] = config.lr * factor(schedule.last_epoch)
    schedule.base_lrs = [config.lr] * len(groups)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return [f"optim.{name} was {saved[name]}, is {given[name]} from here on" for name in given if saved[name] != given[name]]


def _options_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    first = optimizer.param_groups[0]
    return {
        "lr": first.get("initial_lr", first["lr"]),
        "betas": tuple(first["betas"]),
        "eps": first["eps"],
        "weight_decay": max(group["weight_decay"] for group in optimizer.param_groups),
    }
