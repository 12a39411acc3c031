"""The internals of Lightning that we change are there, in the version that is installed."""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import distributed

from nvfp4_train.lightning_quirks import (
    back_to_device,
    drop_sigterm_agreement,
    keep_signal_handlers,
    log_finished_step,
    rewind_to_last_step,
    run_missing_validation,
)


def trainer(**options: int) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


def test_lightning_moves_the_module_to_the_cpu_before_the_end_of_a_fit_and_we_move_it_back() -> None:
    class Watched(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.calls: list[str] = []

        def training_step(self, *_: Any) -> None:
            """None is done."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters())

        def cpu(self) -> "Watched":
            self.calls.append("cpu")
            return super().cpu()

        def on_fit_end(self) -> None:
            self.calls.append("on_fit_end")
            self.trainer.strategy.__class__.root_device = torch.device("meta")  # type: ignore[attr-defined]
            back_to_device(self.trainer)

    module, run = Watched(), trainer(max_steps=0)
    strategy = type(run.strategy)
    own = strategy.root_device
    try:
        run.fit(module, [0])
    finally:
        strategy.root_device = own  # type: ignore[misc]
    assert module.calls == ["cpu", "on_fit_end"]
    assert module.weight.is_meta


def test_the_agreement_on_sigterm_is_no_longer_made(monkeypatch: pytest.MonkeyPatch) -> None:
    broadcasts = []
    monkeypatch.setattr(distributed, "broadcast", lambda *args, **kwargs: broadcasts.append(args))
    loop = (run := trainer()).fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor()
    assert len(broadcasts) == 1
    drop_sigterm_agreement(run)
    loop._broadcast_sigterm_tensor()
    assert len(broadcasts) == 1


def test_lightning_installs_its_signal_handlers_by_the_method_that_is_replaced() -> None:
    run = trainer()
    before = signal.getsignal(signal.SIGTERM)
    keep_signal_handlers(run)
    run._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
    other = trainer()
    try:
        other._signal_connector.register_signal_handlers()
        assert signal.getsignal(signal.SIGTERM) is not before
    finally:
        other._signal_connector.teardown()


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


class Counted(LightningModule):
    """Logs the number of its steps and validations, of an endless stream."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("train/batch", float(batch_idx))
        return self.weight.sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/step", float(self.trainer.global_step))

    def on_train_start(self) -> None:
        run_missing_validation(self.trainer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(1)


class EndAt(Callback):
    """Saves a checkpoint in `hook` of a step, and ends the run there."""

    def __init__(self, path: Path, step: int, hook: str) -> None:
        self.path = path
        self.step = step
        setattr(self, hook, self.end)

    def end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer._accumulates():  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)
            raise KeyError("the end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        log_finished_step(trainer)
        log_finished_step(trainer)


class Pairs(Logger):
    """The steps at which each metric was logged."""

    name = version = "pairs"

    def __init__(self) -> None:
        self.logged: list[tuple[str, int, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged += [(name, step, value) for name, value in metrics.items() if name != "epoch"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def run(path: Path | None = None, max_steps: int = 6, callback: Callback | None = None, **options: Any) -> list:
    logger = Pairs()
    started = Trainer(
        accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, num_sanity_val_steps=0, check_val_every_n_epoch=None, max_epochs=-1, max_steps=max_steps,
        limit_val_batches=2, accumulate_grad_batches=2, callbacks=[callback] if callback else [], **options,
    )  # fmt: skip
    loop = started.fit_loop.epoch_loop
    started._accumulates = loop._should_accumulate  # type: ignore[attr-defined]
    loaders = [torch.utils.data.DataLoader(Endless(), batch_size=None) for _ in range(2)]
    with pytest.raises(KeyError, match="the end") if callback and callback.step < max_steps else nullcontext():  # type: ignore[attr-defined]
        started.fit(Counted(), *loaders, ckpt_path=path, weights_only=True)
    return logger.logged


@pytest.mark.parametrize(
    ("step", "hook", "interval"),
    [(step, "on_train_batch_end", interval) for step in (2, 3) for interval in (1, 4, 5)]
    + [(step, f"on_validation_{name}", step) for step in (2, 3) for name in ("start", "batch_end", "end")],
)
def test_what_is_logged_before_an_end_and_after_it_is_what_is_logged_without_one(
    step: int, hook: str, interval: int, tmp_path: Path
) -> None:
    """The metrics of the step, and the validation behind it, were in no log."""
    whole = run(val_check_interval=interval)
    first = run(callback=EndAt(tmp_path / "saved.ckpt", step, hook), val_check_interval=interval)
    second = run(path=tmp_path / "saved.ckpt", val_check_interval=interval)
    assert sorted(first + second) == sorted(whole)


@pytest.mark.parametrize("interval", [2, 5])
def test_a_run_that_goes_on_behind_its_end_numbers_its_steps_as_one_that_never_ended(interval: int, tmp_path: Path) -> None:
    whole = run(val_check_interval=interval)
    first = run(max_steps=4, callback=SaveAtEnd(tmp_path / "saved.ckpt"), val_check_interval=interval)
    second = run(path=tmp_path / "saved.ckpt", val_check_interval=interval)
    assert sorted(first + second) == sorted(whole)


class SaveAtEnd(Callback):
    step = 4

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
