"""Print the memory and traffic per GPU and optimizer step of a recipe under FSDP2, before any GPU is rented.

python launch/plan.py +recipe=llama3_8b_qat world_size=64 [OPTION=VALUE ...]
"""

import argparse
import os
import sys
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from train import ROOT, check_targets, check_trainer, make

from nvfp4_train.plan import RunShape, make_plan, meta_model, plan_table
from nvfp4_train.strategy import FullyShardedStrategy


def check_strategy(config: DictConfig) -> None:
    """Raise ValueError for a trainer that does not shard as the plan counts, or whose number of replicas is not known here."""
    strategy = config.trainer.get("strategy")
    target = strategy.get("_target_") if isinstance(strategy, DictConfig) else None
    if target is None or not issubclass(get_class(target), FullyShardedStrategy):
        raise ValueError(f"a plan is of trainer=fsdp2 or trainer=hsdp, got trainer.strategy {target or strategy!r}")
    replicate_size = OmegaConf.to_container(strategy, resolve=False).get("replicate_size")  # type: ignore[union-attr]
    if "GROUP_WORLD_SIZE" in str(replicate_size) and "GROUP_WORLD_SIZE" not in os.environ:
        raise ValueError(
            "set trainer.strategy.replicate_size=R, the number of nodes: a run takes it from torchrun, a plan cannot"
        )


def check_devices(config: DictConfig, world_size: int) -> None:
    """Raise ValueError where the config itself says how many devices there are, and the plan is of another number."""
    devices, num_nodes = (OmegaConf.to_container(config.trainer, resolve=False).get(name) for name in ("devices", "num_nodes"))  # type: ignore[union-attr]
    if isinstance(devices, int) and isinstance(num_nodes, int) and devices * num_nodes != world_size:
        raise ValueError(
            f"world_size must be trainer.devices times trainer.num_nodes, {devices} times {num_nodes}, got {world_size}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="+", metavar="OPTION=VALUE", help="world_size=N, and the options of launch/train.py")
    arguments = parser.parse_args().overrides
    own = [argument for argument in arguments if argument.startswith("world_size=")]
    if not own:
        sys.exit("error: world_size=N must say for how many GPUs")
    world_size = own[-1].partition("=")[2]
    if not world_size.isdecimal():
        sys.exit(f"error: world_size must be a number of GPUs, got {world_size!r}")
    # Names the run folder of a run; a plan writes nothing.
    os.environ.setdefault("RUN_ID", "plan")
    try:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("train", overrides=[argument for argument in arguments if argument not in own])
        options: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        check_targets(options)
        check_strategy(config)
        check_devices(config, int(world_size))
        check_trainer(options["trainer"])
        model, quant, data = (make(options[name], name) for name in ("model", "quant", "data"))
        strategy = options["trainer"]["strategy"]
        shape = RunShape(
            world_size=int(world_size),
            replicate_size=strategy.get("replicate_size", 1),
            reshard_after_forward=strategy.get("reshard_after_forward", True),
            micro_batches=options["trainer"]["accumulate_grad_batches"],
            batch_size=data.batch_size,
            seq_len=data.seq_len,
            gradient_checkpointing=model.gradient_checkpointing,
        )
        meta = meta_model(model)
        data.check_positions(getattr(meta.config, "max_position_embeddings", None))
        print(plan_table(make_plan(meta, quant, shape), shape))
    except (ValueError, HydraException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
