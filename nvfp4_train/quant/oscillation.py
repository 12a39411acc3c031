"""Weights that go back and forth over a rounding edge: found by the history of their codes, and set to the centre of their bin.

Nagel et al., "Overcoming oscillations in quantization-aware training", arXiv 2203.11086, count flips against the direction of the
flip before, and freeze weights. TetraJet-v2, arXiv 2510.27527, resets masters to the centre of the bin in the last part of training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels import reference
from nvfp4_train.kernels.code_history import COUNT, END, FREEZE, MOST_REVERSALS, RESET
from nvfp4_train.quant.store import WeightStore

ACTIONS = {None: END, "reset": RESET, "freeze": FREEZE}
"""What is done to oscillating weights at the end of a window."""


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
    """Follows the codes of a store that keeps their history (`WeightStore.keep_history`), one step at a time.

    A step takes the codes of the last update, so it comes before the update that is made of the masters as they are. Flips are flips
    of what is served, whatever made them: a change of a block's scale, by a new amax or because a fitted rule chose anew, flips codes
    as well as a change of the master does.
    """

    def __init__(self, store: WeightStore, *, min_reversals: int) -> None:
        """`min_reversals` in a window make a weight an oscillating one."""
        if not 1 <= min_reversals <= MOST_REVERSALS:
            raise ValueError(f"min_reversals must be 1 to {MOST_REVERSALS}, got {min_reversals}")
        self._store = store
        self._min_reversals = min_reversals
        self._counts = torch.zeros(0)

    @torch.no_grad()
    def begin(self) -> None:
        """Forget all that was before the codes of the last update."""
        for weight in self._store.held_weights():
            history = self._store.local_history(weight.name)
            history.copy_(reference.unpack(weight.codes).view(history.shape))
        self._counts = torch.zeros(0)

    @torch.no_grad()
    def step(self, *, ends_window: bool = False, action: str | None = None) -> None:
        """Count the flips of the last update. At the end of a window act on what has oscillated in it, and count anew.

        Masters that are acted on become their served values of the last update. Those of frozen weights do so at every step, whatever
        an optimizer made of them since. Waits for nothing.
        """
        for weight in self._store.held_weights():
            history = self._store.local_history(weight.name)
            if self._counts.device != history.device or not self._counts.numel():
                self._counts = torch.zeros(3, dtype=torch.int64, device=history.device)
            torch.ops.nvfp4.follow_codes(
                weight.codes,
                weight.block_scales,
                weight.global_scale,
                history.view(weight.master.shape),
                weight.master,
                self._counts,
                self._min_reversals,
                ACTIONS[action] if ends_window else COUNT,
            )

    def shares(self) -> OscillationShares:
        """What was counted since the last call. A collective, and it waits for the device."""
        num_weights = sum(self._store.local_history(name).numel() for name in self._store.names)
        own = self._counts if self._counts.numel() else self._counts.new_zeros(3, dtype=torch.int64)
        # Replicas count the same weights, in numerator and denominator alike.
        counts: Tensor = torch.cat((own, own.new_tensor([num_weights])))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        self._counts = torch.zeros(0)
        flips, acted_on, frozen, total = counts.tolist()
        return OscillationShares(flips=flips / total, acted_on=acted_on / total, frozen=frozen / total)
