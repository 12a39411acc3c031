"""From configs/, recipes/ and a command line to plain options, and from options to objects. Nothing else knows Hydra.

A group is a folder of configs/ that the defaults list of configs/train.yaml names. Its options become one object, or, as those of
`callbacks` and `logger`, one object per name. The caller gives the root of both folders, since they are no part of the package.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvfp4_train.earlier import keep_earlier
from nvfp4_train.errors import JobFailed, one_line
from nvfp4_train.run.identity import choose_run_id, wandb_id

PATH_OPTIONS = ("ckpt_path", "model.path", "data.path", "data.tokenizer", "data.chat_template", "loss.teacher_path")
"""Options that may be paths, of the folder in which the command was given."""


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
    """Call `main`, a function that Hydra decorated, with all that configs/ refers to, and one name of the run folder on all ranks.

    Ends with exit code 1 and a line where the command line is wrong, a job has failed, or the run folder cannot be made.
    """
    register_configs(root)
    # Hydra would print the errors itself, as tracebacks.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        os.environ["RUN_ID"] = choose_run_id()
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        main()
    except JobFailed:
        sys.exit(1)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else ""
        sys.exit(f"error: {one_line(f'{error} {cause}')}")
    except OSError as error:
        # A job lets none through.
        sys.exit(f"error: run_dir cannot be made: {error}")


def failed_job() -> BaseException:
    """What to raise when a job has failed and its error is printed: the end of the process, or of one job of a sweep."""
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    return JobFailed("a job of the sweep has failed") if is_sweep else SystemExit(1)


def run_options(cfg: DictConfig) -> dict[str, Any]:
    """The options of the job that Hydra runs, in the run folder that it made, with paths that do not depend on the current folder."""
    hydra = HydraConfig.get()
    cfg.run_dir = hydra.runtime.output_dir
    options = plain(cfg)
    if hydra.job.chdir:
        for option in PATH_OPTIONS:
            *groups_of_option, name = option.split(".")
            node = options
            for group in groups_of_option:
                node = node.get(group) or {}
            value = node.get(name)
            if isinstance(value, str) and (path := Path(hydra.runtime.cwd, value).expanduser()).exists():
                node[name] = str(path)
    return options


def compose_options(root: Path, overrides: Sequence[str], config: str = "train") -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a command line without running a job, and the same with interpolations as they are written.

    `config` is the file of configs/ at the root of all.

    Raises ValueError for a command line that cannot be composed.
    """
    register_configs(root)
    try:
        with initialize_config_dir(str(root / "configs"), version_base="1.3"):
            cfg = compose(config, overrides=list(overrides))
    except HydraException as error:
        raise ValueError(str(error)) from error
    return plain(cfg), plain(cfg, resolve=False)


def plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=resolve)  # type: ignore[return-value]


def groups(options: dict[str, Any]) -> dict[str, Any]:
    """The options of every group, by its name."""
    own = {field.name for field in fields(RunOptions)}
    return {name: node for name, node in options.items() if name not in own}


def save_config(options: Mapping[str, Any]) -> None:
    """Write the files that Hydra would write itself, but once the run is accepted, and with the options that it uses.

    Those of an earlier run in the folder that differ are kept under a numbered name. Call it on one rank.
    """
    folder = Path(options["run_dir"]) / ".hydra"
    folder.mkdir(exist_ok=True)
    written = {"config.yaml": dict(options), "overrides.yaml": list(HydraConfig.get().overrides.task)}
    for name, content in written.items():
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if (folder / name).exists() and (folder / name).read_text() != text:
            keep_earlier(folder / name)
        (folder / name).write_text(text)


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
