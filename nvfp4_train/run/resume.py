"""Where a run continues: the checkpoint that it starts from, what of its options must be as they were, and files of earlier runs."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvfp4_train.checkpoints import (
    WEIGHTS_ONLY,
    CheckpointFacts,
    inspect_checkpoint,
    newest_complete,
    read_unsharded,
    saved_step,
)
from nvfp4_train.data.identity import as_written
from nvfp4_train.earlier import keep_earlier
from nvfp4_train.export.folder import partial_folders
from nvfp4_train.layer_table import LAYERS_FILE
from nvfp4_train.ranks import is_rank_zero
from nvfp4_train.run.identity import has_agent_store, of_rank_zero
from nvfp4_train.saving import remove_partials, set_aside

SUFFIX = ".ckpt"
ORIGIN = Path(".hydra") / "started_from.txt"
OF_THE_SWITCH = (
    "quant.start_step",
    "quant.equalize",
    "quant.equalize_pow2",
    "quant.input_headroom",
    "quant.calibration.sequences",
)
"""Options that a run acts on once, when quantization begins."""


def choose_checkpoint(ckpt_path: str | None, folder: Path) -> str | None:
    """The checkpoint to start from; for `auto` the newest complete one in the folder of this run, or that which the run began with.

    Raises ValueError where the run would replace checkpoints of another one, and where this rank does not find the checkpoint that
    rank 0 has chosen.
    """
    if ckpt_path != "auto":
        _check_folder(ckpt_path, *newest_complete(folder, verify=False))
        return ckpt_path
    # The first rank alone looks, and moves what is in the way.
    own = (_newest(folder) or "") if is_rank_zero() or not has_agent_store() else ""
    # Ranks that start from different steps would wait for each other forever.
    chosen = of_rank_zero("checkpoint", own, str(folder))
    if chosen and not Path(chosen).exists():
        raise ValueError(
            f"run_dir must be on storage that all ranks share: rank 0 continues from {chosen}, which is not found here"
        )
    return chosen or None


def _newest(folder: Path) -> str | None:
    newest, passed_over = newest_complete(folder)
    for facts in passed_over:
        fault, colon, detail = (facts.fault or "").partition(": ")
        print(f"ckpt_path=auto: {facts.path} {fault} and is not used{colon}{detail}")
        # The run may come to write one of this name.
        if facts.path.suffix == SUFFIX and (newest is None or facts.fault == WEIGHTS_ONLY):
            print(f"ckpt_path=auto: it is kept as {set_aside(facts.path)}")
    chosen = str(newest) if newest else _origin(folder.parent)
    print(f"ckpt_path=auto: {chosen or 'no checkpoint yet, from the first step'}", flush=True)
    return chosen


def _check_folder(ckpt_path: str | None, newest: Path | None, passed_over: Sequence[CheckpointFacts]) -> None:
    """Raise ValueError where the folder of a run holds checkpoints that a run from `ckpt_path` would replace."""
    held = (
        [inspect_checkpoint(newest, verify=False)]
        if newest
        else [facts for facts in passed_over if facts.path.suffix == SUFFIX]
    )
    if not held or (ckpt_path is not None and _is_as_new(Path(ckpt_path), held[0])):
        return
    start = "from the first step" if ckpt_path is None else f"from {ckpt_path}"
    what = (
        f"of step {held[0].step}; continue from it with ckpt_path=auto"
        if newest
        else f"which {held[0].fault}; continue with ckpt_path=auto"
    )
    raise ValueError(
        f"run_dir must hold no checkpoints that a run {start} would replace, got {held[0].path} {what}, set another run_dir, or move "
        "the folder away"
    )


def _is_as_new(path: Path, newest: CheckpointFacts) -> bool:
    """Whether a checkpoint is one of the same folder and step."""
    return path.resolve().parent == newest.path.resolve().parent and saved_step(path) == newest.step


def record_origin(ckpt_path: str | None, run_dir: Path) -> None:
    """Remember which checkpoint of another run this one began with, until it has one of its own. Call it on one rank."""
    file = run_dir / ORIGIN
    if ckpt_path is None:
        file.unlink(missing_ok=True)
    elif not Path(ckpt_path).resolve().is_relative_to((run_dir / "checkpoints").resolve()):
        file.write_text(f"{Path(ckpt_path).absolute()}\n")


def _origin(run_dir: Path) -> str | None:
    """What `record_origin` remembers. Raises ValueError where it is gone."""
    file = run_dir / ORIGIN
    if not file.exists():
        return None
    path = file.read_text().strip()
    if not Path(path).exists():
        raise ValueError(
            f"the run in {run_dir} began with the checkpoint {path}, which is gone, and has none of its own; set ckpt_path"
        )
    return path


def check_checkpoint(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a path that a run cannot continue from, and for options that must be as they were. None passes."""
    ckpt_path = options["ckpt_path"]
    if ckpt_path is None:
        return
    path = Path(ckpt_path)
    if not path.exists():
        raise ValueError(f"ckpt_path must be a checkpoint, or auto, got {ckpt_path!r}, which does not exist")
    facts = inspect_checkpoint(path, verify=is_rank_zero())
    if facts.fault is not None:
        raise ValueError(f"ckpt_path must be a checkpoint, or auto, got {ckpt_path!r}, which {facts.fault}")
    assert facts.step is not None
    if (max_steps := options["trainer"].get("max_steps", facts.step)) < facts.step:
        raise ValueError(f"trainer.max_steps must be at least {facts.step}, the step of {ckpt_path}, got {max_steps}")
    saved = read_unsharded(path).get("hyper_parameters", {}).get("options")
    if saved is not None:
        check_options(path, facts.step, saved, options)


def check_options(path: Path, step: int, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that a checkpoint has acted on, and that the run gives another value.

    All others may change: what the run is given is what it does.
    """
    for option in _acted_on(step, saved, given):
        there, here = option_value(saved, option), option_value(given, option)
        if there != here:
            raise ValueError(
                f"{option} must be as in the run that saved {path} (step {step}), {as_written(there)}, which has acted on it, got "
                f"{as_written(here)}; set {option}={as_written(there)}, or start from an earlier checkpoint"
            )


def _acted_on(step: int, saved: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    # An optimizer has state for the parameters that it trains.
    yield "optim.frozen"
    was_quantized, is_quantized = (
        options["quant"].get("enabled", True) and options["quant"].get("start_step", 0) <= step for options in (saved, given)
    )
    if was_quantized and is_quantized:
        yield from OF_THE_SWITCH


def option_value(options: Mapping[str, Any], option: str) -> Any:
    """The value of an option by its dotted name; None where it is missing."""
    value: Any = options
    for name in option.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def clear_partials(run_dir: Path) -> None:
    """Delete what killed runs left half-written in a folder, which takes the room of what is to come. Call it while it is locked."""
    remove_partials(run_dir / "checkpoints")
    for partial in partial_folders(run_dir):
        shutil.rmtree(partial, ignore_errors=True)


def keep_earlier_metrics(run_dir: Path, ckpt_path: str | None) -> None:
    """Keep the metrics file of an earlier run in the folder under a numbered name: the CSV logger starts a new file.

    The table of layers goes on where the run does, and is kept likewise where a run begins anew.
    """
    if not is_rank_zero():
        return
    for name in ("metrics.csv", *([LAYERS_FILE] if ckpt_path is None else [])):
        if (path := run_dir / name).exists():
            keep_earlier(path)
