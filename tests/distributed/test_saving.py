"""Checkpoints of sharded runs: written while training goes on, visible when complete, and failures are heard."""

import os
import signal
import threading
import time
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from running import assert_same
from small_runs import Tokens, make_module, make_trainer
from torch import distributed

from nvfp4_train.callbacks.preemption import Preempted, Preemption
from nvfp4_train.checkpoints import newest_complete, read_checkpoint, saved_step
from nvfp4_train.saving import ShardedWriter, save_file
from nvfp4_train.strategy import FullyShardedStrategy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WINDOW = 4
"""Micro-batches of a step, on each of two ranks."""


class HoldWriting(Callback):
    """Lets shards be written from the second micro-batch after a save on, or at the end; lists the folder at the first."""

    def __init__(self, folder: str, fails_at: str = "", until_end: bool = False) -> None:
        self.folder = Path(folder)
        self.until_end = until_end
        self.listings: list[list[str]] = []
        self.may_write = threading.Event()
        write_data = ShardedWriter.write_data

        def held(writer: ShardedWriter, *args: Any) -> Any:
            assert self.may_write.wait(60)
            if fails_at and fails_at in str(writer.path) and distributed.get_rank() == 1:
                raise OSError("no space left on device")
            return write_data(writer, *args)

        ShardedWriter.write_data = held  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        position = batch_idx % WINDOW
        if position == 0 and batch_idx:
            self.listings.append(sorted(path.name for path in self.folder.glob("*")))
            # No rank may have gone on before all have looked.
            distributed.barrier()
        elif position == 1 and batch_idx > WINDOW and not self.until_end:
            self.may_write.set()
            path, future = trainer.strategy._in_flight
            future.exception(60)
        elif position == 3:
            self.may_write.clear()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.may_write.set()


def save_every(steps: int, folder: str, asynchronous: bool, fails_at: str = "") -> dict[str, Any]:
    """A run of three steps that saves every `steps` steps."""
    hold = HoldWriting(folder, fails_at, until_end=steps > 1)
    if not asynchronous:
        hold.may_write.set()
        hold.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]
    # One checkpoint is kept; every other is deleted as soon as Lightning has a newer one.
    checkpoints = ModelCheckpoint(
        folder, "{step}", auto_insert_metric_name=False, every_n_train_steps=steps, save_top_k=1, enable_version_counter=False
    )
    trainer = make_trainer(
        "fsdp2",
        sharding={"async_checkpoint": asynchronous},
        callbacks=(hold, checkpoints),
        accumulate_grad_batches=WINDOW,
        enable_checkpointing=True,
    )
    error = ""
    try:
        trainer.fit(make_module(), Tokens(3 * 2 * WINDOW))
    except RuntimeError as raised:
        error = f"{raised}: {raised.__cause__}"
    return {"error": error, "listings": hold.listings, "step": trainer.global_step}


def save_both_ways(steps: int, folder: str) -> dict[str, Any]:
    """At once to `folder`/a, and in the background to `folder`/b."""
    found = [save_every(steps, f"{folder}/{name}", name == "b") for name in "ab"]
    assert not any(run["error"] for run in found)
    return found[1]


def assert_same_checkpoint(first: Path, second: Path) -> None:
    saved = [read_checkpoint(path) for path in (first, second)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(saved[0][key], saved[1][key], key)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    for rank in run_ranks(2, save_both_ways, 1, f"{tmp_path}"):
        # The save of step 2 is in flight, and the complete checkpoint of step 1 still there.
        assert rank["listings"] == [["1.ckpt.partial"], ["1.ckpt", "2.ckpt.partial"]]
    assert [os.listdir(tmp_path / name) for name in "ab"] == [["3.ckpt"]] * 2
    assert_same_checkpoint(tmp_path / "a" / "3.ckpt", tmp_path / "b" / "3.ckpt")


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path: Path) -> None:
    """The checkpoint of step 2 is written after step 3."""
    for rank in run_ranks(2, save_both_ways, 2, f"{tmp_path}"):
        assert rank["listings"] == [[], ["2.ckpt.partial"]]
    assert_same_checkpoint(tmp_path / "a" / "2.ckpt", tmp_path / "b" / "2.ckpt")


def test_a_failure_in_the_background_ends_training_and_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    for rank in run_ranks(2, save_every, 1, f"{tmp_path}", True, "2.ckpt"):
        assert f"the checkpoint {tmp_path}/2.ckpt could not be written" in rank["error"]
        assert "no space left on device" in rank["error"]
        assert rank["step"] == 2
    assert newest_complete(tmp_path) == (tmp_path / "1.ckpt", [tmp_path / "2.ckpt.partial"])


def preempt(folder: str) -> dict[str, Any]:
    write_data = ShardedWriter.write_data

    def slowly(writer: ShardedWriter, *args: Any) -> Any:
        time.sleep(1)
        return write_data(writer, *args)

    ShardedWriter.write_data = slowly  # type: ignore[method-assign]
    preemption = Preemption(dirpath=folder, marker=f"{folder}/preempted")
    trainer = make_trainer(
        "fsdp2", sharding={"async_checkpoint": True}, callbacks=(preemption,), accumulate_grad_batches=WINDOW
    )
    if distributed.get_rank() == 1:
        preemption.on_train_epoch_start = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        trainer.fit(make_module(), Tokens(3 * 2 * WINDOW))
    return {"step": saved_step(Path(folder) / "preempted-step-0000001.ckpt")}


def test_a_preempted_run_ends_when_its_checkpoint_is_complete(tmp_path: Path) -> None:
    assert run_ranks(2, preempt, f"{tmp_path}") == [{"step": 1}] * 2
    assert sorted(os.listdir(tmp_path)) == ["preempted", "preempted-step-0000001.ckpt"]


def test_a_file_cannot_be_saved_in_the_background() -> None:
    with pytest.raises(ValueError, match="async_checkpoint needs save_distributed_checkpoint=true"):
        FullyShardedStrategy(async_checkpoint=True, save_distributed_checkpoint=False)


def save_folder(path: Path, step: int) -> None:
    writer = ShardedWriter(path)
    writer.start({"global_step": step, "lr_schedulers": []})
    torch.distributed.checkpoint.save({"w": torch.full((1000,), step)}, storage_writer=writer, no_dist=True)


def save_one_file(path: Path, step: int) -> None:
    save_file({"global_step": step, "lr_schedulers": [], "state_dict": {"w": torch.full((1000,), step)}}, path)


@pytest.mark.parametrize("save", [save_one_file, save_folder])
@pytest.mark.parametrize("earlier", [save_one_file, save_folder])
def test_a_checkpoint_is_replaced_by_a_complete_one(
    earlier: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after every renaming, one of both is complete."""
    path = tmp_path / "last.ckpt"
    earlier(path, 1)
    steps = []

    def look() -> None:
        newest, _ = newest_complete(tmp_path)
        assert newest is not None
        steps.append(saved_step(newest))

    def watched(move: Any, source: Path, target: Path) -> None:
        look()
        move(source, target)
        look()

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, partialmethod(partial(watched, getattr(Path, name))))
    save(path, 2)
    assert (steps[0], steps[-1]) == (1, 2)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert saved_step(path) == 2
