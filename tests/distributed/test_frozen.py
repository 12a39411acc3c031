"""Parameters that are not trained keep their bits under DDP and FSDP2, and the others train as they do on one device."""

from typing import Any

import lightning as L
import pytest
import torch
from ranks import on_gpus, run_ranks
from small_runs import Tokens, make_module, make_trainer, snapshot

from nvfp4_train.optim import OptimConfig

# A whole unit, quantized weights beside ones that train in another, and a norm.
FROZEN = ("*embed_tokens*", "lm_head*", "model.layers.0.mlp.*", "model.layers.1.input_layernorm.*")
WAYS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"how": "auto"}},
    2: {
        "ddp": {"how": "ddp"},
        "fsdp2": {"how": "fsdp2"},
        "fsdp2, recomputing": {"how": "fsdp2", "model": {"gradient_checkpointing": True}},
        "fsdp2, kept after forward": {"how": "fsdp2", "sharding": {"reshard_after_forward": False}},
    },
}


class Masters(L.Callback):
    """Takes the masters when the model has been prepared, and at the end."""

    def __init__(self) -> None:
        self.taken: dict[str, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken["start"] = snapshot(pl_module)["masters"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken["end"] = snapshot(pl_module)["masters"]


def train_all(world_size: int) -> dict[str, Any]:
    found = {}
    for name, options in WAYS[world_size].items():
        module = make_module(options.get("model"))
        module.optim_config = OptimConfig(lr=1e-2, weight_decay=0.1, frozen=FROZEN)
        masters = Masters()
        trainer = make_trainer(
            options["how"],
            sharding=options.get("sharding"),
            callbacks=(masters,),
            max_steps=2,
            accumulate_grad_batches=4 // world_size,
        )
        trainer.fit(module, Tokens(8))
        found[name] = masters.taken
    return found


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    by_size = [run_ranks(world_size, train_all, world_size, gpus=on_gpus(2)) for world_size in WAYS]
    return {name: [rank[name] for rank in ranks] for ranks in by_size for name in ranks[0]}


@pytest.mark.parametrize("way", [name for ways in WAYS.values() for name in ways])
def test_what_is_frozen_keeps_its_bits_and_all_else_trains(way: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    for rank in runs[way]:
        kept = {name for name, master in rank["start"].items() if torch.equal(master, rank["end"][name])}
        assert kept == {
            "model.embed_tokens.weight",
            "lm_head.weight",
            *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
            "model.layers.1.input_layernorm.weight",
        }


@pytest.mark.parametrize("way", WAYS[2])
def test_the_rest_trains_as_on_one_device(way: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    (one,), ddp = runs["one"], runs["ddp"][0]
    for rank in runs[way]:
        for name, master in one["end"].items():
            torch.testing.assert_close(rank["end"][name], master, rtol=1e-5, atol=1e-6)
            assert torch.equal(rank["end"][name], ddp["end"][name]), name
