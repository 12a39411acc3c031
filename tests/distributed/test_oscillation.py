"""The control of oscillation does the same on one rank and on two, replicated or sharded, and over a stop."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from small_runs import StopAndSave, Tokens, make_module, make_trainer
from whole import whole_tensors

from nvfp4_train.callbacks.oscillation import OscillationControl

STEPS, FIRST, ACTED = 8, 2, 5
"""Steps of a run, the one whose codes are the first to be remembered, and the first that acts: codes are looked at a step later."""
LOOKED_AT = (ACTED - 1, ACTED, STEPS)
PARTS = ("history", "logged", "masters", "served")
EXPERTS = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "rope_theta": 10000.0}
CASES: dict[str, dict[str, Any]] = {
    "reset": {"action": "reset"},
    "freeze": {"action": "freeze"},
    # Steps of the rule flip codes, too.
    "fitted": {"action": "freeze", "quant": {"rule": "hessian", "refit_every": 1}},
    "experts": {"action": "freeze", "model": EXPERTS},
    # The second of two micro-batches is followed by validation, in the middle of a window. It begins at the switch.
    "validation": {
        "action": "reset",
        "val_check_interval": 1,
        "limit_val_batches": 1.0,
        "sequences": 4,
        "model": {"tie_word_embeddings": True},
        "quant": {"start_step": FIRST},
        "from_share": 0.0,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "one": {"how": "auto"},
    "ddp": {"how": "ddp"},
    "fsdp2": {"how": "fsdp2"},
    "bf16": {"how": "fsdp2", "quant": {"gather": "bf16"}},
}
ON_TWO = (
    ("reset", "ddp"),
    ("freeze", "fsdp2"),
    ("freeze", "bf16"),
    ("fitted", "ddp"),
    ("experts", "fsdp2"),
    ("validation", "fsdp2"),
)


class Watched(L.Callback):
    """What is logged at each action, the masters before the next step, and the memory of the quantizer at the end."""

    def __init__(self) -> None:
        self.logged: dict[str, dict[str, float]] = {}
        self.masters: dict[str, dict[str, torch.Tensor]] = {}
        self.history: dict[str, torch.Tensor] = {}
        self.served: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 0:
            return
        shares = {name: value for name, value in pl_module.results.items() if name.endswith("_share")}
        self.logged[f"{trainer.global_step}"] = shares
        if trainer.global_step in LOOKED_AT:
            self.masters[f"{trainer.global_step}"] = masters_of(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = whole_tensors(pl_module.quant_state)
        self.history = {name: tensor.cpu().clone() for name, tensor in state if name.endswith(".history")}
        self.served = {name: pl_module.store.compute_weight(name).cpu().clone() for name in pl_module.store.names}


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
    watched = Watched()
    control = OscillationControl(action=action, from_share=from_share, every_n_steps=2, min_reversals=1)
    accumulate = sequences // torch.distributed.get_world_size()
    trainer = make_trainer(
        how,
        callbacks=(watched, *([StopAndSave(*save)] if save else [])),
        sharding=sharding,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        **options,
    )
    trainer.callbacks.insert(0, control)
    trainer.fit(make_module(model, **(quant or {})), Tokens(sequences * STEPS), ckpt_path=resume, weights_only=True)
    return {part: getattr(watched, part) for part in PARTS}


def merged(case: str, way: str) -> dict[str, Any]:
    options, of_way = CASES[case], WAYS[way]
    return options | of_way | {"quant": options.get("quant", {}) | of_way.get("quant", {})}


def train_on_one() -> dict[str, Any]:
    return {case: train(**merged(case, "one")) for case in CASES} | {"off": train("auto", action=None)}


def train_on_two() -> dict[str, Any]:
    return {f"{case} {way}": train(**merged(case, way)) for case, way in ON_TWO}


@pytest.fixture(scope="module")
def ones() -> dict[str, Any]:
    return run_ranks(1, train_on_one, gpus=False)[0]


@pytest.fixture(scope="module")
def twos() -> list[dict[str, Any]]:
    """By rank."""
    return run_ranks(2, train_on_two, gpus=False)


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
def test_there_is_something_to_control(case: str, ones: dict[str, Any]) -> None:
    one = ones[case]
    when = [int(step) for step, shares in one["logged"].items() if "quant/oscillating_share" in shares]
    assert when[0] == ACTED
    assert 0 < one["logged"][f"{ACTED}"]["quant/oscillating_share"] < 1
    assert len(one["history"]) == len(one["served"])
    frozen = torch.cat([history.flatten() >> 4 == 15 for history in one["history"].values()]).double().mean().item()
    if CASES[case]["action"] == "freeze":
        assert frozen == one["logged"][f"{STEPS}"]["quant/frozen_share"] > 0
    else:
        assert frozen == 0


@pytest.mark.parametrize(("case", "way"), ON_TWO)
def test_two_ranks_do_what_one_does(case: str, way: str, ones: dict[str, Any], twos: list[dict[str, Any]]) -> None:
    for rank in twos:
        assert_same(rank[f"{case} {way}"], ones[case])


@pytest.mark.parametrize("case", ["reset", "freeze"])
def test_nothing_happens_before_it_begins(case: str, ones: dict[str, Any]) -> None:
    before, at = f"{ACTED - 1}", f"{ACTED}"
    assert_same(ones[case]["masters"][before], ones["off"]["masters"][before])
    with pytest.raises(AssertionError):
        assert_same(ones[case]["masters"][at], ones["off"]["masters"][at])


def test_off_adds_nothing(ones: dict[str, Any]) -> None:
    assert ones["off"]["history"] == {}
    assert ones["off"]["logged"][f"{STEPS}"] == {}


def test_frozen_weights_keep_their_served_value_while_others_train(ones: dict[str, Any]) -> None:
    """Up to the scale of their block, which the others move."""
    is_kept: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for name, master in ones["freeze"]["masters"][f"{STEPS}"].items():
        is_frozen = ones["freeze"]["history"][f"{name}.history"] >> 4 == 15
        is_served = master == ones["freeze"]["served"][name].float()
        is_kept[True].append(is_served[is_frozen])
        is_kept[False].append(is_served[~is_frozen])
    assert torch.cat(is_kept[True]).float().mean() > 0.75
    assert torch.cat(is_kept[False]).float().mean() < 0.01


def stop(case: str, way: str, path: str) -> None:
    # In the middle of the second window.
    train(**merged(case, way), save=(6, path))


def go_on(case: str, way: str, path: str) -> dict[str, Any]:
    return train(**merged(case, way), resume=path)


@pytest.mark.parametrize(
    ("case", "stopped", "resumed"),
    [("freeze", (2, "fsdp2"), (2, "fsdp2")), ("fitted", (1, "one"), (2, "fsdp2"))],
    ids=str,
)
def test_a_run_that_stops_and_continues_ends_with_the_same_bits(
    case: str, stopped: tuple[int, str], resumed: tuple[int, str], tmp_path: Path, ones: dict[str, Any]
) -> None:
    """On any ranks: here two add up to what one does."""
    path = str(tmp_path / "stopped.ckpt")
    run_ranks(stopped[0], stop, case, stopped[1], path, gpus=False)
    for rank in run_ranks(resumed[0], go_on, case, resumed[1], path, gpus=False):
        for part in ("history", "served"):
            assert_same(rank[part], ones[case][part])
        assert_same(rank["masters"][f"{STEPS}"], ones[case]["masters"][f"{STEPS}"])
