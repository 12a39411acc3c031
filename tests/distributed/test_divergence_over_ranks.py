"""A NaN on one rank ends all ranks at the same step, and checkpoints that are being written are finished first."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from break_step import BreakStep
from ranks import run_ranks
from small_runs import Tokens, make_module, make_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nvfp4_train.callbacks.checkpoint import Checkpoint
from nvfp4_train.callbacks.divergence import Divergence
from nvfp4_train.checkpoints import read_checkpoint
from nvfp4_train.finite import Diverged, gradient_norms

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"how": "ddp"},
    "fsdp2": {"how": "fsdp2"},
    "fsdp2, in the background": {"how": "fsdp2", "sharding": {"async_checkpoint": True}},
}
BREAKS: dict[str, dict[str, Any]] = {
    "gradient": {"what": "gradient", "name": "model.layers.1.mlp.down_proj.weight", "value": float("nan")},
    "loss": {"what": "loss", "value": float("inf")},
    # The forward computes with what the weight was quantized to before.
    "weight": {"what": "weight", "name": "model.layers.0.mlp.up_proj.weight", "value": float("nan")},
}
EXPECTED = {
    "gradient": "step 3: the gradient of model.layers.1.mlp.down_proj.weight is not finite (NaN); continue from ",
    "loss": "step 3: the loss of micro-batch 2 of 2 is not finite (Inf); continue from ",
    "weight": "step 4: the loss of micro-batch 1 of 2 is not finite (NaN); continue from ",
}

RUNS = [("ddp", "gradient"), ("ddp", "loss"), ("fsdp2", "weight"), ("fsdp2, in the background", "gradient")]


def train_all(folder: str) -> dict[str, str]:
    """The error of every run, by way and kind. They save after steps 2 and 4, and look at step 4 or at the checkpoint."""
    found = {}
    for way, kind in RUNS:
        name = f"{way}, {kind}"
        checkpoint = Checkpoint(
            dirpath=f"{folder}/{name}", filename="{step}", every_n_train_steps=2, save_top_k=1, enable_version_counter=False
        )
        trainer = make_trainer(
            **WAYS[way],
            callbacks=(Divergence(), BreakStep(step=3, rank=1, **BREAKS[kind]), checkpoint),
            max_steps=8,
            accumulate_grad_batches=2,
            enable_checkpointing=True,
        )
        # Where nothing is logged before, the checkpoint of step 4 is not written.
        trainer.log_every_n_steps = 4 if kind == "loss" else 100
        try:
            trainer.fit(make_module(), Tokens(64))
        except Diverged as error:
            found[name] = f"{trainer.global_step} {error}"
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(2, train_all, f"{folder}", gpus=False)


@pytest.mark.parametrize(("way", "kind"), RUNS)
def test_all_ranks_end_with_one_message_and_keep_the_finite_checkpoint(
    way: str, kind: str, runs: tuple[Path, list[dict[str, str]]]
) -> None:
    folder, ranks = runs
    saved = folder / f"{way}, {kind}" / "step=2.ckpt"
    for rank in ranks:
        assert rank[f"{way}, {kind}"].startswith(f"4 {EXPECTED[kind]}{saved} ")
    assert os.listdir(saved.parent) == [saved.name]
    weights = read_checkpoint(saved)["state_dict"]
    assert all(weight.isfinite().all() for weight in weights.values() if weight.is_floating_point())


def clip_both_ways() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(rows, 8, generator=generator) for rows in (1, 3, 16, 5)]
    parameters = []
    for _ in range(2):
        for whole in wholes:
            parameter = torch.nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(whole.clone(), mesh, [Shard(0)])
            parameters.append(parameter)
    ours, theirs = parameters[:4], parameters[4:]
    total, each = gradient_norms(ours)
    torch.nn.utils.clip_grads_with_norm_(ours, 0.5, total)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    return {
        "totals": [total.full_tensor(), expected.full_tensor()],
        "gradients": [[parameter.grad.to_local() for parameter in some] for some in (ours, theirs)],
        "each": each,
    }


def test_norm_and_clipped_gradients_of_shards_have_the_bits_of_torch() -> None:
    ranks = run_ranks(2, clip_both_ways, gpus=False)
    for rank in ranks:
        assert torch.equal(*rank["totals"])
        assert all(torch.equal(our, their) for our, their in zip(*rank["gradients"], strict=True))
    assert type(ranks[0]["each"]) is torch.Tensor
    assert ranks[1]["each"][0] == 0, "this rank has no row of the first"
    both = torch.stack([rank["each"] for rank in ranks]).square().sum().sqrt()
    torch.testing.assert_close(both, ranks[0]["totals"][0])
