"""Scale rules: what they choose, against a search in float64; and that a rule is one line of data on every path."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import CASES, DEVICE, DTYPES, QUANTIZERS, TRITON, assert_same_bits, outputs_of

from nvfp4_train.kernels import fp4_kernel, reference, triton_arithmetic, triton_scales
from nvfp4_train.kernels.chunks import slots_of_groups
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES, BlockScaleRule, ScaleRule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

UNFITTED = [name for name, rule in BLOCK_SCALE_RULES.items() if not rule.is_fitted]
SEARCHING = [name for name in UNFITTED if name != "max"]
GLOBAL_SCALES = ("pow2", "exact")
OWN_SCALES = (1.0, 2.0**-9 * 1.37, 2.0**-128, 3e-39, 2.0**-59 * 1.7, 2.0**-60, 2.0**60, 1.2e35, 2.0**119)
"""Global scales on both sides of every branch of the kernels, subnormal ones among them."""


@pytest.fixture(params=[{"factors": (1.25, 0.8)}, {"steps": (3, 2, 1, 0)}], ids=str)
def toy_rule(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A rule that is in the table and nowhere else."""
    monkeypatch.setitem(BLOCK_SCALE_RULES, "toy", BlockScaleRule(**request.param, largest=300.0))
    return "toy"


BLOCK_SCALES = torch.arange(8, 127).to(torch.uint8).view(torch.float8_e4m3fn).double()
"""Every block scale there is, ascending."""


def _candidates(x: torch.Tensor, s2: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """float64 [candidates, ..., blocks], from ratios in float64."""
    amax = x.double().unflatten(-1, (-1, 16)).abs().amax(-1)
    ratios = amax / 6 / s2.double() * torch.tensor(rule.factors).double().view(-1, *[1] * amax.dim())
    first = torch.searchsorted(BLOCK_SCALES, ratios.clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn).double())
    return torch.cat([BLOCK_SCALES[(first + step).clamp(0, len(BLOCK_SCALES) - 1)] for step in rule.steps])


def _errors(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Sum of squares over each block to the nearest value, sign aside, that x can have under decode scales; all in float64."""
    blocks = x.double().abs().unflatten(-1, (-1, 16))
    grid = torch.tensor(reference.E2M1_VALUES).double() * scales.unsqueeze(-1)
    return (blocks.unsqueeze(-1) - grid.unsqueeze(-2)).abs().amin(-1).square().sum(-1)


def _assert_best(x: torch.Tensor, s2: torch.Tensor, rule: ScaleRule) -> None:
    """The scales of `reference` are candidates, and none has a smaller error but for rounding."""
    scales = reference.block_scales(x, s2, rule).double()
    candidates = _candidates(x, s2, rule)
    assert (scales == candidates).any(0).all()
    least = _errors(x.expand(len(candidates), *x.shape), candidates * s2.double()).amin(0)
    # Each of at most 22 roundings, of values up to 6 * 448 * s2, shifts an error by a few units in the last place.
    slack = least * 2.0**-18 + (reference.block_amax(x).double() * 2.0**-22) ** 2
    assert (_errors(x, scales * s2.double()) <= least + slack).all()


def _s2(x: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    amax = reference.block_amax(x)
    return reference.global_scale(amax[amax.isfinite()].max(), rule)


def _assert_kernels_match(x: torch.Tensor, s2: torch.Tensor, block_scale: str) -> None:
    packed, scales = reference.quantize(x, s2, ScaleRule(block_scale=block_scale))
    packed_by_triton, scales_by_triton = TRITON.quantize(x.to(DEVICE), s2.to(DEVICE), block_scale)
    assert_same_bits(scales_by_triton, scales)
    assert_same_bits(packed_by_triton, packed)
    x_hat = TRITON.fake_quant(x.to(DEVICE), s2.to(DEVICE), x.dtype, block_scale)
    assert_same_bits(x_hat, reference.dequantize(packed, scales, s2, x.dtype))


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("block_scale", UNFITTED)
@pytest.mark.parametrize("case", ["gaussian", "ties", "tiny_block", "many_magnitudes", "experts"])
def test_the_chosen_scale_has_the_least_error_of_all_candidates(case, block_scale, global_scale):
    rule = ScaleRule(global_scale=global_scale, block_scale=block_scale)
    _assert_best(CASES[case], _s2(CASES[case], rule), rule)


def test_of_equal_errors_the_larger_scale_is_taken():
    one = torch.tensor(1.0)
    x = torch.zeros(4, 16)
    x[:, :3] = torch.tensor([6.0, 3.0, -1.5])  # no error under 1.5 and under 1
    x[1, 3] = 0.625  # an error of 1/8 under both
    x[2, 3] = 1.0  # none under 1
    x[3, 3] = 0.75  # none under 1.5
    scales = reference.block_scales(x, one, ScaleRule(block_scale="four_over_six"))
    assert scales.flatten().tolist() == [1.5, 1.5, 1.0, 1.5]
    _assert_kernels_match(x, one, "four_over_six")
    # Of 9 steps, those to 1.5 and 1 lose nothing of the first block, and none loses anything of zeros.
    x[1:] = 0.0
    scales = reference.block_scales(x, one, ScaleRule(block_scale="mse"))
    assert scales.flatten().tolist() == [1.5] + [2.0**-6 * 1.75] * 3
    _assert_kernels_match(x, one, "mse")


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("power", [1, 3])
def test_steps_lose_no_more_than_a_grid_of_factors(power, global_scale):
    """The best of 17 factors from 0.7 to 1.5, for the blocks of Gaussian and of heavy-tailed weights."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) ** power
    rule = ScaleRule(global_scale=global_scale, block_scale="mse")
    s2 = _s2(x, rule)
    ratios = reference.block_amax(x) / 6 / s2
    of_factors = torch.stack([
        reference.squared_error(x / s2, reference.round_to_e4m3((ratios * step / 20).clamp(min=2.0**-6)))
        for step in range(14, 31)
    ])  # fmt: skip
    assert (reference.squared_error(x / s2, reference.block_scales(x, s2, rule)) <= of_factors.amin(0)).all()


def test_neighbours_are_those_of_e4m3_within_the_limits():
    scales = BLOCK_SCALES.float()
    for step in range(-8, 9):
        expected = scales[(torch.arange(len(scales)) + step).clamp(0, len(scales) - 1)]
        assert_same_bits(reference.neighbour(scales, step), expected)
        assert_same_bits(reference.neighbour(scales, torch.full(scales.shape, step, dtype=torch.int8)), expected)
    assert reference.neighbour(torch.tensor(torch.nan), 6).isnan()


def test_squares_are_added_in_pairs_of_neighbours():
    """Sixteen squares whose sum depends on the order."""
    x = torch.tensor([[1.0, 2.0**-12.5, 2.0**-12, 2.0**-13] * 4]) * torch.linspace(1, 1.7, 16)
    error = (reference.decode(reference.encode(x, torch.ones(1, 1)), torch.ones(1, 1)) - x).flatten()
    sums = [value * value for value in error]
    while len(sums) > 1:
        sums = [first + second for first, second in zip(sums[::2], sums[1::2], strict=True)]
    found = reference.squared_error(x, torch.ones(1, 1))
    assert_same_bits(found, sums[0].reshape(1, 1))
    in_order = sum((value * value for value in error[1:]), start=error[0] * error[0])
    assert found.item() != in_order.item()


@triton.jit
def _squared_error_kernel(x_ptr, scales_ptr, errors_ptr, TILE: tl.constexpr):
    rows = tl.arange(0, TILE)
    is_narrow: tl.constexpr = triton_arithmetic.is_narrow(x_ptr)
    a, b, c, d = triton_arithmetic.load_quarters(x_ptr, rows >= 0, TILE)
    a, b, c, d = triton_arithmetic.widen(a, b, c, d, x_ptr.dtype.element_ty)
    errors = triton_scales._squared_error(a, b, c, d, tl.load(scales_ptr + rows), is_narrow, is_narrow)
    tl.store(errors_ptr + rows, errors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_add_squares_in_the_same_order(dtype):
    """The choice of a scale seldom depends on it, so the sums themselves are compared."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1024, 16, generator=generator) * 3).to(dtype)
    scales = torch.randint(8, 127, (1024, 1), generator=generator).to(torch.uint8).view(torch.float8_e4m3fn).float() / 64
    errors = torch.empty(1024, 1, device=DEVICE)
    _squared_error_kernel[(1,)](x.to(DEVICE), scales.to(DEVICE), errors, TILE=1024, enable_fp_fusion=False)
    assert_same_bits(errors, reference.squared_error(x.float(), scales))


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
def test_more_candidates_lose_less_of_a_gaussian(global_scale):
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = {}
    for block_scale in ("max", "four_over_six", "mse"):
        rule = ScaleRule(global_scale=global_scale, block_scale=block_scale)
        x_hat = reference.fake_quant(x, _s2(x, rule), torch.float32, rule)
        noise[block_scale] = float((x_hat.double() - x).square().sum() / x.double().square().sum())
    assert noise["four_over_six"] < 0.9 * noise["max"]
    assert noise["mse"] < 0.95 * noise["four_over_six"]


@pytest.mark.parametrize("largest", [rule.largest for rule in BLOCK_SCALE_RULES.values()] + [128.0, 300.0])
def test_pow2_scale_is_the_next_power_of_two(largest, monkeypatch):
    monkeypatch.setitem(BLOCK_SCALE_RULES, "toy", BlockScaleRule(factors=(1.0,), largest=largest))
    divisor = 6 * largest
    amax = torch.exp2(torch.linspace(-110, 115, 4001)) * divisor
    amax = torch.cat((amax, divisor * torch.exp2(torch.arange(-110.0, 115.0)), torch.nextafter(amax, torch.tensor(torch.inf))))
    rules = [ScaleRule(global_scale=name, block_scale="toy") for name in GLOBAL_SCALES]
    pow2, exact = (reference.global_scale(amax, rule) for rule in rules)
    assert torch.equal(pow2.double(), torch.exp2(torch.ceil(torch.log2(amax.double() / divisor))))
    assert_same_bits(exact, amax / divisor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "block_scale"),
    [*((case, "four_over_six") for case in CASES), *((case, "mse") for case in ("ties", "many_magnitudes", "infinite"))],
)
def test_kernels_match_reference_bitwise(case, block_scale, dtype):
    x = CASES[case].to(dtype)
    if block_scale == "mse":
        # A sample: the interpreter takes 9 times as long.
        x = x.flatten()[: x.numel() // 16 * 16].view(-1, 16)[:: max(1, x.numel() // 1024)]
    for global_scale in GLOBAL_SCALES:
        _assert_kernels_match(x, _s2(x, ScaleRule(global_scale=global_scale, block_scale=block_scale)), block_scale)


@pytest.mark.parametrize(
    ("block_scale", "s2"), [*(("four_over_six", s2) for s2 in OWN_SCALES), ("mse", 2.0**-9 * 1.37), ("mse", 2.0**-128)]
)
def test_kernels_match_reference_under_any_global_scale(block_scale, s2):
    """Quotients by it overflow and underflow."""
    for case in ("many_magnitudes", "infinite", "subnormal"):
        _assert_kernels_match(CASES[case][::5], torch.tensor(s2), block_scale)


@pytest.mark.parametrize("block_scale", SEARCHING)
def test_kernels_match_reference_on_random_bits(block_scale):
    """Any float32 but NaN in a block, around every exponent of s2."""
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-128, 120, 62 if block_scale == "mse" else 31):
        s2 = torch.tensor(1 + float(torch.rand(1, generator=generator))) * 2.0**exponent
        near = (
            torch.randn(32, 16, generator=generator).double()
            * s2.double()
            * torch.exp2(torch.arange(-8.0, 8.0, 0.5)).unsqueeze(1)
        )
        bits = torch.randint(-(2**31), 2**31, (32, 16), generator=generator).int().view(torch.float32)
        x = torch.where(torch.rand(32, 16, generator=generator) < 0.9, near.float(), bits).nan_to_num(
            1.0, torch.inf, -torch.inf
        )
        _assert_kernels_match(torch.cat((x, near.float())), s2.clamp(max=2.0**119), block_scale)


@pytest.mark.parametrize("block_scale", UNFITTED)
def test_a_nan_reaches_the_scale_of_its_block_alone(block_scale):
    x = CASES["gaussian"].clone()
    x[2, 3] = torch.nan
    s2 = torch.tensor(1e-3)
    for scales in (
        reference.block_scales(x, s2, ScaleRule(block_scale=block_scale)),
        TRITON.quantize(x.to(DEVICE), s2.to(DEVICE), block_scale)[1].float(),
    ):
        assert scales.isnan().nonzero().tolist() == [[2, 0]]


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
def test_a_rule_is_one_line_of_data(toy_rule, global_scale):
    """It is searched by the reference, the operators, the kernels and the pass over whole models, under its own s2."""
    x = CASES["gaussian"] * 0.02
    rule = ScaleRule(global_scale=global_scale, block_scale=toy_rule)
    amax = x.abs().amax()
    s2 = fp4_kernel.nvfp4_global_scale(amax, rule)
    expected = amax / 1800
    assert s2 == (torch.exp2(torch.ceil(torch.log2(expected))) if global_scale == "pow2" else expected)
    _assert_best(x, s2, rule)
    _assert_kernels_match(x, s2, toy_rule)
    packed, scales = reference.quantize(x, s2, rule)
    assert (scales.float() != reference.quantize(x, s2)[1].float()).any()
    for found, wanted in zip(fp4_kernel.nvfp4_quantize(x.to(DEVICE), s2.to(DEVICE), rule), (packed, scales), strict=True):
        assert_same_bits(found, wanted)
    x_hat = fp4_kernel.fp4_dequantize(packed, scales, s2)
    assert_same_bits(fp4_kernel.nvfp4_fake_quant(x.to(DEVICE), s2.to(DEVICE), rule=rule), x_hat)
    for quantizer_class in QUANTIZERS:
        masters = [x.to(DEVICE)]
        outputs = outputs_of(masters)
        quantizer_class(masters, *slots_of_groups(masters, [0]), rule=rule, **outputs).step()
        assert_same_bits(outputs["packed"][0], packed)
        assert_same_bits(outputs["scales"][0], scales)
        assert_same_bits(outputs["decoded"][0], x_hat.bfloat16())


BAD_RULES = {
    "no factors": (lambda: BlockScaleRule(factors=(), largest=448.0), r"factors must descend .* got \(\)"),
    "ascending": (lambda: BlockScaleRule(factors=(1.0, 1.5), largest=256.0), r"factors must descend .* got \(1.0, 1.5\)"),
    "twice the same": (lambda: BlockScaleRule(factors=(1.0, 1.0), largest=256.0), "factors must descend"),
    "too small": (lambda: BlockScaleRule(factors=(1.0, 0.05), largest=256.0), "at least 1/16"),
    "too large": (lambda: BlockScaleRule(factors=(17.0, 1.0), largest=256.0), "at most 16"),
    "no steps": (lambda: BlockScaleRule(steps=(), largest=256.0), r"steps must descend one by one .* got \(\)"),
    "steps with a gap": (lambda: BlockScaleRule(steps=(4, 2), largest=256.0), r"steps must descend one by one .* got \(4, 2\)"),
    "ascending steps": (lambda: BlockScaleRule(steps=(0, 1), largest=256.0), "steps must descend one by one"),
    "nine steps up": (lambda: BlockScaleRule(steps=(9, 8), largest=256.0), "within -8 to 8"),
    "steps of two factors": (
        lambda: BlockScaleRule(factors=(1.5, 1.0), steps=(1, 0), largest=256.0),
        r"factors must be \(1.0,\) where there are steps, got \(1.5, 1.0\)",
    ),
    "a fitted factor": (lambda: BlockScaleRule(factors=(1.5,), largest=256.0, is_fitted=True), "where there are steps"),
    "largest": (lambda: BlockScaleRule(factors=(1.0,), largest=512.0), "largest must lie in 128 to 448, got 512"),
    "block scale": (lambda: ScaleRule(block_scale="5/6"), "must be one of max, four_over_six, mse, hessian, got '5/6'"),
    "global scale": (lambda: ScaleRule(global_scale="pow3"), "must be 'pow2' or 'exact', got 'pow3'"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_bad_rules_are_refused_with_what_was_required_and_what_came(name):
    call, message = BAD_RULES[name]
    with pytest.raises(ValueError, match=message):
        call()
