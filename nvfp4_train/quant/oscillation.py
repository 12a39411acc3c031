"""Weights that go back and forth over a rounding edge: found by the history of their codes, and set to the centre of their bin.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv 2203.11086, count flips against the direction of the
flip before, and freeze weights. TetraJet-v2, arXiv 2510.27527, resets masters to the centre of their bin in the last part of training.
"""

from dataclasses import dataclass

import torch
from torch import distributed

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels import reference
from nvfp4_train.kernels.code_history import COUNT, END, FREEZE, MOST_REVERSALS, RESET
from nvfp4_train.quant.store import WeightStore

ACTIONS = {None: END, "reset": RESET, "freeze": FREEZE}


@dataclass(frozen=True, kw_only=True)
class OscillationRule:
    """Which weights oscillate, and what is done to them at the end of every window of `every_n_steps` steps."""

    action: str | None
    """`reset` sets their masters to their served values, `freeze` does so at every step from then on; None counts alone."""
    every_n_steps: int
    min_reversals: int
    """So many flips against the direction of the flip before, in a window, make a weight an oscillating one."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action must be null, reset or freeze, got {self.action!r}")
        if not 1 <= self.min_reversals <= MOST_REVERSALS:
            raise ValueError(f"min_reversals must be 1 to {MOST_REVERSALS}, got {self.min_reversals}")
        if self.every_n_steps <= self.min_reversals:
            raise ValueError(
                f"every_n_steps must be above min_reversals={self.min_reversals}, since the first flip of a window is no reversal, got "
                f"{self.every_n_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class OscillationShares:
    """Of the quantized weights of all ranks, since the last look."""

    flips: float
    """Flips divided by weights: over several steps it may exceed 1."""
    acted_on: float
    """Weights that were reset, or frozen."""
    frozen: float
    """Weights that are frozen, of this window and earlier ones."""


class Oscillation:
    """Applies a rule to a store that keeps the history of codes (`WeightStore.keep_history`).

    Flips are flips of what is served, whatever made them. Codes flip with a change of their block's scale as well as with one of their
    master: a new amax, or a fitted rule that chose anew, counts like a step of the optimizer.
    """

    def __init__(self, store: WeightStore, rule: OscillationRule, *, first_step: int | None = None) -> None:
        """`first_step` is that of the first codes in the history that the state of the store holds; None if they are to come."""
        self.first_step = first_step
        self._store = store
        self._rule = rule
        device = store.local_history(store.names[0]).device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Of this rank, see `code_history.follow_codes`."""

    @torch.no_grad()
    def follow(self, step: int) -> OscillationShares | None:
        """Take the codes of the last update, which were those of a step. Call it once a step, before the next update.

        Masters that are acted on become the served values of that update, whatever the optimizer made of them since. Returns what was
        found at the end of a window; nothing waits for the device before that.
        """
        if self.first_step is None:
            self.first_step = step
            self._begin()
            return None
        ends_window = (step - self.first_step) % self._rule.every_n_steps == 0
        action = ACTIONS[self._rule.action] if ends_window else COUNT
        for weight in self._store.held_weights():
            torch.ops.nvfp4.follow_codes(
                weight.codes,
                weight.block_scales,
                weight.global_scale,
                self._store.local_history(weight.name).view(weight.master.shape),
                weight.master,
                self._counts,
                self._rule.min_reversals,
                action,
            )
        return self.shares() if ends_window else None

    def _begin(self) -> None:
        """Forget what was before the codes of the last update."""
        for weight in self._store.held_weights():
            history = self._store.local_history(weight.name)
            history.copy_(reference.unpack(weight.codes).view(history.shape))

    def shares(self) -> OscillationShares:
        """What was found since the last call. A collective, and it waits for the device."""
        num_weights = sum(self._store.local_history(name).numel() for name in self._store.names)
        # Replicas count the same weights, in numerator and denominator alike.
        counts = torch.cat((self._counts, self._counts.new_tensor([num_weights])))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        self._counts.zero_()
        flips, acted_on, frozen, total = counts.tolist()
        return OscillationShares(flips=flips / total, acted_on=acted_on / total, frozen=frozen / total)
