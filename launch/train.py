"""Train a causal language model in NVFP4 and export the packed checkpoint.

    python launch/train.py +recipe=NAME [OPTION=VALUE ...]
    torchrun --nproc-per-node N launch/train.py +recipe=NAME trainer=ddp

`--help` lists the recipes; `+recipe=NAME --cfg job` prints everything that can be set.
"""

import netrc
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Every rank runs this script, and all of them must name the same run folder.
os.environ.setdefault("RUN_ID", os.environ.get("TORCHELASTIC_RUN_ID") or time.strftime("%Y%m%d-%H%M%S"))
IS_RANK_ZERO = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"

import hydra
import lightning as L
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from nvfp4_train.data.module import TextDataModule
from nvfp4_train.models.causal_lm import load_config
from nvfp4_train.module import QATModule
from nvfp4_train.options import check_options


@dataclass
class Schema:
    """The names at the top of a config; a recipe with another one is refused."""

    seed: int
    run_dir: str
    ckpt_path: str | None
    model: Any
    data: Any
    quant: Any
    optim: Any
    trainer: Any
    callbacks: Any
    logger: Any


def recipe_list() -> str:
    """A line per recipe: its name, and the first line of its file."""
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    return "\n".join(f"  {file.stem:<16} {file.read_text().splitlines()[0].lstrip('# ')}" for file in files)


def register_configs() -> None:
    """Make recipes/*.yaml the Hydra group `recipe`, and register the schema and the resolvers that configs/ uses."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Schema)
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = OmegaConf.load(file)
        # Top-level entries of a recipe override those of the config, not a sub-tree called `recipe`.
        store.store(group="recipe", name=file.stem, node=recipe, package="_global_", provider=f"recipes/{file.name}")
    for name, resolver in {
        "rank_zero": lambda value: value if IS_RANK_ZERO else None,
        "basename": lambda path: Path(path).name,
        "recipe_list": recipe_list,
    }.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def check_targets(options: Any, where: str = "") -> None:
    """Check every `_target_` of a config against the signature of its class, before anything is built."""
    if not isinstance(options, dict):
        return
    for name, value in options.items():
        check_targets(value, f"{where}.{name}" if where else name)
    if "_target_" in options:
        # Nested targets are objects by the time the class sees them.
        plain = {name: value for name, value in options.items() if name != "_target_" and not _is_target(value)}
        check_options(get_class(options["_target_"]), plain, where)


def _is_target(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def default_to_offline_wandb() -> None:
    """Without an API key wandb would stop the run at a prompt."""
    try:
        has_login = any("wandb" in host for host in netrc.netrc().hosts)
    except (FileNotFoundError, netrc.NetrcParseError):
        has_login = False
    if "WANDB_API_KEY" not in os.environ and not has_login:
        os.environ.setdefault("WANDB_MODE", "offline")


def keep_earlier_metrics(run_dir: Path) -> None:
    """The CSV logger starts a new file; that of an earlier run in the same folder is kept under a numbered name."""
    path = run_dir / "metrics.csv"
    if IS_RANK_ZERO and path.exists():
        number = 1
        while (earlier := run_dir / f"metrics.{number}.csv").exists():
            number += 1
        path.rename(earlier)


def build(options: dict[str, Any]) -> tuple[L.Trainer, QATModule, TextDataModule]:
    """Check the options and build everything that a run needs. Raises ValueError for what the user can correct."""
    check_targets(options)
    if options["trainer"].get("max_steps", -1) < 1:
        raise ValueError(f"trainer.max_steps must be at least 1, got {options['trainer'].get('max_steps')}")
    ckpt_path = options["ckpt_path"]
    if ckpt_path is not None and not Path(ckpt_path).exists():
        raise ValueError(f"ckpt_path must be a checkpoint file, got {ckpt_path!r}, which does not exist")
    configs = {name: instantiate(options[name], _convert_="all") for name in ("model", "data", "quant", "optim")}
    data = TextDataModule(configs.pop("data"), seed=options["seed"], model_path=configs["model"].path)
    hf_config = load_config(configs["model"])
    data.check_model(hf_config.vocab_size, getattr(hf_config, "max_position_embeddings", None))
    module = QATModule(**configs, seed=options["seed"])

    keep_earlier_metrics(Path(options["run_dir"]))
    callbacks, loggers = (
        [instantiate(node, _convert_="all") for node in (options[group] or {}).values() if node is not None]
        for group in ("callbacks", "logger")
    )
    trainer = instantiate(options["trainer"], callbacks=callbacks, logger=loggers, _convert_="all")
    return trainer, module, data


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    cfg.run_dir = HydraConfig.get().runtime.output_dir
    options: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    default_to_offline_wandb()
    # The run folder holds .hydra already, and a batch is a slice of a memory-mapped file.
    warnings.filterwarnings("ignore", message="Experiment logs directory")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_float32_matmul_precision("high")
    L.seed_everything(options["seed"], verbose=False)
    try:
        trainer, module, data = build(options)
    except (ValueError, InstantiationException) as error:
        sys.exit(f"error: {error}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(options)
    trainer.fit(module, data, ckpt_path=options["ckpt_path"], weights_only=True)
    return module.results.get("val/loss_quantized")


register_configs()
if __name__ == "__main__":
    main()
