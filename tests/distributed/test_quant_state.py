"""What the quantizer has measured and chosen at the switch is the same on any number of ranks, replicated or sharded."""

from typing import Any

import lightning as L
import pytest
import torch
from ranks import on_gpus, run_ranks
from small_runs import Tokens, make_module, make_trainer
from whole import whole_tensors

WAYS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"how": "auto"}, "one, sharded": {"how": "fsdp2"}},
    2: {"ddp": {"how": "ddp"}, "fsdp2": {"how": "fsdp2"}, "fsdp2, gathered as bf16": {"how": "fsdp2", "gather": "bf16"}},
}
LEAVES = {"input_scale": 8, "hessian": 8, "steps": 14}


class Remembered(L.Callback):
    """Takes what the module holds at the switch and at the end."""

    def __init__(self) -> None:
        self.taken: dict[str, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken["switch"] = held(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken["end"] = held(pl_module)


def held(module: Any) -> dict[str, torch.Tensor]:
    tensors = {
        name: tensor.cpu().clone() for part in (module.model, module.quant_state) for name, tensor in whole_tensors(part)
    }
    return tensors | {f"{name}, served": module.store.compute_weight(name).cpu().clone() for name in module.store.names}


def train_all(world_size: int) -> dict[str, Any]:
    """Two steps, after each of which the rule chooses anew, in each way."""
    found = {}
    for name, options in WAYS[world_size].items():
        quant = {"rule": "hessian", "activations": "nvfp4", "refit_every": 1, "gather": options.get("gather", "packed")}
        remembered = Remembered()
        trainer = make_trainer(options["how"], callbacks=(remembered,), max_steps=2, accumulate_grad_batches=4 // world_size)
        trainer.fit(make_module(**quant), Tokens(8))
        found[name] = remembered.taken
    return found


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """By way, what every rank has."""
    by_size = [run_ranks(world_size, train_all, world_size, gpus=on_gpus(2)) for world_size in WAYS]
    return {name: [rank[name] for rank in ranks] for ranks in by_size for name in ranks[0]}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many elements differ, by name."""
    assert first.keys() == second.keys()
    counts = {name: int((tensor != second[name]).sum()) for name, tensor in first.items()}
    return {name: count for name, count in counts.items() if count}


def test_there_is_something_to_compare(runs: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = runs["one"]
    for leaf, number in LEAVES.items():
        tensors = [tensor for name, tensor in one["switch"].items() if name.endswith(f".{leaf}")]
        assert len(tensors) == number
        assert all(tensor.any() for tensor in tensors), leaf
    assert len(differing(one["switch"], one["end"])) > 14


@pytest.mark.parametrize("way", [name for ways in WAYS.values() for name in ways if name != "one"])
def test_every_way_has_measured_and_chosen_what_one_device_has(way: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = runs["one"]
    for rank in runs[way]:
        assert differing(rank["switch"], one["switch"]) == {}


def test_two_ranks_choose_the_same_until_the_end(runs: dict[str, list[dict[str, Any]]]) -> None:
    first, *others = (rank for way in WAYS[2] for rank in runs[way])
    for other in others:
        assert differing(first["end"], other["end"]) == {}
