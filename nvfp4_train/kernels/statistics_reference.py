"""The sums that statistics of a quantized weight are made of, in plain PyTorch: the specification, and the path of CPU tensors.

`weight_sums` is of a weight as it is, `weight_changes` of what became of it since the last look. All sums add up over rows and slots.
"""

import torch
from torch import Tensor

from nvfp4_train.kernels import reference

SCALES, CODES = slice(0, 256), slice(256, 272)
"""Entries of `weight_sums`: blocks by the E4M3 byte of their scale, and elements by their code."""
SIGNAL, NOISE, BELOW_FLOOR, OTHER_SCALE, UNDERFLOW, ZERO, EDGE, LOG2_S2, SLOTS = range(272, 281)
NUM_SUMS = 281

FLIPS, OSCILLATIONS, QUANTIZED_CHANGE, MASTER_CHANGE, ELEMENTS, SCALE_CHANGES, CHANGE_SLOTS = range(7)
"""Entries of `weight_changes`."""
NUM_CHANGES = 7

EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where |w| / s rounds to another code: halfway between two magnitudes of E2M1."""
BETWEEN_EDGES = (0.5, 1.0, 1.5, 2.125, 3.0, 4.25)
"""From here on the next edge is the nearest."""
EDGE_WIDTH = 0.01
"""Largest distance from an edge, as a fraction of it, at which a value counts as near."""
UNDERFLOW_DIVISOR = 24.0
"""|w| < amax / 24 is below 0.25 in units of amax / 6, which rounds to zero."""

ELEMENTS_AT_ONCE = 2**20
"""Elements that are measured together, so that temporaries stay near the caches."""


def weight_sums(master: Tensor, codes: Tensor, block_scales: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all rows of a weight, float64 [NUM_SUMS], and the amax of each slot, float32 [S].

    master is of a float dtype [S, n, K], codes uint8 [S, n, K / 2], block_scales E4M3 [S, n, K / 16], s2 float32 [S]. With amax the
    amax of a block, s its decode scale (block scale times s2, rounded once) and w_hat the decoded value, the entries are

        SCALES, CODES   how many blocks have each E4M3 byte, how many elements each code
        SIGNAL, NOISE   sum of w^2, and of (w - w_hat)^2
        BELOW_FLOOR     blocks whose amax / 6 / s2 is below 2^-6, the floor
        OTHER_SCALE     blocks whose scale is another than the rule max gives under this s2
        UNDERFLOW       elements with |w| < amax / 24
        ZERO            elements that decode to zero, less those that are zero
        EDGE            elements whose |w| * (1 / s) lies within 1 % of one of EDGES
        LOG2_S2, SLOTS  sum of log2 of s2 over the slots, and their number

    Operations are rounded once in fp32, those of powers excepted, and divisions are IEEE divisions: counts are the same everywhere. A
    block that holds NaN has the scale NaN, which counts as no other, and its elements are near no edge.
    """
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=master.device)
    rows_at_once = max(1, ELEMENTS_AT_ONCE // master.shape[-1])
    for slot in range(len(master)):
        for start in range(0, master.shape[1], rows_at_once):
            rows = slot, slice(start, start + rows_at_once)
            sums += _sums_of_rows(master[rows], codes[rows], block_scales[rows], s2[slot])
    sums[LOG2_S2], sums[SLOTS] = s2.double().log2().sum(), len(s2)
    return sums, master.abs().amax((1, 2)).float()


def _sums_of_rows(master: Tensor, codes: Tensor, block_scales: Tensor, s2: Tensor) -> Tensor:
    """`weight_sums` of rows [n, K] of one slot, without what is per slot."""
    scales, codes = block_scales.float(), reference.unpack(codes)
    master = master.float()
    amax = reference.block_amax(master)
    ratio = reference.divide(amax, reference.FP4_MAX) / s2
    by_max_rule = reference.round_to_e4m3(ratio.clamp(min=reference.E4M3_MIN))
    blocks = master.abs().unflatten(-1, (-1, reference.BLOCK_SIZE))
    limit = reference.divide(amax, UNDERFLOW_DIVISOR).unsqueeze(-1)
    quotients = blocks * (scales * s2).reciprocal().unsqueeze(-1)
    edges = torch.tensor(EDGES)[torch.bucketize(quotients, torch.tensor(BETWEEN_EDGES), right=True)]
    noise = master.double() - reference.decode(codes, scales * s2).double()
    others = (
        master.double().square().sum(),
        noise.square().sum(),
        (ratio < reference.E4M3_MIN).sum(),
        ((by_max_rule != scales) & ~scales.isnan()).sum(),
        (blocks < limit).sum(),
        (codes & 7 == 0).sum() - (master == 0).sum(),
        ((quotients - edges).abs() <= edges * EDGE_WIDTH).sum(),
        torch.zeros(2),
    )
    by_byte = block_scales.view(torch.uint8).flatten().bincount(minlength=256)
    return torch.cat([by_byte, codes.flatten().bincount(minlength=16), *(other.double().reshape(-1) for other in others)])


def weight_changes(
    master: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    s2: Tensor,
    last_master: Tensor,
    last_codes: Tensor,
    last_scales: Tensor,
    last_s2: Tensor,
    codes_before: Tensor,
    is_new_window: bool,
) -> Tensor:
    """Sums over rows of what changed since the last look, float64 [NUM_CHANGES]. Makes this look the last one, in place.

    The first four are as `weight_sums` takes them, the next four the same as they were at the last look. codes_before, uint8
    [S, n, K / 2], are the codes before the last flip in the window, or the last codes where there was none. A code flips if it has
    another value than at the last look; 0 and -0 are one. It oscillates if it flips to the code before its last flip.

        FLIPS, OSCILLATIONS, ELEMENTS       elements that flipped, that oscillated, and all
        QUANTIZED_CHANGE, MASTER_CHANGE     sum of |w_hat - last w_hat|, and of |w - last w|
        SCALE_CHANGES, CHANGE_SLOTS         slots whose s2 changed, and all
    """
    now, last = reference.unpack(codes), reference.unpack(last_codes)
    before = last if is_new_window else reference.unpack(codes_before)
    # Bit by bit a -0 is another code, by value it is not.
    now_value, last_value, before_value = (code.where(code != 8, 0) for code in (now, last, before))
    is_flip = now_value != last_value
    decoded, last_decoded = (
        reference.decode(code, scales.float() * scale.view(-1, 1, 1)).double()
        for code, scales, scale in ((now, block_scales, s2), (last, last_scales, last_s2))
    )
    sums = (
        is_flip.sum(),
        (is_flip & (now_value == before_value)).sum(),
        (decoded - last_decoded).abs().sum(),
        (master.double() - last_master.double()).abs().sum(),
        master.new_tensor(master.numel(), dtype=torch.float64),
        (s2 != last_s2).sum(),
        master.new_tensor(len(s2), dtype=torch.float64),
    )
    codes_before.copy_(reference.pack(torch.where(is_flip, last, before)))
    for kept, found in ((last_master, master), (last_codes, codes), (last_scales, block_scales), (last_s2, s2)):
        kept.copy_(found)
    return torch.stack([entry.double() for entry in sums])
