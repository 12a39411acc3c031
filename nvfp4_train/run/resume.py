"""Where a run continues: the checkpoint that it starts from, and the metrics of earlier runs in its folder."""

from pathlib import Path

from nvfp4_train.checkpoints import newest_complete, saved_step
from nvfp4_train.run.identity import is_rank_zero, of_rank_zero


def choose_checkpoint(ckpt_path: str | None, folder: Path) -> str | None:
    """The checkpoint to start from; for `auto` the newest complete one in the folder, or None.

    Raises ValueError where this rank does not find the checkpoint that rank 0 has chosen.
    """
    if ckpt_path != "auto":
        return ckpt_path
    newest, cut_short = newest_complete(folder)
    if is_rank_zero():
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


def check_checkpoint(ckpt_path: str | None) -> None:
    """Raise ValueError for a path that is no complete checkpoint. None, to start without one, passes."""
    if ckpt_path is None:
        return
    if not Path(ckpt_path).exists():
        raise ValueError(f"ckpt_path must be a checkpoint, or auto, got {ckpt_path!r}, which does not exist")
    if saved_step(Path(ckpt_path)) is None:
        raise ValueError(f"ckpt_path must be a checkpoint, or auto, got {ckpt_path!r}, which is none, or was cut short")


def keep_earlier_metrics(run_dir: Path) -> None:
    """Keep the metrics file of an earlier run in the folder under a numbered name: the CSV logger starts a new file."""
    path = run_dir / "metrics.csv"
    if is_rank_zero() and path.exists():
        number = 1
        while (earlier := run_dir / f"metrics.{number}.csv").exists():
            number += 1
        path.rename(earlier)
