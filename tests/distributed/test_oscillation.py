"""The control of oscillation does the same on one rank and on two, replicated or sharded, and over a stop."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from small_runs import Snapshots, StopAndSave, Tokens, make_module, make_trainer
from whole import whole_tensors

from nvfp4_train.callbacks.oscillation import OscillationControl
from nvfp4_train.callbacks.requantize import Requantize

STEPS, FIRST = 10, 3
"""Steps of a run, and the one whose codes are the first to be remembered."""
EXPERTS = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "rope_theta": 10000.0}
CASES: dict[str, dict[str, Any]] = {
    "reset": {"action": "reset"},
    "freeze": {"action": "freeze"},
    # Steps of the rule flip codes, too.
    "fitted": {"action": "freeze", "quant": {"rule": "hessian", "refit_every": 1}},
    # The second of two micro-batches is followed by validation, in the middle of a window.
    "validation in a window": {"action": "reset", "val_check_interval": 1, "limit_val_batches": 1.0, "sequences": 4},
    "experts": {"action": "freeze", "model": EXPERTS},
    "tied, from the switch on": {
        "action": "reset",
        "model": {"tie_word_embeddings": True},
        "quant": {"start_step": FIRST},
        "from_share": 0.0,
    },
}
WAYS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"how": "auto"}},
    2: {"ddp": {"how": "ddp"}, "fsdp2": {"how": "fsdp2"}, "bf16": {"how": "fsdp2", "quant": {"gather": "bf16"}}},
}


class Watched(L.Callback):
    """What is logged at each action, the masters before the next step, and the memory of the quantizer at the end."""

    def __init__(self) -> None:
        self.logged: dict[str, dict[str, float]] = {}
        self.masters: dict[str, dict[str, torch.Tensor]] = {}
        self.history: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        shares = {name: value for name, value in pl_module.results.items() if name.endswith("_share")}
        self.logged[f"{trainer.global_step}"] = shares
        self.masters[f"{trainer.global_step}"] = masters_of(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = whole_tensors(pl_module.quant_state)
        self.history = {name: tensor.cpu().clone() for name, tensor in state if name.endswith(".history")}


def masters_of(module: Any) -> dict[str, torch.Tensor]:
    weights = dict(whole_tensors(module.model))
    return {name: weights[name].cpu().clone() for name in module.store.names}


def train(
    how: str,
    *,
    action: str | None,
    from_share: float = FIRST / STEPS,
    sequences: int = 2,
    model: dict[str, Any] | None = None,
    quant: dict[str, Any] | None = None,
    save: tuple[int, str] | None = None,
    resume: str | None = None,
    sharding: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    snapshots, watched = Snapshots(), Watched()
    control = OscillationControl(action=action, from_share=from_share, every_n_steps=3, min_reversals=1)
    accumulate = sequences // torch.distributed.get_world_size()
    trainer = make_trainer(
        how,
        callbacks=(snapshots, watched, *([StopAndSave(*save)] if save else [])),
        sharding=sharding,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        **options,
    )
    trainer.callbacks.insert(0, control)
    trainer.fit(make_module(model, **(quant or {})), Tokens(sequences * STEPS), ckpt_path=resume, weights_only=True)
    return {
        "end": snapshots.taken["end"],
        "losses": snapshots.taken["losses"],
        "logged": watched.logged,
        "masters": watched.masters,
        "history": watched.history,
    }


def merged(case: dict[str, Any], way: dict[str, Any]) -> dict[str, Any]:
    return case | way | {"quant": case.get("quant", {}) | way.get("quant", {})}


def train_all(world_size: int) -> dict[str, Any]:
    return {
        f"{case} {way}": train(**merged(options, of_way))
        for case, options in CASES.items()
        for way, of_way in WAYS[world_size].items()
    } | ({"off one": train("auto", action=None)} if world_size == 1 else {})


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """By case and way, what every rank has."""
    found = {}
    for world_size in WAYS:
        by_rank = run_ranks(world_size, train_all, world_size, gpus=False)
        found |= {name: [rank[name] for rank in by_rank] for name in by_rank[0]}
    return found


def assert_same(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.mark.parametrize("case", CASES)
def test_there_is_something_to_control(case: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = runs[f"{case} one"]
    # The codes of a step are looked at after the next one, and three steps later a window of three ends.
    when = [int(step) for step, shares in one["logged"].items() if "quant/oscillating_share" in shares]
    assert when[0] == FIRST + 4
    assert 0 < one["logged"][f"{FIRST + 4}"]["quant/oscillating_share"] < 1
    assert len(one["history"]) == len(one["end"]["codes"])
    frozen = torch.cat([history.flatten() >> 4 == 15 for history in one["history"].values()]).double().mean().item()
    if CASES[case]["action"] == "freeze":
        assert frozen == one["logged"][f"{STEPS}"]["quant/frozen_share"] > 0
    else:
        assert frozen == 0


@pytest.mark.parametrize("way", [way for ways in WAYS.values() for way in ways if way != "one"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_what_one_does(case: str, way: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = runs[f"{case} one"]
    for rank in runs[f"{case} {way}"]:
        for part in ("history", "logged", "masters"):
            assert_same(rank[part], one[part])


@pytest.mark.parametrize("case", ["reset", "freeze"])
def test_nothing_happens_before_it_begins(case: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    (one,), (off,) = runs[f"{case} one"], runs["off one"]
    for step in range(1, FIRST + 4):
        assert_same(one["masters"][f"{step}"], off["masters"][f"{step}"])
    with pytest.raises(AssertionError):
        assert_same(one["masters"][f"{FIRST + 4}"], off["masters"][f"{FIRST + 4}"])


def test_off_adds_nothing(runs: dict[str, list[dict[str, Any]]]) -> None:
    (off,) = runs["off one"]
    assert off["history"] == {}
    assert off["logged"][f"{STEPS}"] == {}


def test_frozen_weights_keep_their_served_value_while_others_train(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Up to the scale of their block, which the others move; most scales stay from one step to the next."""
    (one,) = runs["freeze one"]
    frozen_at = f"{FIRST + 4}"
    num_frozen = num_kept = 0
    for name, first in one["masters"][frozen_at].items():
        is_frozen = one["history"][f"{name}.history"] >> 4 == 15
        last = one["masters"][f"{STEPS}"][name]
        served = one["end"]["compute_weights"][name]
        assert (last != first)[~is_frozen].float().mean() > 0.9
        num_frozen += int(is_frozen.sum())
        num_kept += int((served == last.to(served.dtype))[is_frozen].sum())
    assert num_kept > 0.9 * num_frozen > 0


def stop(way: str, path: str, case: str) -> dict[str, Any]:
    # In the middle of the second window.
    return train(**merged(CASES[case], WAYS[2][way]), save=(8, path))


def go_on(way: str, path: str, case: str) -> dict[str, Any]:
    return train(**merged(CASES[case], WAYS[2][way]), resume=path)


@pytest.mark.parametrize(("case", "stopped", "resumed"), [("freeze", "ddp", "fsdp2"), ("fitted", "fsdp2", "ddp"), ("reset", "fsdp2", "fsdp2")])
def test_a_run_that_stops_and_continues_ends_with_the_same_bits(
    case: str, stopped: str, resumed: str, tmp_path: Path, runs: dict[str, list[dict[str, Any]]]
) -> None:
    path = str(tmp_path / "stopped.ckpt")
    run_ranks(2, stop, stopped, path, case, gpus=False)
    for rank in run_ranks(2, go_on, resumed, path, case, gpus=False):
        (one,) = runs[f"{case} one"]
        assert_same(rank["history"], one["history"])
        assert_same(rank["masters"][f"{STEPS}"], one["masters"][f"{STEPS}"])
