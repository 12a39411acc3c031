"""`code_history.follow_codes` in one Triton launch a weight, bit for bit. It reads 1.56 bytes a weight and writes 1."""

import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import code_history
from nvfp4_train.kernels import triton_arithmetic as arithmetic
from nvfp4_train.kernels.triton_kernels import _flat, _place, launch

TILE = 512
"""Words of eight codes to a program."""
NUM_WARPS = 8
COUNT, END, RESET, FREEZE, FROZEN, MOST_REVERSALS = (
    tl.constexpr(value)
    for value in (
        code_history.COUNT,
        code_history.END,
        code_history.RESET,
        code_history.FREEZE,
        code_history.FROZEN,
        code_history.MOST_REVERSALS,
    )
)


@triton.jit
def _levels(codes):
    magnitudes = codes & 7
    return tl.where(codes > 7, -magnitudes, magnitudes)


@triton.jit
def _add(counts_ptr, mask):
    """Integers: the order in which programs arrive changes nothing."""
    tl.atomic_add(counts_ptr, tl.sum(tl.sum(mask.to(tl.int32), 1), 0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["num_words", "words_per_slot", "min_reversals"], do_not_specialize_on_alignment=["s2_ptr"])
def follow_codes_kernel(
    packed_ptr, scales_ptr, s2_ptr, history_ptr, master_ptr, counts_ptr,
    min_reversals: tl.int32, words_per_slot: tl.int64, num_words: tl.int64,
    ACTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row is a word, an int32 of eight codes, which share a scale."""
    start, rows, is_row = _place(num_words, TILE)
    columns = tl.arange(0, 8)[None, :]
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    words = tl.load(words_ptr + start + rows, mask=is_row, other=0)
    # start is even, and so no division of 64-bit integers is needed.
    scales = tl.load(scales_ptr + start // 2 + rows // 2, mask=is_row, other=0)
    s2 = tl.load(s2_ptr + (start + rows) // words_per_slot, mask=is_row, other=1.0)
    places = start * 8 + rows[:, None] * 8 + columns
    history = tl.load(history_ptr + places, mask=is_row[:, None], other=0).to(tl.int32)

    codes = (words[:, None] >> (4 * columns)) & 15
    seen = history >> 4
    change = tl.where(is_row[:, None], _levels(codes) - _levels(history & 15), 0)
    is_frozen = seen == FROZEN
    is_up = (change > 0).to(tl.int32)
    is_reversal = ((seen > 0) & (((seen - 1) & 1) != is_up)).to(tl.int32)
    reversals = tl.where(seen > 0, (seen - 1) >> 1, 0)
    flipped = 1 + 2 * tl.minimum(reversals + is_reversal, MOST_REVERSALS) + is_up
    seen = tl.where((change != 0) & (seen != FROZEN), flipped, seen)
    _add(counts_ptr, change != 0)
    is_set = is_frozen
    if ACTION != COUNT:
        is_oscillating = (seen > 2 * min_reversals) & (seen != FROZEN)
        if ACTION == FREEZE:
            is_frozen = is_frozen | is_oscillating
            is_set = is_frozen
        if ACTION == RESET:
            is_set = is_frozen | is_oscillating
        if ACTION != END:
            _add(counts_ptr + 1, is_oscillating)
        _add(counts_ptr + 2, is_frozen)
        seen = tl.where(is_frozen, FROZEN, 0)
    tl.store(history_ptr + places, (codes | (seen << 4)).to(tl.uint8), mask=is_row[:, None])
    served = arithmetic.decode(words, arithmetic.e4m3_value(scales) * s2).to(master_ptr.dtype.element_ty)
    tl.store(master_ptr + places, served, mask=is_row[:, None] & is_set)


def follow_codes(
    packed: Tensor, scales: Tensor, s2: Tensor, history: Tensor, master: Tensor, counts: Tensor, min_reversals: int, action: int
) -> None:
    num_words = master.numel() // 8
    if num_words == 0:
        return
    # As bytes, since Triton has no E4M3 type on compute capability 8.0.
    tensors = _flat(packed), _flat(scales.view(packed.dtype)), s2, history, master, counts
    args = (*tensors, min_reversals, num_words // len(s2), num_words)
    launch(
        "follow_codes", follow_codes_kernel, -(-num_words // TILE), NUM_WARPS, master, args, {"ACTION": action, "TILE": TILE}
    )
