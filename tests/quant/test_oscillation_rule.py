"""Weights that oscillate are found and set to the centres of their bins; all others are left to the optimizer."""

from typing import Any

import pytest
import torch
from torch import nn

from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.oscillation import Oscillation, OscillationRule, OscillationShares
from nvfp4_train.quant.served import show_served
from nvfp4_train.quant.store import ReplicatedWeightStore


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 8, 32))


class Run:
    """A linear, a linear that shares its weight, and experts; after each step the masters are what `move` makes of them."""

    def __init__(
        self, action: str | None, *, every_n_steps: int = 4, min_reversals: int = 2, rule: ScaleRule | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"a": nn.Linear(32, 8), "b": nn.Linear(32, 8), "experts": Experts()})
        self.model["b"].weight = self.model["a"].weight
        names = ("a.weight", "b.weight"), ("experts.up",)
        self.store = ReplicatedWeightStore(
            self.model, QuantManifest(groups=names, rule=rule or ScaleRule()), show_served(self.model)
        )
        self.store.keep_history()
        self.masters = {"a.weight": self.model["a"].weight.data, "experts.up": self.model["experts"].up.data}
        for master in self.masters.values():
            # The first of a block is its amax, so that scales stay. 1.75 is the edge between the codes of 1.5 and 2.
            master.fill_(1.5)
            master[..., ::16] = 6
        self.store.update()
        options: dict[str, Any] = {"action": action, "every_n_steps": every_n_steps, "min_reversals": min_reversals}
        self.oscillation = Oscillation(self.store, OscillationRule(**options))
        self.number = 0

    def step(self, moved: dict[tuple[str, tuple[int, ...]], float]) -> OscillationShares | None:
        """An optimizer step to these masters, and the update after it."""
        for (name, place), value in moved.items():
            self.masters[name][place] = value
        found = self.oscillation.follow(self.number)
        self.number += 1
        self.store.update()
        return found

    def value(self, name: str, place: tuple[int, ...]) -> float:
        return self.masters[name][place].item()


BACK_AND_FORTH, DRIFT, STILL = ("a.weight", (3, 5)), ("a.weight", (2, 7)), ("a.weight", (0, 1))
OF_AN_EXPERT = "experts.up", (1, 7, 31)
EDGES = [1.7, 1.8, 1.7, 1.8, 1.7, 1.8]
"""Masters on both sides of the edge."""
DRIFTING = [1.8, 2.6, 3.6, 5.1, 5.2, 5.3]


def drive(run: Run, steps: int) -> list[OscillationShares | None]:
    return [
        run.step({BACK_AND_FORTH: edge, OF_AN_EXPERT: edge, DRIFT: drifting, STILL: 1.6})
        for edge, drifting in zip(EDGES[:steps], DRIFTING, strict=False)
    ]


NUM_WEIGHTS = 8 * 32 + 2 * 8 * 32


@pytest.mark.parametrize("global_scale", ["pow2", "exact"])
def test_reset_lands_on_the_centre_of_the_bin_once(global_scale: str) -> None:
    run = Run("reset", rule=ScaleRule(global_scale=global_scale))
    before = drive(run, 4)
    assert before == [None] * 4
    assert run.value(*BACK_AND_FORTH) == pytest.approx(1.8)
    served = run.store.compute_weight("a.weight")[BACK_AND_FORTH[1]].item()
    (found,) = (run.step({BACK_AND_FORTH: 1.7, OF_AN_EXPERT: 1.7, DRIFT: 5.2}),)
    # Codes of steps 0 to 4: three flips of each of the two, and four of the one that drifts.
    assert found == OscillationShares(flips=10 / NUM_WEIGHTS, acted_on=2 / NUM_WEIGHTS, frozen=0)
    exact = 2 if global_scale == "pow2" else pytest.approx(2, rel=0.07)
    for place in (BACK_AND_FORTH, OF_AN_EXPERT):
        assert run.value(*place) == exact, "of the code that was served, 2, and not of the master that came after it"
    if global_scale == "pow2":
        assert run.value(*BACK_AND_FORTH) == served
    assert run.value(*DRIFT) == pytest.approx(5.2)
    assert run.value(*STILL) == pytest.approx(1.6)
    run.step({BACK_AND_FORTH: 1.7})
    assert run.value(*BACK_AND_FORTH) == pytest.approx(1.7), "the optimizer goes on"


def test_frozen_weights_stay_while_others_train() -> None:
    run = Run("freeze")
    drive(run, 5)
    found = []
    for edge in (1.7, 9.0, -3.0, 1.8, 1.7):
        found.append(run.step({BACK_AND_FORTH: edge, OF_AN_EXPERT: edge, STILL: edge if abs(edge) < 6 else 5.0}))
        for place in (BACK_AND_FORTH, OF_AN_EXPERT):
            assert run.value(*place) == 2
        assert run.store.compute_weight("a.weight")[BACK_AND_FORTH[1]].item() == 2
    assert run.value(*STILL) == pytest.approx(1.7)
    (end,) = [shares for shares in found if shares is not None]
    # The third weight has gone up to 5 and down to -3 within that window: one reversal.
    assert (end.acted_on, end.frozen) == (0, 2 / NUM_WEIGHTS)


def test_without_an_action_weights_are_counted_alone() -> None:
    run = Run(None)
    found = [shares for shares in drive(run, 6) if shares is not None]
    assert found == [OscillationShares(flips=10 / NUM_WEIGHTS, acted_on=0, frozen=0)]
    assert run.value(*BACK_AND_FORTH) == pytest.approx(1.8)


def test_counts_start_anew_with_every_window() -> None:
    """One reversal in each of two windows is not two in one."""
    run = Run("reset", every_n_steps=3)
    found = [run.step({BACK_AND_FORTH: value}) for value in (1.7, 1.7, 1.8, 1.7, 1.7, 1.8, 1.7, 1.7)]
    assert [shares.acted_on for shares in found if shares is not None] == [0, 0]


def test_a_change_of_scale_counts() -> None:
    """The codes of a whole block flip with its scale, back and forth; that is what is served."""
    run = Run("reset")
    amax = "a.weight", (5, 16)
    for value in (6.0, 4.0, 6.0, 4.0, 6.0):
        found = run.step({amax: value})
    assert found is not None
    assert found.acted_on == 15 / NUM_WEIGHTS, "but for the amax, whose code is that of 6 under both"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "thaw"}, "action must be null, reset or freeze, got 'thaw'"),
        ({"min_reversals": 0}, "min_reversals must be 1 to 6, got 0"),
        ({"min_reversals": 7}, "min_reversals must be 1 to 6, got 7"),
        ({"every_n_steps": 2}, "every_n_steps must be above min_reversals=2, since .*, got 2"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OscillationRule(**{"action": "reset", "every_n_steps": 50, "min_reversals": 2} | options)


def test_history_is_there_on_request_alone() -> None:
    run = Run("reset")
    histories = {name: tuple(buffer.shape) for name, buffer in run.store.state.named_buffers() if name.endswith("history")}
    assert histories == {"a.weight.history": (8, 32), "experts.up.history": (2, 8, 32)}, "of a shared weight once"
    run.store.keep_history()
    model = nn.ModuleDict({"a": nn.Linear(32, 8)})
    store = ReplicatedWeightStore(model, QuantManifest(groups=(("a.weight",),), rule=ScaleRule()), show_served(model))
    assert not any(name.endswith("history") for name, _ in store.state.named_buffers())
