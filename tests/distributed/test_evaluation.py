"""After training, Lightning's own evaluation computes with the quantized weights of the masters that it finds."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from small_runs import Tokens, make_module, make_trainer
from torch import distributed
from torch.utils.data import DataLoader

SEQUENCES_PER_STEP, STEPS = 4, 3


class MaskedTokens(Tokens):
    """Held-out sequences of which 1, 2, 3, ... positions count: an odd number of them on all ranks, and another one on each."""

    def val_dataloader(self) -> DataLoader:
        batches = super().val_dataloader().dataset
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        for place, batch in enumerate(batches):
            batch["loss_mask"] = (torch.arange(12) <= 1 + (rank + place * world_size) % 9)[None]
        return DataLoader(batches, batch_size=None)


class SaveEarlier(L.Callback):
    """Saves a checkpoint after the first step, with the quantized loss of then."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1 and not hasattr(self, "loss"):
            trainer.save_checkpoint(self.path)
            self.loss = pl_module.evaluate(trainer.datamodule.val_dataloader())["loss"]


def fit_and_validate(world_size: int, how: str, path: str) -> dict[str, float]:
    # Predictions far from uniform, which quantization changes.
    module = make_module({"initializer_range": 0.2})
    earlier = SaveEarlier(path)
    trainer = make_trainer(
        how,
        callbacks=(earlier,),
        max_steps=STEPS,
        accumulate_grad_batches=SEQUENCES_PER_STEP // world_size,
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=1000,
    )
    data = MaskedTokens(SEQUENCES_PER_STEP * STEPS)
    trainer.fit(module, data)
    losses = {"quantized": module.results["val/loss_quantized"], "master": module.results["val/loss_master"]}
    losses["validated"] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    losses["earlier"] = earlier.loss
    losses["validated, earlier"] = trainer.validate(module, data, ckpt_path=path, weights_only=True, verbose=False)[0][
        "val/loss"
    ]
    return losses


@pytest.mark.parametrize(("world_size", "how"), [(1, "fsdp2"), (2, "ddp"), (2, "fsdp2")])
def test_validation_is_of_the_quantized_weights(world_size: int, how: str, tmp_path: Path) -> None:
    for losses in run_ranks(world_size, fit_and_validate, world_size, how, f"{tmp_path / 'earlier.ckpt'}"):
        assert losses["master"] != pytest.approx(losses["quantized"], rel=1e-4)
        assert losses["earlier"] != pytest.approx(losses["quantized"], rel=1e-3)
        assert losses["validated"] == pytest.approx(losses["quantized"], rel=1e-6)
        assert losses["validated, earlier"] == pytest.approx(losses["earlier"], rel=1e-6)
