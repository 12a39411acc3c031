"""Checkpoints of sharded runs: written while training goes on, visible when complete, and failures are heard."""

import errno
import os
import re
import resource
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
from torch.distributed.checkpoint import CheckpointException

from nvfp4_train.callbacks.preemption import Preempted, Preemption
from nvfp4_train.checkpoints import newest_complete, read_checkpoint, saved_step
from nvfp4_train.checksums import ChecksummedFile
from nvfp4_train.errors import RunError
from nvfp4_train.saving import ShardedWriter, save_file
from nvfp4_train.strategy import AnyCheckpointIO, FullyShardedStrategy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WINDOW = 4
"""Micro-batches of a step, on each of two ranks."""


class HoldWriting(Callback):
    """Lets shards be written from the second micro-batch after a save on, or at the end; lists the folder at the first."""

    def __init__(self, folder: str, until_end: bool = False) -> None:
        self.folder = Path(folder)
        self.until_end = until_end
        self.listings: list[list[str]] = []
        self.may_write = threading.Event()
        write_data = ShardedWriter.write_data

        def held(writer: ShardedWriter, *args: Any) -> Any:
            assert self.may_write.wait(60)
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


def make_saving_trainer(folder: str, steps: int = 1, callbacks: tuple[Callback, ...] = (), **options: Any) -> Any:
    """A run that saves every `steps` steps."""
    # One checkpoint is kept; every other is deleted as soon as Lightning has a newer one.
    checkpoints = ModelCheckpoint(
        folder, "{step}", auto_insert_metric_name=False, every_n_train_steps=steps, save_top_k=1, enable_version_counter=False
    )
    return make_trainer(
        callbacks=(*callbacks, checkpoints), accumulate_grad_batches=WINDOW, enable_checkpointing=True, **options
    )


def save_every(steps: int, folder: str, asynchronous: bool) -> dict[str, Any]:
    """A run of three steps that saves every `steps` steps."""
    hold = HoldWriting(folder, until_end=steps > 1)
    if not asynchronous:
        hold.may_write.set()
        hold.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]
    trainer = make_saving_trainer(folder, steps, (hold,), how="fsdp2", sharding={"async_checkpoint": asynchronous})
    trainer.fit(make_module(), Tokens(3 * 2 * WINDOW))
    return {"listings": hold.listings}


def save_both_ways(steps: int, folder: str) -> dict[str, Any]:
    """At once to `folder`/a, and in the background to `folder`/b."""
    return [save_every(steps, f"{folder}/{name}", name == "b") for name in "ab"][1]


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


FULL = [("meta.pt", False), ("__1_0.distcp", False), ("__1_0.distcp", True), (".metadata", False), ("checksums.json", True)]
"""Files of a sharded checkpoint for which the disk may be full, and whether it is written in the background. Rank 1 writes a shard."""


def save_on_a_disk_that_fails(folder: str, number: int) -> dict[str, list[Any]]:
    """What ends a run whose second checkpoint meets an error of the disk, by how it is saved; with the steps that were done."""
    failing = ""
    write = ChecksummedFile.write

    def limited(file: ChecksummedFile, data: Any) -> int:
        if failing and failing in f"{file.raw.name}":
            raise OSError(number, os.strerror(number))
        return write(file, data)

    ChecksummedFile.write = limited  # type: ignore[method-assign]
    ended: dict[str, list[Any]] = {}

    def run(name: str, path: str, how: str = "fsdp2", **options: Any) -> None:
        nonlocal failing
        failing = path
        trainer = make_saving_trainer(f"{folder}/{name}", how=how, **options)
        with pytest.raises(RunError) as caught:
            trainer.fit(make_module(), Tokens(3 * 2 * WINDOW))
        ended[name] = [str(caught.value), trainer.global_step]

    for name, asynchronous in FULL:
        run(f"{name} {asynchronous}", f"2.ckpt.partial/{name}", sharding={"async_checkpoint": asynchronous})
    run("file", "2.ckpt.partial", sharding={"save_distributed_checkpoint": False}, plugins=AnyCheckpointIO())
    run("replicated", "2.ckpt.partial", "ddp")
    return ended


def test_a_full_disk_is_named_on_every_rank_and_the_earlier_checkpoint_is_kept(tmp_path: Path) -> None:
    ranks = run_ranks(2, save_on_a_disk_that_fails, f"{tmp_path}", errno.ENOSPC)
    assert len(ranks[0]) == len(FULL) + 2
    for rank in ranks:
        for name, (message, step) in rank.items():
            folder = tmp_path / name
            assert re.fullmatch(
                f"the disk of {folder} is full, with [0-9,.]+ MB free: the checkpoint of step 2 was not written to {folder}/2.ckpt; "
                "1.ckpt of step 1 is kept",
                message,
            ), message
            assert step == 2
            assert os.listdir(folder) == ["1.ckpt"]
            assert newest_complete(folder) == (folder / "1.ckpt", [])


def test_a_failure_that_is_not_of_the_disk_is_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise TypeError("a mistake")

    monkeypatch.setattr(ChecksummedFile, "write", fail)
    with pytest.raises(TypeError, match="a mistake"):
        save_one_file(tmp_path / "7.ckpt", 7)
    with pytest.raises(CheckpointException):
        torch.distributed.checkpoint.save({}, storage_writer=ShardedWriter(tmp_path / "7.ckpt"), no_dist=True)


def save_where_nothing_can_be_written(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        save_one_file(path, 7)
    assert isinstance(caught.value, OSError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSPC, r"the disk of {} is full, with [\d,.]+ MB free"),
        (errno.EDQUOT, "the quota on the disk of {} is used up"),
        (errno.EROFS, "the disk of {} is read-only"),
        (errno.EACCES, "permission denied for {}"),
        (errno.EFBIG, "the file is larger than {} or a limit of the system allows"),
        (errno.EIO, r"\[Errno 5\] Input/output error"),
    ],
)
def test_what_a_disk_does_not_take_is_named(number: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    save_one_file(tmp_path / "6.ckpt", 6)
    monkeypatch.setattr(ChecksummedFile, "write", fail)
    message = save_where_nothing_can_be_written(tmp_path / "7.ckpt")
    target = tmp_path / "7.ckpt"
    end = f": the checkpoint of step 7 was not written to {target}; 6.ckpt of step 6 is kept"
    assert re.fullmatch(why.format(tmp_path) + re.escape(end), message), message
    assert os.listdir(tmp_path) == ["6.ckpt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    message = save_where_nothing_can_be_written(tmp_path / "run" / "checkpoints" / "7.ckpt")
    assert message.endswith(f"was not written to {tmp_path}/run/checkpoints/7.ckpt; there is no earlier one")


def test_a_file_that_outgrows_a_limit_of_the_system_is_named(tmp_path: Path) -> None:
    """Here the system itself ends the writing, in the middle of a tensor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        message = save_where_nothing_can_be_written(tmp_path / "7.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith("the file is larger than ")
    assert os.listdir(tmp_path) == []


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
