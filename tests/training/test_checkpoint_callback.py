"""Checkpoints are ranked, and named, by what was measured of their own step."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from running import load_checkpoint
from test_module import Tokens, make

from nvfp4_train.callbacks.checkpoint import Checkpoint
from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.errors import RunError
from nvfp4_train.module import QATModule
from nvfp4_train.run.options import check_targets


class Losses(L.Callback):
    """The validation loss and the last training loss of every step; `replaced` are values of steps to take in their place."""

    def __init__(self, replaced: dict[int, float] | None = None) -> None:
        self.replaced = replaced or {}
        self.validation: dict[int, float] = {}
        self.training: dict[int, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        validation_step = pl_module.validation_step

        def replaced(batch: Any, batch_idx: int) -> None:
            validation_step(batch, batch_idx)
            pl_module.log("val/other", self.replaced.get(trainer.global_step, 1.0))

        pl_module.validation_step = replaced  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        # Of a micro-batch that ends a step, Lightning has its share of the step's loss.
        self.training[trainer.global_step] = outputs["loss"].item() * trainer.accumulate_grad_batches

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


class Stream(Tokens):
    """Without an end, as the stream of the data module is; begins anew when the run is continued."""

    def __init__(self) -> None:
        super().__init__(64)

    def train_dataloader(self) -> Any:
        class Endless(torch.utils.data.IterableDataset):
            def __iter__(_self) -> Any:  # noqa: N805
                while True:
                    yield from self.batches

        return torch.utils.data.DataLoader(Endless(), batch_size=None)


def train(checkpoint: Checkpoint, losses: L.Callback, module: QATModule | None = None, **options: Any) -> L.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    defaults = {"max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": -1}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[Requantize(), losses, checkpoint], **(defaults | options),
    )  # fmt: skip
    trainer.fit(module or make(start_step=3), Stream(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def make_checkpoint(folder: Path, monitor: str | None = "val/loss", **options: Any) -> Checkpoint:
    defaults: dict[str, Any] = {
        "filename": "{step}-{val/loss:.5f}" if (monitor or "val").startswith("val") else f"{{step}}-{{{monitor}:.5f}}",
        "auto_insert_metric_name": False, "every_n_train_steps": 2, "save_top_k": -1, "enable_version_counter": False,
    }  # fmt: skip
    return Checkpoint(dirpath=folder, monitor=monitor, **(defaults | options))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")}


@pytest.mark.parametrize("monitor", ["val/loss", None], ids=["ranked", "named only"])
def test_a_checkpoint_carries_the_validation_of_its_own_step(monitor: str | None, tmp_path: Path) -> None:
    """The checkpoint of step 4 carried the loss of step 2."""
    options = {} if monitor else {"save_top_k": -1}
    losses = Losses()
    checkpoint = make_checkpoint(tmp_path, monitor, **options)
    train(checkpoint, losses)
    assert names(tmp_path) == {f"{step}-{losses.validation[step]:.5f}.ckpt" for step in (2, 4, 6, 8)}
    if monitor:
        best = min(losses.validation, key=lambda step: losses.validation[step])
        assert checkpoint.best_model_path.endswith(f"/{best}-{losses.validation[best]:.5f}.ckpt")
        assert checkpoint.best_model_score == losses.validation[best]


def test_the_best_is_of_the_step_that_was_best(tmp_path: Path) -> None:
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0}
    checkpoint = make_checkpoint(tmp_path, "val/other", filename="{step}", save_top_k=2)
    train(checkpoint, Losses(values))
    assert names(tmp_path) == {"4.ckpt", "6.ckpt"}
    assert checkpoint.best_model_path == str(tmp_path / "4.ckpt")
    assert load_checkpoint(tmp_path / "4.ckpt")["global_step"] == 4


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_never_the_best(mode: str, tmp_path: Path) -> None:
    values = {2: math.nan, 4: math.inf if mode == "max" else -math.inf, 6: 2.0, 8: math.nan}
    checkpoint = make_checkpoint(tmp_path, "val/other", filename="{step}", save_top_k=1, mode=mode)
    train(checkpoint, Losses(values))
    assert names(tmp_path) == {"6.ckpt"}
    assert checkpoint.best_model_score == 2.0


@pytest.mark.parametrize(
    ("every", "micro_batches", "interval", "saved"),
    [
        # Written at the first validation from when it is due.
        (2, 1, 3, (3, 6)),
        (4, 1, 1, (4, 8)),
        # In the middle of a step, the weights are those of the step before.
        (2, 2, 5, (2, 5, 7)),
        (4, 2, 2, (4, 8)),
    ],
)
def test_a_checkpoint_that_is_due_waits_for_the_next_validation(
    every: int, micro_batches: int, interval: int, saved: tuple[int, ...], tmp_path: Path
) -> None:
    losses = Losses()
    train(
        make_checkpoint(tmp_path, every_n_train_steps=every), losses, val_check_interval=interval,
        accumulate_grad_batches=micro_batches,
    )  # fmt: skip
    assert names(tmp_path) == {f"{step}-{losses.validation[step]:.5f}.ckpt" for step in saved}


def test_a_metric_of_training_is_of_its_own_step_too(tmp_path: Path) -> None:
    losses = Losses()
    checkpoint = make_checkpoint(tmp_path, "train/loss", save_top_k=1)
    train(checkpoint, losses, accumulate_grad_batches=2)
    best = min((2, 4, 6, 8), key=lambda step: losses.training[step])
    assert names(tmp_path) == {f"{best}-{losses.training[best]:.5f}.ckpt"}


@pytest.mark.parametrize(
    ("gone", "save_top_k", "ranked", "left"),
    [
        ((), 2, {4, 8}, {4, 8}),
        # Deleted after the checkpoint from which the run is continued: better than 8, but not there.
        ((4,), 2, {6, 8}, {6, 8}),
        ((), 1, {4}, {4, 6}),
    ],
    ids=["all there", "one gone", "fewer asked for"],
)
def test_the_ranking_goes_on_when_the_run_is_continued(
    gone: tuple[int, ...], save_top_k: int, ranked: set[int], left: set[int], tmp_path: Path
) -> None:
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}
    train(make_checkpoint(tmp_path, "val/other", filename="{step}", save_top_k=2), Losses(values), max_steps=6)
    assert names(tmp_path) == {"4.ckpt", "6.ckpt"}
    state = load_checkpoint(tmp_path / "6.ckpt")["callbacks"]
    assert any(key.startswith("ModelCheckpoint{") for key in state), "as checkpoints of stock callbacks have it"
    (tmp_path / "5.ckpt").write_text("of somebody else")
    for step in gone:
        (tmp_path / f"{step}.ckpt").unlink()
    checkpoint = make_checkpoint(tmp_path, "val/other", filename="{step}", save_top_k=save_top_k)
    train(checkpoint, Losses(values), ckpt_path=str(tmp_path / "6.ckpt"))
    assert {Path(path).name for path in checkpoint.best_k_models} == {f"{step}.ckpt" for step in ranked}
    # That which the run was continued from is never deleted.
    assert names(tmp_path) == {f"{step}.ckpt" for step in left | {5, 6}}


class EndInValidation(L.Callback):
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 4:
            raise KeyError("killed")


@pytest.mark.parametrize("quant", [{"start_step": 3}, {"enabled": False}], ids=["quantized", "not quantized"])
def test_a_validation_that_was_cut_short_behind_the_last_step_is_made_up_for(quant: dict[str, Any], tmp_path: Path) -> None:
    whole, rest = Losses(), Losses()
    train(make_checkpoint(tmp_path / "whole", None, filename="{step}"), whole, make(**quant), max_steps=4)
    with pytest.raises(KeyError, match="killed"):
        train(make_checkpoint(tmp_path, None, filename="{step}"), EndInValidation(), make(**quant), max_steps=4)
    train(make_checkpoint(tmp_path, None, filename="{step}"), rest, make(**quant), max_steps=4, ckpt_path=f"{tmp_path}/4.ckpt")
    assert rest.validation == {4: whole.validation[4]}


@pytest.mark.parametrize("options", [{"val_check_interval": 9}, {"limit_val_batches": 0}], ids=str)
def test_a_run_without_validations_cannot_rank_by_them(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="monitor=val/loss .* needs a validation: trainer.val_check_interval must be at most"):
        train(make_checkpoint(tmp_path), Losses(), **options)


@pytest.mark.parametrize("name", ["val/los", "los"])
def test_a_metric_that_is_not_there_ends_the_run_with_the_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"monitor of a checkpoint must be one of .*train/loss.*, val/loss.*got {name}"):
        train(make_checkpoint(tmp_path, name, filename="{step}"), Losses())


def test_slips_of_options_are_still_refused() -> None:
    options = {"_target_": "nvfp4_train.callbacks.checkpoint.Checkpoint", "every_n_train_step": 5}
    with pytest.raises(ValueError, match="every_n_train_step: no such option; did you mean every_n_train_steps"):
        check_targets({"callbacks": {"checkpoint": options}})
