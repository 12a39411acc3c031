"""The steps of a fitted rule: that they lose least of a layer's output, and that kernels choose the same, bit for bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import CASES, DEVICE, DTYPES, TRITON, assert_same_bits

from nvfp4_train.kernels import reference, triton_arithmetic, triton_kernels, triton_search
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES, BlockScaleRule, ScaleRule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

RULE = ScaleRule(block_scale="hessian")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> ScaleRule:
    """A fitted rule with three candidates: in the interpreter one takes a tenth of a second for each column of blocks."""
    monkeypatch.setitem(BLOCK_SCALE_RULES, "few", BlockScaleRule(steps=(5, 4, 3), largest=256.0, is_fitted=True))
    return ScaleRule(block_scale="few")


def _hessians(num_blocks: int, spread: float = 1.0) -> torch.Tensor:
    """Second moments of 50 inputs, whose channels differ in magnitude by factors around 2^spread."""
    generator = torch.Generator().manual_seed(7)
    magnitudes = torch.exp2(spread * torch.randn(num_blocks, 1, 16, generator=generator))
    inputs = torch.randn(num_blocks, 50, 16, generator=generator) * magnitudes
    return inputs.mT @ inputs / 50


def _s2(x: torch.Tensor, rule: ScaleRule = RULE) -> torch.Tensor:
    amax = reference.block_amax(x)
    return reference.global_scale(amax[amax.isfinite()].max(), rule)


def _first(x: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """The scale from which steps count."""
    return reference.round_to_e4m3((reference.divide(reference.block_amax(x), 6.0) / s2).clamp(min=2.0**-6))


def _errors(x: torch.Tensor, s2: torch.Tensor, hessians: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """d' H d of every candidate in float64: [steps, N, K // 16]."""
    x, first = x.double() / s2.double(), _first(x, s2)
    errors = []
    for step in rule.steps:
        scales = reference.neighbour(first, step)
        d = reference.decode(reference.encode(x.float(), scales), scales).double() - x
        d = d.unflatten(-1, (-1, 16))
        errors.append(torch.einsum("nbi,bij,nbj->nb", d, hessians.double(), d))
    return torch.stack(errors)


def test_the_chosen_step_has_the_least_error_where_arithmetic_is_exact():
    """x and H are small integers, so that errors are exact in float32 as in float64, and many of them equal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-6, 7, (512, 64), generator=generator) / 2
    inputs = torch.randint(-1, 2, (4, 6, 16), generator=generator).float()
    hessians = inputs.mT @ inputs
    one = torch.tensor(1.0)
    errors = _errors(x, one, hessians, RULE)
    # The first of equals has the larger scale.
    expected = torch.tensor(RULE.steps)[errors.argmin(0)]
    assert ((errors == errors.amin(0)).sum(0) > 1).any()
    assert torch.equal(reference.choose_steps(x, one, hessians, RULE), expected.to(torch.int8))


@pytest.mark.parametrize("global_scale", ["pow2", "exact"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_rounding_for_the_search_costs_next_to_nothing(spread, global_scale):
    """Next to ties of codes the search may see another code than the one that is written."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    hessians = _hessians(32, spread)
    rule = ScaleRule(block_scale="hessian", global_scale=global_scale)
    s2 = _s2(x, rule)
    errors = _errors(x, s2, hessians, rule)
    steps = reference.choose_steps(x, s2, hessians, rule)
    chosen = errors.gather(0, (rule.steps[0] - steps.long()).unsqueeze(0))
    assert (chosen > errors.amin(0)).float().mean() < 0.01
    assert chosen.sum() < 1.002 * errors.amin(0).sum()


def test_a_layer_loses_less_of_its_output_than_by_squared_errors_of_its_weights():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(128, 256, generator=generator) * 0.02
    inputs = torch.randn(512, 256, generator=generator) * torch.exp2(1.5 * torch.randn(256, generator=generator))
    of_blocks = inputs.unflatten(-1, (-1, 16)).transpose(0, 1)
    hessians = of_blocks.mT @ of_blocks / len(inputs)
    lost = {}
    for name in ("max", "mse", "hessian"):
        rule = ScaleRule(block_scale=name)
        s2 = _s2(weight, rule)
        steps = reference.choose_steps(weight, s2, hessians, rule) if rule.is_fitted else None
        lost[name] = (inputs @ (reference.fake_quant(weight, s2, torch.float32, rule, steps) - weight).t()).square().mean()
    assert lost["mse"] < 0.9 * lost["max"]
    assert lost["hessian"] < 0.7 * lost["mse"]


def test_errors_are_added_in_the_specified_order():
    """In NumPy, a float32 at a time."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)) * 5
    scales = _first(x, torch.tensor(1.0))
    x = reference.round_for_search(x, scales)
    hessians = _hessians(2, 3.0)
    found = reference.output_error(x, scales, hessians)
    short = (hessians.view(torch.int32) & -0x1000).view(torch.float32).numpy()
    errors = (reference.decode(reference.encode(x, scales), scales) - x).view(3, 2, 16).numpy()
    expected = np.empty((3, 2), np.float32)
    for n, b in np.ndindex(3, 2):
        terms = []
        for i in range(16):
            t = None
            for j in range(i + 1):
                product = short[b, i, j] * (np.float32(1) if i == j else np.float32(2)) * errors[n, b, j]
                t = product if t is None else t + product
            terms.append(t * errors[n, b, i])
        while len(terms) > 1:
            terms = [first + second for first, second in zip(terms[::2], terms[1::2], strict=True)]
        expected[n, b] = terms[0]
    assert_same_bits(found, torch.from_numpy(expected))
    assert_same_bits(found, reference.output_error(x, scales, hessians.tril() + torch.full((16, 16), torch.nan).triu(1)))
    exact = torch.einsum(
        "nbi,bij,nbj->nb", *map(torch.Tensor.double, (torch.from_numpy(errors), hessians, torch.from_numpy(errors)))
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=0)


@triton.jit
def _output_error_kernel(x_ptr, scales_ptr, hessian_ptr, errors_ptr, TILE: tl.constexpr):
    rows = tl.arange(0, TILE)
    a, b, c, d = triton_arithmetic.load_quarters(x_ptr, rows >= 0, TILE)
    x = triton_arithmetic.split_octet(a, b, False, TILE) + triton_arithmetic.split_octet(c, d, False, TILE)
    errors = triton_search._output_error(x, tl.load(scales_ptr + rows), triton_search._load_triangle(hessian_ptr))
    tl.store(errors_ptr + rows, errors)


def test_kernels_add_errors_in_the_same_order():
    """The choice of a step seldom depends on it, so the errors themselves are compared."""
    x = torch.randn(1024, 16, generator=torch.Generator().manual_seed(8)) * 5
    scales = _first(x, torch.tensor(1.0))
    x = reference.round_for_search(x, scales)
    scales = reference.neighbour(scales, torch.randint(-8, 9, scales.shape, generator=torch.Generator().manual_seed(9)))
    errors = torch.empty(1024, 1, device=DEVICE)
    arguments = x.to(DEVICE), scales.to(DEVICE), _hessians(1, 3.0).to(DEVICE), errors
    _output_error_kernel[(1,)](*arguments, TILE=1024, enable_fp_fusion=False)
    assert_same_bits(errors, reference.output_error(x, scales, _hessians(1, 3.0)))


@pytest.mark.parametrize("case", CASES)
def test_products_with_errors_are_exact(case):
    """Then an FMA and a product with a sum give the same bits. Under scales of their own, far too small ones among them."""
    blocks = CASES[case].flatten()[: CASES[case].numel() // 16 * 16].view(-1, 16)
    for s2 in (_s2(blocks), 2.0**-9 * 1.37, 2.0**-128, 2.0**100):
        first = _first(blocks, torch.as_tensor(s2))
        x = reference.round_for_search(blocks / s2, first)
        for step in range(-8, 9):
            scales = reference.neighbour(first, step)
            errors = reference.decode(reference.encode(x, scales), scales) - x
            assert not (errors.view(torch.int32) & 0xFFF).any()


def test_the_search_sees_blocks_of_ordinary_scales_within_2_to_the_minus_10_of_their_scale():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(4)) * 5
    scales = _first(x, torch.tensor(1.0))
    distance = (reference.round_for_search(x, scales) - x).unflatten(-1, (-1, 16)).abs()
    assert distance.max() > 0
    assert (distance <= 2.0**-10 * scales.unsqueeze(-1)).all()


def test_a_step_ends_where_a_limit_of_block_scales_comes_first():
    """Of zeros, and without a Hessian, every candidate loses nothing: the largest is taken."""
    x = torch.zeros(3, 16)
    x[1, 0], x[2, 0] = 6.0 * 384, 6.0 * 1e5
    zeros = torch.zeros(1, 16, 16)
    one = torch.tensor(1.0)
    assert reference.choose_steps(x, one, zeros, RULE).flatten().tolist() == [6, 2, 0]
    on_device = x.to(DEVICE), one.to(DEVICE), zeros.to(DEVICE)
    assert TRITON.choose_steps(*on_device, "hessian").flatten().tolist() == [6, 2, 0]
    steps = torch.tensor([[-5], [6], [6]], dtype=torch.int8)
    assert reference.block_scales(x, one, RULE, steps).flatten().tolist() == [2.0**-6, 448.0, 448.0]
    _assert_kernels_match(x, one, zeros, RULE, steps)


def _assert_kernels_match(x, s2, hessians, rule, steps=None) -> None:
    """The search, unless steps are given, and the operators that take steps."""
    on_device = x.to(DEVICE), s2.to(DEVICE)
    if steps is None:
        steps = reference.choose_steps(x, s2, hessians, rule)
        assert_same_bits(TRITON.choose_steps(*on_device, hessians.to(DEVICE), rule.block_scale), steps)
    packed, scales = reference.quantize(x, s2, rule, steps)
    packed_by_triton, scales_by_triton = TRITON.quantize(*on_device, rule.block_scale, steps.to(DEVICE))
    assert_same_bits(scales_by_triton, scales)
    assert_same_bits(packed_by_triton, packed)
    x_hat = TRITON.fake_quant(*on_device, x.dtype, rule.block_scale, steps.to(DEVICE))
    assert_same_bits(x_hat, reference.fake_quant(x, s2, x.dtype, rule, steps))
    assert_same_bits(x_hat, reference.dequantize(packed, scales, s2, x.dtype))


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a tile of many rows as for one of few."""
    monkeypatch.setitem(triton_kernels.TILES, "choose_steps", (512, 2))


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["gaussian", "ties", "many_magnitudes", "zeros_of_both_signs", "infinite"])
def test_kernels_match_reference_bitwise(case, dtype, few_steps):
    x = CASES[case].to(dtype)
    x = x.flatten()[: x.numel() // 32 * 32].view(-1, 32)
    for s2 in (_s2(x), _s2(x, ScaleRule(block_scale="hessian", global_scale="exact"))):
        _assert_kernels_match(x, s2, _hessians(2, 3.0), few_steps)


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("s2", [2.0**-9 * 1.37, 2.0**-128, 2.0**-59 * 1.7, 2.0**60, 2.0**119])
def test_kernels_match_reference_under_any_global_scale(s2, few_steps):
    """Blocks whose scales end at either limit, and quotients that over- and underflow."""
    x = torch.cat([CASES[case].flatten() for case in ("many_magnitudes", "infinite", "subnormal")])
    near = (
        torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        * torch.exp2(torch.arange(-32.0, 32.0) / 2)[:, None]
        * s2
    )
    x = torch.cat((x.view(-1, 16), near.nan_to_num(1.0)))
    _assert_kernels_match(x, torch.tensor(s2), _hessians(1, 3.0), few_steps)


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_match_reference_with_every_candidate_of_the_rule(dtype):
    x = (torch.randn(500, 16, generator=torch.Generator().manual_seed(5)) * 0.02).to(dtype)
    steps = reference.choose_steps(x, _s2(x), _hessians(1, 4.0), RULE)
    assert set(steps.flatten().tolist()) == set(RULE.steps)
    _assert_kernels_match(x, _s2(x), _hessians(1, 4.0), RULE)


@pytest.mark.parametrize("shape", [(1, 16), (9, 80), (5, 3, 48), (17, 32), (48,)], ids=str)
def test_programs_that_end_within_rows_and_columns(shape, few_steps, monkeypatch):
    """Programs of 2 tiles of 4 rows and of 2 columns."""
    monkeypatch.setitem(triton_kernels.TILES, "choose_steps", (4, 1))
    monkeypatch.setattr(triton_kernels, "SEARCH_ROWS", 8)
    monkeypatch.setattr(triton_kernels, "SEARCH_COLUMNS", 2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    _assert_kernels_match(x, _s2(x), _hessians(shape[-1] // 16), few_steps)


def test_a_search_takes_rows_piece_by_piece(monkeypatch):
    x = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    whole = reference.choose_steps(x, _s2(x), _hessians(3), RULE)
    for most in (1, 100, 48 * 37):
        monkeypatch.setattr(reference, "ELEMENTS_PER_SEARCH", most)
        assert torch.equal(reference.choose_steps(x, _s2(x), _hessians(3), RULE), whole)
    assert torch.equal(reference.choose_steps(x[5], _s2(x), _hessians(3), RULE), whole[5])


def test_a_nan_reaches_the_scale_of_its_block_alone(few_steps):
    x = CASES["gaussian"][:, :32].clone()
    x[2, 3] = torch.nan
    s2 = torch.tensor(1e-3)
    on_device = x.to(DEVICE), s2.to(DEVICE)
    steps = reference.choose_steps(x, s2, _hessians(2), few_steps)
    by_triton = TRITON.choose_steps(*on_device, _hessians(2).to(DEVICE), "few")
    assert steps[2, 0] == by_triton[2, 0] == 0
    assert_same_bits(by_triton, steps)
    for scales in (
        reference.block_scales(x, s2, few_steps, torch.full_like(steps, 5)),
        TRITON.quantize(*on_device, "few", torch.full_like(steps, 5).to(DEVICE))[1].float(),
    ):
        assert scales.isnan().nonzero().tolist() == [[2, 0]]
