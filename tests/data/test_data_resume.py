"""What the data module relies on in Lightning: when global_step is restored, loaders without length, validation by batches."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from nvfp4_train.data.module import DataConfig, TextDataModule

STEPS, SAVED = 9, 4


class Recorder(L.LightningModule):
    """A model that trains, draws from the global generator (dropout) and remembers the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(257, 8)
        self.dropout = torch.nn.Dropout(0.5)
        self.batches: list[Tensor] = []
        self.validated_after: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches.append(batch["input_ids"])
        return self.dropout(self.embedding(batch["input_ids"])).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert batch["input_ids"].shape[1] == 32

    def on_validation_end(self) -> None:
        self.validated_after.append(len(self.batches))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveInWindow(L.Callback):
    """Saves in the middle of the second window of two: by the validation after batch 3, or within batch 3 or 4."""

    def __init__(self, file: Path, moment: str) -> None:
        self.file = file
        self.moment = moment

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.moment == "validation" and len(pl_module.batches) == 3:
            trainer.save_checkpoint(self.file)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.moment == f"batch {len(pl_module.batches)}":
            trainer.save_checkpoint(self.file)


def train(
    corpus: Path,
    folder: Path,
    accumulate: int,
    num_workers: int = 0,
    ckpt_path: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> Recorder:
    config = DataConfig(path=str(corpus), seq_len=32, batch_size=2, val_fraction=0.2, val_sequences=4, num_workers=num_workers)
    model = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1), *callbacks],
    )
    torch.manual_seed(1)
    trainer.fit(model, datamodule=TextDataModule(config, seed=5), ckpt_path=ckpt_path, weights_only=True)
    assert trainer.global_step == STEPS
    return model


@pytest.mark.parametrize(("accumulate", "num_workers"), [(1, 0), (2, 0), (2, 2)])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(
    corpus: Path, tmp_path: Path, accumulate: int, num_workers: int
) -> None:
    whole = train(corpus, tmp_path / "whole", accumulate, num_workers)
    assert len(whole.batches) == STEPS * accumulate
    # The sanity check validates before the first batch.
    assert whole.validated_after == [0, *range(3, STEPS * accumulate + 1, 3)]
    rest = train(corpus, tmp_path / "rest", accumulate, num_workers, tmp_path / "whole" / f"step={SAVED}.ckpt")
    assert torch.equal(torch.stack(rest.batches), torch.stack(whole.batches[SAVED * accumulate :]))


@pytest.mark.parametrize("moment", ["validation", "batch 3", "batch 4"])
def test_a_window_that_the_checkpoint_interrupts_is_repeated_whole(corpus: Path, tmp_path: Path, moment: str) -> None:
    """Without the rewind, the first step after the restart took one micro-batch of two, and the order was off from there."""
    file = tmp_path / "interrupted.ckpt"
    whole = train(corpus, tmp_path / "whole", accumulate=2, callbacks=[SaveInWindow(file, moment)])
    rest = train(corpus, tmp_path / "rest", accumulate=2, ckpt_path=file)
    assert torch.equal(torch.stack(rest.batches), torch.stack(whole.batches[2:]))
    # Counted in batches since the restart: batch 3 is validated again, and there is no second sanity check.
    assert rest.validated_after == list(range(1, 2 * STEPS - 1, 3))


def test_training_warns_of_nothing_but_few_workers(corpus: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(corpus, tmp_path / "run", accumulate=2, num_workers=0)
    # Deprecations inside torch and Lightning are theirs.
    ours = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    assert all("does not have many workers" in message for message in ours)
