"""The history of codes: flips and reversals against a count by hand, what is set, and the Triton kernel against the reference."""

import pytest
import torch
from kernel_cases import DEVICE, assert_same_bits
from torch import Tensor

from nvfp4_train.kernels import code_history, code_history_kernel, ops, reference  # noqa: F401  (ops registers torch.ops.nvfp4)
from nvfp4_train.kernels.code_history import COUNT, END, FREEZE, FROZEN, RESET, follow_codes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON = torch.ops.nvfp4 if DEVICE == "cuda" else code_history_kernel
SCALE = 0.5


class One:
    """A block of weights under a scale that stays, to whose first weight code after code is given."""

    def __init__(self, code: int = 0) -> None:
        self.history = torch.zeros(1, 1, 16, dtype=torch.uint8)
        self.history[0, 0, 0] = code
        self.counts = torch.zeros(3, dtype=torch.int64)
        self.master = torch.full((1, 1, 16), 9.0)

    def step(self, code: int, action: int = COUNT, min_reversals: int = 2) -> float:
        """The master of the first weight afterwards. It was 9."""
        codes = torch.zeros(1, 1, 16, dtype=torch.uint8)
        codes[0, 0, 0] = code
        self.master.fill_(9.0)
        scales = torch.full((1, 1, 1), SCALE).to(torch.float8_e4m3fn)
        packed, s2 = reference.pack(codes), torch.ones(1)
        follow_codes(packed, scales, s2, self.history, self.master, self.counts, min_reversals, action)
        assert (self.master[0, 0, 1:] == 9).all(), "the others have not moved"
        return self.master[0, 0, 0].item()


def counted(codes: list[int]) -> tuple[int, int]:
    """Flips and reversals, by hand: of values in the order of time, +0 and -0 being one."""
    values = [reference.decode(torch.full((1,), code, dtype=torch.uint8), torch.ones(1)).item() for code in codes]
    moves = [after - before for before, after in zip(values, values[1:], strict=False) if after != before]
    return len(moves), sum(before * after < 0 for before, after in zip(moves, moves[1:], strict=False))


@pytest.mark.parametrize(
    "codes",
    [
        [3, 4, 3, 4, 3],
        [3, 3, 4, 4, 4, 3, 3],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [7, 5, 2, 0, 8, 9, 12, 15],
        [8, 0, 8, 0],
        [0, 9, 8, 1, 0, 9],
        [4, 3, 4, 5, 4, 3, 2],
        [*[1, 2] * 20],
    ],
    ids=str,
)
def test_flips_and_reversals_are_those_of_values(codes: list[int]) -> None:
    one = One(codes[0])
    for code in codes[1:]:
        one.step(code)
    flips, reversals = counted(codes)
    assert one.counts.tolist() == [flips, 0, 0]
    seen = int(one.history[0, 0, 0]) >> 4
    assert seen == 0 if not flips else (seen - 1) >> 1 == min(reversals, 6)
    assert int(one.history[0, 0, 0]) & 15 == codes[-1]


@pytest.mark.parametrize("min_reversals", range(1, 7))
def test_a_window_acts_on_weights_with_so_many_reversals(min_reversals: int) -> None:
    for num_flips in range(1, 10):
        one = One(4)
        for flip in range(num_flips - 1):
            assert one.step(5 if flip % 2 == 0 else 4, min_reversals=min_reversals) == 9
        code = 5 if num_flips % 2 else 4
        is_oscillating = num_flips - 1 >= min_reversals
        expected = reference.E2M1_VALUES[code] * SCALE if is_oscillating else 9
        assert one.step(code, RESET, min_reversals) == expected
        assert one.counts.tolist() == [num_flips, is_oscillating, 0]
        assert one.history[0, 0, 0] == code, "counts start anew"
        assert one.step(code, RESET, min_reversals) == 9, "reset once"


def test_a_monotone_drift_is_no_oscillation() -> None:
    one = One(15)
    for code in [14, 13, 12, 11, 10, 9, 8, 1, 2, 3, 4, 5, 6]:
        assert one.step(code, min_reversals=1) == 9
    assert one.step(7, FREEZE, min_reversals=1) == 9
    assert one.counts.tolist() == [14, 0, 0]


def test_frozen_weights_are_held_from_then_on() -> None:
    one = One(4)
    one.step(5)
    one.step(4)
    assert one.step(5, FREEZE) == 3 * SCALE
    assert one.counts.tolist() == [3, 1, 1]
    for code, action in ((5, COUNT), (6, COUNT), (6, FREEZE), (6, END), (6, RESET)):
        assert one.step(code, action) == reference.E2M1_VALUES[code] * SCALE
        assert one.history[0, 0, 0] == code | FROZEN << 4
    assert one.counts.tolist() == [4, 1, 4]


def case(num_slots: int, num_rows: int, columns: int, seed: int) -> list[Tensor]:
    """Any history, codes that are often the last ones, and scales of every size."""
    generator = torch.Generator().manual_seed(seed)
    shape = num_slots, num_rows, columns
    history = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    stays = torch.rand(shape, generator=generator) < 0.5
    codes = torch.where(stays, history & 15, torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8))
    scales = torch.randint(8, 127, (*shape[:-1], columns // 16), generator=generator, dtype=torch.uint8)
    s2 = 2.0 ** torch.randint(-9, 3, (num_slots,), generator=generator)
    master = torch.randn(shape, generator=generator)
    counts = torch.tensor([5, 6, 7])
    return [reference.pack(codes), scales.view(torch.float8_e4m3fn), s2, history, master, counts]


@pytest.mark.parametrize("action", [COUNT, END, RESET, FREEZE])
@pytest.mark.parametrize("shape", [(1, 5, 48), (3, 7, 32), (2, 40, 112), (1, 0, 32)], ids=str)
def test_the_kernel_is_the_reference(shape: tuple[int, int, int], action: int) -> None:
    expected = case(*shape, seed=action)
    actual = [tensor.to(DEVICE) for tensor in case(*shape, seed=action)]
    if expected[0].numel():
        follow_codes(*expected, 3, action)
    TRITON.follow_codes(*actual, 3, action)
    for ours, reference_of in zip(actual, expected, strict=True):
        if ours.dtype == torch.int64:
            assert ours.tolist() == reference_of.tolist()
        else:
            view = (lambda t: t.view(torch.uint8)) if ours.dtype == torch.float8_e4m3fn else (lambda t: t)
            assert_same_bits(view(ours), view(reference_of))
    if action != COUNT and expected[0].numel():
        assert expected[5][2] > 7
