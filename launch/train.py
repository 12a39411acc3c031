"""Train a causal language model in NVFP4 and export the packed checkpoint.

    python launch/train.py +recipe=NAME [OPTION=VALUE ...]
    torchrun --nproc-per-node N launch/train.py +recipe=NAME trainer=ddp|fsdp2|hsdp

`--help` lists the recipes; `+recipe=NAME --cfg job` prints everything that can be set.
SIGTERM or SIGUSR1 to any rank saves a checkpoint after the current optimizer step and ends every rank with exit code 75 (see
nvfp4_train/callbacks/preemption.py), Ctrl-C the same with 130; the same command with ckpt_path=auto and the same run folder continues.
"""

import atexit
import hashlib
import inspect
import netrc
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IS_RANK_ZERO = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"

import hydra
import lightning as L
import torch
import wandb
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from torch import distributed
from torch.distributed import TCPStore

from nvfp4_train.callbacks.preemption import Preempted
from nvfp4_train.checkpoints import newest_complete, saved_step
from nvfp4_train.data.module import TextDataModule
from nvfp4_train.models.causal_lm import load_config
from nvfp4_train.module import QATModule
from nvfp4_train.options import check_options


def choose_run_id() -> str:
    """What names the run folder, the same on every rank: RUN_ID, or the id that torchrun was given, or the time."""
    now = time.strftime("%Y%m%d-%H%M%S")
    run_id = os.environ.get("RUN_ID", os.environ.get("TORCHELASTIC_RUN_ID", "none"))
    if run_id != "none":
        return run_id
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return now
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        sys.exit("error: set RUN_ID to one value on all ranks: this launcher gives them none, and they share a run folder")
    # "none" is the id of every run to which none was given.
    return of_rank_zero("run_id", now)


def of_rank_zero(name: str, value: str) -> str:
    """The value of rank 0 on every rank that torchrun started; without torchrun, the rank's own."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return value
    # torchrun's own store, which outlives a restart of the ranks.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"nvfp4_train/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if IS_RANK_ZERO:
        store.set(key, value)
    return store.get(key).decode()


def wandb_id(run_dir: str) -> str:
    """A run that is started again in its folder continues its wandb run, and shares it with no other folder."""
    path = Path(run_dir).resolve()
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', path.name)}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


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
        "basename": lambda path: Path(path).name,
        "wandb_id": wandb_id,
        "recipe_list": recipe_list,
        "is_auto": lambda ckpt_path: ckpt_path == "auto",
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
        try:
            target = get_class(options["_target_"])
        except (ImportError, ValueError) as error:
            raise ValueError(f"{where}._target_: {error}") from error
        check_options(target, plain, where)
        if target is WandbLogger:
            # It hands what it does not know to wandb.init.
            own = inspect.signature(WandbLogger).parameters
            check_options(wandb.init, {name: value for name, value in plain.items() if name not in own}, where)


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


def choose_checkpoint(ckpt_path: str | None, folder: Path) -> str | None:
    """`auto` is the newest complete checkpoint in the folder, or none where there is none."""
    if ckpt_path != "auto":
        return ckpt_path
    newest, cut_short = newest_complete(folder)
    if IS_RANK_ZERO:
        for path in cut_short:
            print(f"ckpt_path=auto: {path} was cut short and is not used")
        print(f"ckpt_path=auto: {'no checkpoint yet, from the first step' if newest is None else newest}", flush=True)
    own = "" if newest is None else str(newest)
    # Ranks that start from different steps would wait for each other forever.
    chosen = of_rank_zero("checkpoint", own)
    if chosen and not Path(chosen).exists():
        raise ValueError(
            f"run_dir must be on storage that all ranks share: rank 0 continues from {chosen}, which is not found here"
        )
    return chosen or None


def keep_earlier_metrics(run_dir: Path) -> None:
    """The CSV logger starts a new file; that of an earlier run in the same folder is kept under a numbered name."""
    path = run_dir / "metrics.csv"
    if IS_RANK_ZERO and path.exists():
        number = 1
        while (earlier := run_dir / f"metrics.{number}.csv").exists():
            number += 1
        path.rename(earlier)


def save_config(cfg: DictConfig) -> None:
    """What Hydra would write itself, but before it is known whether the run is accepted."""
    if IS_RANK_ZERO:
        folder = Path(cfg.run_dir) / ".hydra"
        folder.mkdir(exist_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        OmegaConf.save(HydraConfig.get().overrides.task, folder / "overrides.yaml")


def leave_process_group() -> None:
    """For ranks that end together: join gloo's threads. One that frees a tensor while Python ends may abort the process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def make(options: Any, where: str, **objects: Any) -> Any:
    """Instantiate a config node. Raises ValueError with its location."""
    try:
        return instantiate(options, _convert_="all", **objects)
    except InstantiationException as error:
        raise ValueError(f"{where}: {error.__cause__ or error}") from error


def check_trainer(options: dict[str, Any]) -> None:
    """Raise ValueError for values that Lightning takes and that no run can use."""
    for name, least in (("max_steps", 1), ("accumulate_grad_batches", 1), ("log_every_n_steps", 1), ("val_check_interval", 1)):
        if name in options and options[name] < least:
            raise ValueError(f"trainer.{name} must be at least {least}, got {options[name]}")
    if (clip := options.get("gradient_clip_val")) is not None and clip < 0:
        raise ValueError(f"trainer.gradient_clip_val must be at least 0, or null, got {clip}")
    world_size, devices = os.environ.get("WORLD_SIZE"), options.get("devices")
    if world_size and isinstance(devices, int) and devices * options.get("num_nodes", 1) != int(world_size):
        raise ValueError(
            f"trainer.devices times trainer.num_nodes must be the {world_size} ranks that this run was started with, got "
            f"{devices} times {options.get('num_nodes', 1)}; see trainer=ddp"
        )


def check_parts(options: dict[str, Any]) -> None:
    """Raise ValueError where a callback or logger is no object, or quantization has no callback to do it."""
    for group in ("callbacks", "logger"):
        for name, node in (options[group] or {}).items():
            if node is not None and not _is_target(node):
                raise ValueError(f"{group}.{name} must be null or have a _target_, got {node!r}")
    if options["quant"].get("enabled") and not (options["callbacks"] or {}).get("fake_quant"):
        raise ValueError("callbacks.fake_quant quantizes the weights and must not be null; to train without, choose quant=none")


def build(options: dict[str, Any]) -> tuple[L.Trainer, QATModule, TextDataModule]:
    """Check the options and build everything that a run needs. Raises ValueError for what the user can correct."""
    check_targets(options)
    check_trainer(options["trainer"])
    check_parts(options)
    ckpt_path = options["ckpt_path"]
    if ckpt_path is not None and not Path(ckpt_path).exists():
        raise ValueError(f"ckpt_path must be a checkpoint, or auto, got {ckpt_path!r}, which does not exist")
    if ckpt_path is not None and saved_step(Path(ckpt_path)) is None:
        raise ValueError(f"ckpt_path must be a checkpoint, or auto, got {ckpt_path!r}, which is none, or was cut short")
    configs = {name: make(options[name], name) for name in ("model", "data", "quant", "optim")}
    data = TextDataModule(configs.pop("data"), seed=options["seed"], model_path=configs["model"].path)
    hf_config = load_config(configs["model"])
    data.check_model(hf_config.vocab_size, getattr(hf_config, "max_position_embeddings", None))
    module = QATModule(**configs, seed=options["seed"])

    nodes = {group: {name: node for name, node in (options[group] or {}).items() if node} for group in ("callbacks", "logger")}
    callbacks = [make(node, f"callbacks.{name}") for name, node in nodes["callbacks"].items()]
    keep_earlier_metrics(Path(options["run_dir"]))
    loggers = [make(node, f"logger.{name}") for name, node in nodes["logger"].items()]
    trainer = make(options["trainer"], "trainer", callbacks=callbacks, logger=loggers)
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
    module = None
    try:
        options["ckpt_path"] = choose_checkpoint(options["ckpt_path"], Path(cfg.run_dir) / "checkpoints")
        trainer, module, data = build(options)
        trainer.callbacks.append(LambdaCallback(on_fit_start=lambda *_: save_config(cfg)))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(options)
        trainer.fit(module, data, ckpt_path=options["ckpt_path"], weights_only=True)
        atexit.register(leave_process_group)
    except Preempted:
        atexit.register(leave_process_group)
        raise
    except ValueError as error:
        if module is not None and module.has_started:
            raise
        sys.exit(f"error: {error}")
    finally:
        # The next job of a sweep logs into a run of its own.
        wandb.finish()
    return module.results.get("val/loss_quantized")


register_configs()
if __name__ == "__main__":
    os.environ["RUN_ID"] = choose_run_id()
    main()
