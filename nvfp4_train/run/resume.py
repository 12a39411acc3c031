"""Where a run continues: the checkpoint that it starts from, what of its options must be as they were, and files of earlier runs."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvfp4_train.checkpoints import inspect_checkpoint, newest_complete, read_unsharded
from nvfp4_train.export.folder import partial_folders
from nvfp4_train.run.identity import is_rank_zero, keep_earlier, of_rank_zero
from nvfp4_train.saving import remove_partials

OF_THE_SWITCH = (
    "quant.start_step",
    "quant.equalize",
    "quant.equalize_pow2",
    "quant.input_headroom",
    "quant.calibration.sequences",
)
"""Options that a run acts on once, when quantization begins."""


def choose_checkpoint(ckpt_path: str | None, folder: Path) -> str | None:
    """The checkpoint to start from; for `auto` the newest complete one in the folder of this run, or None.

    Raises ValueError where the run would replace checkpoints of another one, and where this rank does not find the checkpoint that
    rank 0 has chosen.
    """
    newest, passed_over = newest_complete(folder, verify=is_rank_zero() and ckpt_path == "auto")
    if ckpt_path != "auto":
        _check_folder(ckpt_path, folder, newest)
        return ckpt_path
    if is_rank_zero():
        for facts in passed_over:
            fault, colon, detail = (facts.fault or "").partition(": ")
            print(f"ckpt_path=auto: {facts.path} {fault} and is not used{colon}{detail}")
        print(f"ckpt_path=auto: {'no checkpoint yet, from the first step' if newest is None else newest}", flush=True)
    # Ranks that start from different steps would wait for each other forever.
    chosen = of_rank_zero("checkpoint", "" if newest is None else str(newest), str(folder))
    if chosen and not Path(chosen).exists():
        raise ValueError(
            f"run_dir must be on storage that all ranks share: rank 0 continues from {chosen}, which is not found here"
        )
    return chosen or None


def _check_folder(ckpt_path: str | None, folder: Path, newest: Path | None) -> None:
    """Raise ValueError where a folder holds checkpoints that a run from `ckpt_path` would replace."""
    if newest is None or (ckpt_path is not None and newest.samefile(ckpt_path)):
        return
    step = inspect_checkpoint(newest, verify=False).step
    start = "from the first step" if ckpt_path is None else f"from {ckpt_path}"
    raise ValueError(
        f"run_dir must hold no checkpoints that a run {start} would replace, got {newest} of step {step}; continue from it with "
        "ckpt_path=auto, set another run_dir, or move the folder away"
    )


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
                f"{option} must be as in the run that saved {path} (step {step}), {_shown(there)}, which has acted on it, got "
                f"{_shown(here)}; set {option}={_shown(there)}, or start from an earlier checkpoint"
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


def _shown(value: Any) -> str:
    """As it is written on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def clear_partials(run_dir: Path) -> None:
    """Delete what killed runs left half-written in a folder, which takes the room of what is to come. Call it while it is locked."""
    remove_partials(run_dir / "checkpoints")
    for partial in partial_folders(run_dir):
        shutil.rmtree(partial, ignore_errors=True)


def keep_earlier_metrics(run_dir: Path) -> None:
    """Keep the metrics file of an earlier run in the folder under a numbered name: the CSV logger starts a new file."""
    if is_rank_zero() and (path := run_dir / "metrics.csv").exists():
        keep_earlier(path)
