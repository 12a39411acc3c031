"""Slots, chunks, and what a whole-model pass accepts and refuses."""

import pytest
import torch

from nvfp4_train.kernels.chunks import Weights, into_chunks, slots_of_groups, table_of_addresses, table_of_searches
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.kernels.scale_rules import ScaleRule


def test_slots_follow_groups_and_experts():
    matrix, experts = torch.empty(4, 16), torch.empty(3, 4, 16)
    masters = [matrix, matrix, matrix, experts, experts, matrix, matrix]
    assert slots_of_groups(masters, [0, 1, 1, 2, 2, 3, 4]) == ([0, 1, 1, 2, 2, 5, 6], 7)
    with pytest.raises(ValueError, match="group 0 must have equally many experts, got 3 and 1"):
        slots_of_groups([torch.empty(3, 4, 16), torch.empty(4, 16)], [0, 0])
    with pytest.raises(ValueError, match="group 0 must have equally many experts, got 0 and 4"):
        slots_of_groups([torch.empty(0, 4, 16), torch.empty(4, 4, 16)], [0, 0])
    with pytest.raises(ValueError, match="groups must have one number per master, 1, got 2"):
        slots_of_groups([torch.empty(4, 16)], [0, 1])
    with pytest.raises(ValueError, match="groups must be numbered from 0, got -1"):
        slots_of_groups([torch.empty(4, 16)], [-1])


def _build(masters=None, first_slots=(0,), num_slots=1, **outputs):
    masters = [torch.zeros(4, 32)] if masters is None else masters
    return MultiTensorQuantizer(masters, first_slots, num_slots, **outputs)


DECODED = [torch.zeros(4, 32).bfloat16()]
FITTED = {
    "decoded": DECODED,
    "steps": [torch.zeros(4, 2, dtype=torch.int8)],
    "hessians": [torch.zeros(2, 16, 16)],
    "rule": ScaleRule(block_scale="hessian"),
}
EXPERTS = [torch.zeros(3, 4, 32)]
OF_EXPERTS = {"decoded": EXPERTS, "steps": [torch.zeros(3, 4, 2, dtype=torch.int8)], "num_slots": 3}
BAD_CALLS = {
    "no masters": (lambda: _build([], ()), "masters must not be empty"),
    "no outputs": (lambda: _build(), "outputs are required"),
    "scales missing": (lambda: _build(packed=[torch.zeros(4, 16).byte()]), "scales must have one tensor per master, 1, got 0"),
    "decoded missing": (
        lambda: _build(first_slots=(0, 0), masters=[torch.zeros(4, 32)] * 2, decoded=DECODED),
        "per master, 2, got 1",
    ),
    "decoded shape": (lambda: _build(decoded=[DECODED[0][:2]]), r"decoded\[0\] must have shape \(4, 32\), got \(2, 32\)"),
    "decoded dtype": (lambda: _build(decoded=[torch.zeros(4, 32).int()]), r"decoded\[0\] must be of .* got torch.int32"),
    "strides": (lambda: _build([torch.zeros(32, 4).t()], decoded=DECODED), r"masters\[0\] must be contiguous, got strides"),
    "one dimension": (lambda: _build([torch.zeros(32)], decoded=[torch.zeros(32)]), r"masters\[0\] must be \[N, K\]"),
    "K is 24": (lambda: _build([torch.zeros(4, 24)], decoded=[torch.zeros(4, 24)]), "multiple of 16, got shape"),
    "mixed dtypes": (
        lambda: _build([torch.zeros(4, 32), torch.zeros(4, 32).bfloat16()], (0, 0), decoded=DECODED * 2),
        "masters must share one dtype, got torch.bfloat16, torch.float32",
    ),
    "device": (lambda: _build(decoded=[DECODED[0].to("meta")]), r"decoded\[0\] must be on the device of the first master"),
    "no dimension": (lambda: _build([torch.tensor(1.0)], decoded=[torch.tensor(1.0)]), r"masters\[0\] must be \[N, K\]"),
    "slots": (lambda: _build(first_slots=(0, 0), decoded=DECODED), "first_slots must have one slot per master, 1, got 2"),
    "a fitted rule without steps": (
        lambda: _build(decoded=DECODED, rule=FITTED["rule"]),
        "steps and hessians are required, got 0 tensors of steps under rule 'hessian'",
    ),
    "steps of another rule": (
        lambda: _build(**FITTED | {"rule": ScaleRule()}),
        "for fitted rules alone, got 1 tensors of steps under rule 'max'",
    ),
    "no Hessians": (lambda: _build(**FITTED | {"hessians": []}), "hessians must have one tensor per master, 1, got 0"),
    "shape of steps": (lambda: _build(**FITTED | {"steps": [torch.zeros(4, 1).char()]}), r"steps\[0\] .* got \(4, 1\)"),
    "dtype of steps": (lambda: _build(**FITTED | {"steps": [torch.zeros(4, 2)]}), r"steps\[0\] must be of torch.int8"),
    "dtype of Hessians": (
        lambda: _build(**FITTED | {"hessians": [torch.zeros(2, 16, 16).half()]}),
        r"hessians\[0\] must be of torch.float32, got torch.float16",
    ),
    "shape of Hessians": (
        lambda: _build(**FITTED | {"hessians": [torch.zeros(4, 16, 16)]}),
        r"hessians\[0\] must have shape \(2, 16, 16\), got \(4, 16, 16\)",
    ),
    "Hessians of experts": (
        lambda: _build(EXPERTS, **FITTED | OF_EXPERTS | {"hessians": [torch.zeros(2, 2, 16, 16)]}),
        r"must have shape \(2, 16, 16\) or \(3, 2, 16, 16\), got \(2, 2, 16, 16\)",
    ),
    "refit": (lambda: _build(decoded=DECODED).step(refit=True), "refit is for fitted rules alone, got rule 'max'"),
    "slot": (lambda: _build(first_slots=(1,), decoded=DECODED), "must lie within num_slots=1, got 1 to 1"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_with_what_was_required_and_what_came(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_runs_are_cut_into_chunks():
    """Places move by their steps; the last chunk of a run is the rest; a run of no blocks has none."""
    runs = torch.tensor([[1000, 2000, 10, 5], [3000, 4000, 0, 6], [5000, 6000, 4, 7]])
    assert into_chunks(runs, (8, 1), 4).tolist() == [
        [1000, 2000, 4, 5],
        [1032, 2004, 4, 5],
        [1064, 2008, 2, 5],
        [5000, 6000, 4, 7],
    ]


def test_addresses_of_chunks():
    """Experts lie one behind the other, in slots of their own; an output that is not wanted has address 0."""
    masters = [torch.zeros(2, 3, 32), torch.zeros(0, 32), torch.zeros(5, 16)]
    decoded = [torch.empty_like(master, dtype=torch.bfloat16) for master in masters]
    weights = Weights(masters=masters, first_slots=[1, 0, 0], decoded=decoded, packed=[], scales=[])
    first, last = (masters[index].data_ptr() for index in (0, 2))
    to_first, to_last = (decoded[index].data_ptr() for index in (0, 2))
    assert table_of_addresses(weights, 4).tolist() == [
        [first, to_first, 0, 0, 0, 4, 1],
        [first + 256, to_first + 128, 0, 0, 0, 2, 1],
        [first + 384, to_first + 192, 0, 0, 0, 4, 2],
        [first + 640, to_first + 320, 0, 0, 0, 2, 2],
        [last, to_last, 0, 0, 0, 4, 0],
        [last + 256, to_last + 128, 0, 0, 0, 1, 0],
    ]


@pytest.mark.parametrize("is_shared", [True, False], ids=["one Hessian", "one for each expert"])
def test_rectangles_in_which_steps_are_chosen(is_shared):
    """Two experts of 3 x 5 blocks in rectangles of at most 2 x 4, columns first; each expert has a slot, and maybe a Hessian."""
    master, steps = torch.zeros(2, 3, 80, dtype=torch.bfloat16), torch.zeros(2, 3, 5, dtype=torch.int8)
    hessian = torch.zeros(5, 16, 16) if is_shared else torch.zeros(2, 5, 16, 16)
    weights = Weights(
        masters=[torch.zeros(0, 80, dtype=torch.bfloat16), master],
        first_slots=[0, 3],
        decoded=[torch.zeros(0, 80), torch.zeros(2, 3, 80)],
        packed=[],
        scales=[],
        steps=[torch.zeros(0, 5, dtype=torch.int8), steps],
        hessians=[torch.zeros(5, 16, 16), hessian],
    )
    table = table_of_searches(weights, 2, 4)
    places, others = table[:, :3] - torch.tensor([master.data_ptr(), steps.data_ptr(), hessian.data_ptr()]), table[:, 3:]
    assert others.tolist() == [
        [rows, columns, 5, slot] for slot in (3, 4) for rows in (2, 1) for columns in (4, 1)
    ]  # fmt: skip
    blocks = [15 * expert + 5 * row + column for expert in (0, 1) for row in (0, 2) for column in (0, 4)]
    of_hessian = [column + (0 if is_shared else 5 * expert) for expert in (0, 1) for _ in (0, 2) for column in (0, 4)]
    assert places.tolist() == [[32 * b, b, 1024 * h] for b, h in zip(blocks, of_hessian, strict=True)]
