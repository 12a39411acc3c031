"""The internals of Lightning that we change are there, in the version that is installed."""

import pytest
from lightning import Trainer
from torch import distributed

from nvfp4_train.lightning_quirks import drop_sigterm_agreement, rewind_to_last_step


def trainer(**options: int) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


def test_the_agreement_on_sigterm_is_no_longer_made(monkeypatch: pytest.MonkeyPatch) -> None:
    broadcasts = []
    monkeypatch.setattr(distributed, "broadcast", lambda *args, **kwargs: broadcasts.append(args))
    loop = (run := trainer()).fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor()
    assert len(broadcasts) == 1
    drop_sigterm_agreement(run)
    loop._broadcast_sigterm_tensor()
    assert len(broadcasts) == 1


def test_micro_batches_of_an_unfinished_window_are_forgotten() -> None:
    """Two steps of three micro-batches are done, and one micro-batch of the third step; the epoch has seen the last four."""
    resumed = trainer(accumulate_grad_batches=3)
    loop = resumed.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 2
    assert resumed.global_step == 2
    progress = loop.batch_progress
    for count, done in ((progress.total, 7), (progress.current, 4)):
        count.ready = count.started = count.processed = count.completed = done
    for _ in range(2):
        rewind_to_last_step(resumed)
        counts = [
            (count.ready, count.started, count.processed, count.completed) for count in (progress.total, progress.current)
        ]
        assert counts == [(6,) * 4, (3,) * 4]
