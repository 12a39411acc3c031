"""From configs/, recipes/ and a command line to plain options, and from options to objects. Nothing else knows Hydra.

A group is a folder of configs/ that the defaults list of configs/train.yaml names. Its options become one object, or, as those of
`callbacks` and `logger`, one object per name. The caller gives the root of both folders, since they are no part of the package.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from nvfp4_train.run.identity import choose_run_id, is_rank_zero, wandb_id


@dataclass
class RunOptions:
    """The options at the top of a config that are no group."""

    seed: int
    run_dir: str
    ckpt_path: str | None


def register_configs(root: Path) -> None:
    """Make recipes/*.yaml the Hydra group `recipe`, and register the schema and the resolvers that configs/ uses."""
    store = ConfigStore.instance()
    # A recipe with another name at its top is refused.
    schema = make_dataclass("Schema", [(group, Any) for group in _groups(root)], bases=(RunOptions,))
    store.store(name="schema", node=schema)
    recipes = sorted((root / "recipes").glob("*.yaml"))
    for file in recipes:
        recipe = OmegaConf.load(file)
        # Top-level entries of a recipe override those of the config, not a sub-tree called `recipe`.
        store.store(group="recipe", name=file.stem, node=recipe, package="_global_", provider=f"recipes/{file.name}")
    resolvers: dict[str, Callable[..., Any]] = {
        "basename": lambda path: Path(path).name,
        "wandb_id": wandb_id,
        "recipe_list": lambda: "\n".join(_summary(file) for file in recipes),
        "command": _command,
        "is_auto": lambda ckpt_path: ckpt_path == "auto",
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _command() -> list[str] | None:
    """What started the job that Hydra runs; None where it runs none."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    return ["python", f"launch/{hydra.job.name}.py", *hydra.overrides.task]


def _groups(root: Path) -> list[str]:
    defaults: Any = OmegaConf.to_container(OmegaConf.load(root / "configs" / "train.yaml").defaults)
    return [name for entry in defaults if isinstance(entry, dict) for name in entry if not name.startswith("override ")]


def _summary(recipe: Path) -> str:
    """A recipe's name, and the first line of its file."""
    return f"  {recipe.stem:<16} {recipe.read_text().splitlines()[0].lstrip('# ')}"


def start_job(root: Path, main: Callable[[], Any]) -> None:
    """Call `main`, a function that Hydra decorated, with all that configs/ refers to, and one name of the run folder on all ranks."""
    register_configs(root)
    try:
        os.environ["RUN_ID"] = choose_run_id()
    except ValueError as error:
        sys.exit(f"error: {error}")
    main()


def run_options(cfg: DictConfig) -> dict[str, Any]:
    """The options of the job that Hydra runs, in the run folder that it made."""
    cfg.run_dir = HydraConfig.get().runtime.output_dir
    return plain(cfg)


def compose_options(root: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a command line without running a job, and the same with interpolations as they are written.

    Raises ValueError for a command line that cannot be composed.
    """
    register_configs(root)
    try:
        with initialize_config_dir(str(root / "configs"), version_base="1.3"):
            cfg = compose("train", overrides=list(overrides))
    except HydraException as error:
        raise ValueError(str(error)) from error
    return plain(cfg), plain(cfg, resolve=False)


def plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=resolve)  # type: ignore[return-value]


def groups(options: dict[str, Any]) -> dict[str, Any]:
    """The options of every group, by its name."""
    own = {field.name for field in fields(RunOptions)}
    return {name: node for name, node in options.items() if name not in own}


def save_config(cfg: DictConfig) -> None:
    """Write the files that Hydra would write itself, but before it is known whether the run is accepted."""
    if is_rank_zero():
        folder = Path(cfg.run_dir) / ".hydra"
        folder.mkdir(exist_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        OmegaConf.save(HydraConfig.get().overrides.task, folder / "overrides.yaml")


def target_class(node: dict[str, Any], where: str) -> type:
    """The class that a config node names. Raises ValueError with its location."""
    try:
        return get_class(node["_target_"])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{where}._target_: {error}") from error


def make(node: Any, where: str, **objects: Any) -> Any:
    """Instantiate a config node. Raises ValueError with its location."""
    try:
        return instantiate(node, _convert_="all", **objects)
    except InstantiationException as error:
        raise ValueError(f"{where}: {error.__cause__ or error}") from error
