"""The plan of a recipe under FSDP2: what launch/plan.py prints."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nvfp4_train.callbacks.layer_statistics import LayerStatistics
from nvfp4_train.losses.base import Loss
from nvfp4_train.losses.chunked import rows_at_once
from nvfp4_train.losses.distillation import DistillationLoss, vocabulary_size
from nvfp4_train.losses.hidden import num_compared
from nvfp4_train.models.architecture import positions
from nvfp4_train.models.build import freeze
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.plan import RunShape, make_plan, meta_model, plan_table
from nvfp4_train.run.compose import compose_options, make, target_class
from nvfp4_train.run.options import check_targets, check_trainer
from nvfp4_train.strategy import FullyShardedStrategy


def plan_recipe(root: Path, overrides: Sequence[str], world_size: int) -> str:
    """The table of a command line of launch/train.py on `world_size` GPUs. Raises ValueError for what the user can correct."""
    options, written = compose_options(root, overrides)
    check_targets(options)
    check_strategy(written["trainer"])
    check_devices(written["trainer"], world_size)
    check_trainer(options["trainer"])
    model, quant, data, loss, optim = (make(options[name], name) for name in ("model", "quant", "data", "loss", "optim"))
    meta = meta_model(model)
    data.check_positions(positions(meta.config))
    freeze(meta, optim.frozen)
    teacher, of_loss = plan_loss(loss, meta, trust_remote_code=model.trust_remote_code)
    strategy = options["trainer"]["strategy"]
    shape = RunShape(
        world_size=world_size,
        replicate_size=strategy.get("replicate_size", 1),
        reshard_after_forward=strategy.get("reshard_after_forward", True),
        micro_batches=options["trainer"]["accumulate_grad_batches"],
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        gradient_checkpointing=model.gradient_checkpointing,
        keeps_history=((options["callbacks"] or {}).get("oscillation") or {}).get("action") is not None,
        **of_loss,
    )
    scale_stats = make((options.get("callbacks") or {}).get("scale_stats"), "callbacks.scale_stats")
    statistics = scale_stats.statistics if isinstance(scale_stats, LayerStatistics) else ()
    return plan_table(make_plan(meta, quant, shape, teacher, statistics), shape)


def plan_loss(loss: Loss, student: nn.Module, *, trust_remote_code: bool = False) -> tuple[Any, dict[str, int]]:
    """The teacher of a loss on the meta device, or None without one, and what the loss decides of a `RunShape`.

    Raises ValueError for a teacher that cannot be loaded, or compared with the student.
    """
    if not isinstance(loss, DistillationLoss):
        return None, {}
    teacher: nn.Module = student
    if loss.teacher_path is not None:
        try:
            teacher = meta_model(ModelConfig(path=loss.teacher_path, trust_remote_code=trust_remote_code))
        except ValueError as error:
            raise ValueError(f"loss.teacher_path={loss.teacher_path!r}: {error}") from error
    loss.check_teacher(student, teacher)
    return teacher, {
        "logits_at_once": loss.chunk_tokens or rows_at_once(vocabulary_size(student)),
        "compared_layers": num_compared(student) if loss.hidden else 0,
    }


def check_strategy(trainer: dict[str, Any]) -> None:
    """Raise ValueError for a trainer that does not shard as the plan counts, or whose number of replicas is not known here.

    `trainer` are its options as they are written: torchrun gives a run what the environment of a plan lacks.
    """
    strategy: Any = trainer.get("strategy")
    target = strategy.get("_target_") if isinstance(strategy, dict) else None
    if target is None or not issubclass(target_class(strategy, "trainer.strategy"), FullyShardedStrategy):
        raise ValueError(f"a plan is of trainer=fsdp2 or trainer=hsdp, got trainer.strategy {target or strategy!r}")
    if "GROUP_WORLD_SIZE" in str(strategy.get("replicate_size")) and "GROUP_WORLD_SIZE" not in os.environ:
        raise ValueError(
            "set trainer.strategy.replicate_size=R, the number of nodes: a run takes it from torchrun, a plan cannot"
        )


def check_devices(trainer: dict[str, Any], world_size: int) -> None:
    """Raise ValueError where the config itself says how many devices there are, and the plan is of another number."""
    devices, num_nodes = trainer.get("devices"), trainer.get("num_nodes")
    if isinstance(devices, int) and isinstance(num_nodes, int) and devices * num_nodes != world_size:
        raise ValueError(
            f"world_size must be trainer.devices times trainer.num_nodes, {devices} times {num_nodes}, got {world_size}"
        )
