"""The history of codes in plain PyTorch: what one byte a weight remembers of its code, step by step. The specification.

The low four bits of a byte are the last code. The high four are what happened since a window of steps began:

    0                       no flip
    1 + 2 r + up            r reversals, 6 for more; the last flip went up or down
    15                      frozen, in this window and all later ones

A flip is another code than the last one, whatever moved: the master, or the block's scale. +0 and -0 are one code here. A reversal is a
flip in the other direction than the flip before it. So a weight that drifts over several edges has flips, and no reversal.
"""

import torch
from torch import Tensor

from nvfp4_train.kernels import reference

FROZEN = 15
MOST_REVERSALS = 6
COUNT, END, RESET, FREEZE = range(4)
"""What a step does beside counting. The last three end a window: END alone, RESET moves masters once, FREEZE freezes weights."""


def follow_codes(
    packed: Tensor, scales: Tensor, s2: Tensor, history: Tensor, master: Tensor, counts: Tensor, min_reversals: int, action: int
) -> None:
    """Take the codes of a step into the history, and set masters to served values, the centres of their bins; both in place.

    packed uint8 [S, n, K // 2], block scales float8_e4m3fn [S, n, K // 16] and s2 float32 [S] are those of the step; history is uint8
    [S, n, K] and master float32 [S, n, K]. Masters are set of frozen weights, always, and under RESET of those with at least
    `min_reversals` (1 to 6) in the window. Added to counts, int64 [3]: flips, and at the end of a window the weights that it acted on,
    and the frozen ones.
    """
    codes = reference.unpack(packed)
    last, seen = history & 15, history >> 4
    change = _levels(codes) - _levels(last)
    is_frozen = seen == FROZEN
    is_up = (change > 0).to(torch.uint8)
    is_reversal = (seen > 0) & ((seen - 1) & 1 != is_up)
    # Without a flip so far seen - 1 is 255.
    reversals = torch.where(seen > 0, (seen - 1) >> 1, 0)
    flipped = 1 + 2 * (reversals + is_reversal).clamp(max=MOST_REVERSALS) + is_up
    seen = torch.where((change != 0) & ~is_frozen, flipped, seen)
    counts[0] += (change != 0).sum()
    is_set = is_frozen
    if action != COUNT:
        is_oscillating = (seen > 2 * min_reversals) & ~is_frozen
        if action == FREEZE:
            is_frozen = is_frozen | is_oscillating
            is_set = is_frozen
        elif action == RESET:
            is_set = is_frozen | is_oscillating
        if action != END:
            counts[1] += is_oscillating.sum()
        counts[2] += is_frozen.sum()
        seen = torch.where(is_frozen, FROZEN, 0).to(torch.uint8)
    history.copy_(codes | seen << 4)
    served = reference.dequantize(packed, scales, s2.view(-1, 1, 1), master.dtype)
    master.copy_(torch.where(is_set, served, master))


def _levels(codes: Tensor) -> Tensor:
    """int8, in the order of values."""
    magnitudes = (codes & 7).to(torch.int8)
    return torch.where(codes > 7, -magnitudes, magnitudes)
