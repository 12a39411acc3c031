"""The sums of statistics: the reference against brute force in float64, and the Triton kernels against the reference."""

import math
from fractions import Fraction

import pytest
import torch
from kernel_cases import CASES, DEVICE
from torch import Tensor

from nvfp4_train.kernels import ops, reference, statistics_kernels
from nvfp4_train.kernels import statistics_reference as measured
from nvfp4_train.kernels.scale_rules import ScaleRule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KERNEL_SUMS = torch.ops.nvfp4.weight_sums if DEVICE == "cuda" else statistics_kernels.weight_sums
KERNEL_CHANGES = ops.weight_changes if DEVICE == "cuda" else statistics_kernels.weight_changes
VALUES = [*reference.E2M1_VALUES, *(-value for value in reference.E2M1_VALUES)]
RULES = [ScaleRule(), ScaleRule(global_scale="exact"), ScaleRule(block_scale="mse"), ScaleRule(block_scale="four_over_six")]
WEIGHTS = {
    name: case.reshape(1, -1, case.shape[-1]) for name, case in CASES.items() if name not in ("experts", "ties", "infinite")
} | {
    "experts": CASES["experts"].flatten(1, 2),
    "ties": CASES["ties"][:2].unsqueeze(0),
    "bf16": CASES["gaussian"].bfloat16().unsqueeze(0),
    "many_tiles": torch.randn(1, 20, 528, generator=torch.Generator().manual_seed(1)),
}


def quantized(master: Tensor, rule: ScaleRule = RULES[0]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masters [S, n, K] with codes, block scales and s2 of a slot each."""
    s2 = reference.global_scale(master.abs().amax((1, 2)), rule)
    parts = [reference.quantize(part, scale, rule) for part, scale in zip(master, s2, strict=True)]
    codes, scales = (torch.stack([part[index].view(torch.uint8) for part in parts]) for index in (0, 1))
    return master, codes, scales.view(torch.float8_e4m3fn), s2


def brute_force(master: Tensor, codes: Tensor, block_scales: Tensor, s2: Tensor) -> list[float]:
    """The entries from 272 on, one element after the other, in exact arithmetic but for what the definitions round to fp32."""
    signal = noise = Fraction(0)
    below, other, underflow, zero, edge = 0, 0, 0, 0, 0
    for slot, scale2 in enumerate(s2):
        blocks = master[slot].float().reshape(-1, 16)
        for block, code, scale in zip(
            blocks, reference.unpack(codes[slot]).reshape(-1, 16), block_scales[slot].float().flatten(), strict=True
        ):
            amax = block.abs().max()
            ratio = amax.div(6) / scale2
            below += ratio.item() < 2.0**-6
            by_max_rule = ratio.clamp(2.0**-6, 448).to(torch.float8_e4m3fn).float()
            other += by_max_rule.item() != scale.item()
            limit, step = (amax / 24).item(), scale * scale2
            for x, value in zip(block, code.tolist(), strict=True):
                signal += Fraction(x.item()) ** 2
                noise += (Fraction(x.item()) - Fraction((step * VALUES[value]).item())) ** 2
                underflow += abs(x.item()) < limit
                zero += x.item() != 0 and value in (0, 8)
                quotient = (x.abs() * (1 / step)).item()
                edge += any(abs(quotient - e) <= torch.tensor(e).mul(0.01).item() for e in measured.EDGES)
    log2 = sum(math.log2(scale) for scale in s2.tolist())
    return [float(signal), float(noise), below, other, underflow, zero, edge, log2, len(s2)]


@pytest.mark.parametrize("name", ["gaussian", "experts", "tiny_block", "zeros_of_both_signs", "all_zero"])
@pytest.mark.parametrize("rule", RULES[:3], ids=["max", "exact", "mse"])
def test_sums_are_those_of_the_definitions(name: str, rule: ScaleRule) -> None:
    weight = quantized(WEIGHTS[name][:, :5], rule)
    sums, amax = measured.weight_sums(*weight)
    assert sums[272:].tolist() == pytest.approx(brute_force(*weight), rel=1e-13)
    assert torch.equal(amax, weight[0].abs().amax((1, 2)))
    scales, codes = weight[2].view(torch.uint8).flatten().tolist(), reference.unpack(weight[1]).flatten().tolist()
    assert sums[measured.SCALES].tolist() == [scales.count(byte) for byte in range(256)]
    assert sums[measured.CODES].tolist() == [codes.count(code) for code in range(16)]


def test_edges_are_where_codes_change() -> None:
    for edge in measured.EDGES:
        below, above = torch.tensor([edge * 0.999, edge * 1.001]).unsqueeze(1)
        assert reference.encode_e2m1(above) == reference.encode_e2m1(below) + 1
    middles = [(a + b) / 2 for a, b in zip(measured.EDGES, measured.EDGES[1:], strict=False)]
    assert list(measured.BETWEEN_EDGES) == middles
    assert all(b * (1 - 0.01) > a * (1 + 0.01) for a, b in zip(measured.EDGES, measured.EDGES[1:], strict=False))


def test_other_scales_are_counted_where_a_rule_searches() -> None:
    blocks = WEIGHTS["gaussian"].numel() // 16
    for rule, is_searching in zip(RULES, (False, False, True, True), strict=True):
        sums, _ = measured.weight_sums(*quantized(WEIGHTS["gaussian"], rule))
        assert (0 < sums[measured.OTHER_SCALE] < blocks) if is_searching else sums[measured.OTHER_SCALE] == 0


def assert_same_sums(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Counts to the last one, powers up to the order of their sums."""
    sums, amax = (part.cpu() for part in found)
    counts = [*range(272), *range(measured.BELOW_FLOOR, measured.NUM_SUMS)]
    assert torch.equal(sums[counts], expected[0][counts])
    powers = slice(measured.SIGNAL, measured.NOISE + 1)
    # Squares of a weight that counts as all zero are below fp32.
    torch.testing.assert_close(sums[powers], expected[0][powers], rtol=1e-6, atol=1e-70, equal_nan=True)
    torch.testing.assert_close(amax, expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rule", RULES[1:3], ids=["exact", "mse"])
def test_the_kernel_has_the_sums_of_the_reference(name: str, rule: ScaleRule) -> None:
    if rule is not RULES[0] and name in ("many_tiles", "ties"):
        rule = RULES[0]
    weight = quantized(WEIGHTS[name], rule)
    assert_same_sums(KERNEL_SUMS(*(part.to(DEVICE) for part in weight)), measured.weight_sums(*weight))


def test_programs_share_the_tiles_of_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized(torch.stack([WEIGHTS["many_tiles"][0], 2 * WEIGHTS["many_tiles"][0].flip(0)]))
    for most in (1, 5, 1000):
        monkeypatch.setattr(statistics_kernels, "PROGRAMS", most)
        assert_same_sums(KERNEL_SUMS(*(part.to(DEVICE) for part in weight)), measured.weight_sums(*weight))


def test_rows_of_slots_that_lie_apart() -> None:
    weight = quantized(torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(2)))
    for rows in (slice(1, 4), slice(3, 10), slice(10, 20)):
        part = tuple(tensor[:, rows] for tensor in weight[:3])
        on_device = tuple(tensor.to(DEVICE)[:, rows] for tensor in weight[:3])
        found = KERNEL_SUMS(*on_device, weight[3].to(DEVICE))
        if part[0].numel():
            assert_same_sums(found, measured.weight_sums(*part, weight[3]))
        else:
            assert not found[0].any()


def test_a_nan_is_in_its_scale_and_in_the_powers_alone() -> None:
    master = WEIGHTS["gaussian"].clone()
    clean, _ = measured.weight_sums(*quantized(master))
    _, codes, scales, s2 = quantized(master)
    master[0, 3, 5] = torch.nan
    codes, scales = reference.quantize(master, s2)
    expected = measured.weight_sums(master, codes, scales, s2)
    assert expected[0][127] == 1
    assert expected[0][measured.SIGNAL].isnan()
    assert expected[1].isnan()
    assert expected[0][measured.OTHER_SCALE] == 0
    assert clean[measured.EDGE] - 16 <= expected[0][measured.EDGE] <= clean[measured.EDGE]
    found = KERNEL_SUMS(*(part.to(DEVICE) for part in (master, codes, scales, s2)))
    # The codes of a block with NaN mean nothing, but both read the same ones.
    assert_same_sums(found, expected)


def sequence(num_looks: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Masters that move back and forth, with scales and global scales that change."""
    generator = torch.Generator().manual_seed(3)
    master = torch.randn(2, 9, 48, generator=generator)
    moves = [0.3 * torch.randn(2, 9, 48, generator=generator) for _ in range(num_looks)]
    factors = [1.0, 1.0, 4.0, 1.0, 1.0, 0.25]
    return [quantized(factor * (master + move)) for factor, move in zip(factors, moves, strict=False)]


@pytest.mark.parametrize("rows", [slice(None), slice(2, None, 3)], ids=["all", "sampled"])
def test_the_kernel_has_the_changes_of_the_reference(rows: slice) -> None:
    first, *others = sequence(6)
    kept = [part.clone() for part in (*(part[:, rows] for part in first[:3]), first[3], first[1][:, rows])]
    on_device = [part.clone().to(DEVICE) for part in kept]
    for look, weight in enumerate(others):
        now = *(part[:, rows] for part in weight[:3]), weight[3]
        expected = measured.weight_changes(*now, *kept, look == 3)
        whole = [part.to(DEVICE) for part in weight]
        found = KERNEL_CHANGES(*(part[:, rows] for part in whole[:3]), whole[3], *on_device, look == 3).cpu()
        counts = [measured.FLIPS, measured.OSCILLATIONS, measured.ELEMENTS, measured.SCALE_CHANGES, measured.CHANGE_SLOTS]
        assert torch.equal(found[counts], expected[counts])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert expected[measured.FLIPS] > 0
        for a, b in zip(on_device, kept, strict=True):
            assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)), "what is kept for the next look"
