"""Every Triton kernel gives the bits of `reference`: in the interpreter without a GPU, on CUDA with one."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import CASES, DEVICE, DTYPES, TRITON, assert_same_bits

from nvfp4_train.kernels import reference, triton_kernels
from nvfp4_train.kernels.scale_rules import ScaleRule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SCALES = {
    "pow2": None,
    "exact": None,
    "saturating": 1e-5,
    "large": 3e3,
    "smallest_normal": 2.0**-126,
    "subnormal": 3e-39,
    "outermost_ordinary": 2.0**-59 * 1.7,
    "largest": 1.2e35,
    "largest_pow2": 2.0**119,
}


def _s2(x: torch.Tensor, name: str) -> torch.Tensor:
    if SCALES[name] is not None:
        return torch.tensor(SCALES[name])
    amax = reference.block_amax(x)
    return reference.global_scale(amax[amax.isfinite()].max(), ScaleRule(global_scale="pow2" if name == "pow2" else "exact"))


def _assert_ops_match(x: torch.Tensor, s2: torch.Tensor, out_dtypes=DTYPES) -> None:
    on_device, s2_on_device = x.to(DEVICE), s2.to(DEVICE)
    assert_same_bits(TRITON.block_amax(on_device), reference.block_amax(x))
    packed, scales = reference.quantize(x, s2)
    packed_by_triton, scales_by_triton = TRITON.quantize(on_device, s2_on_device)
    assert_same_bits(packed_by_triton, packed)
    assert_same_bits(scales_by_triton, scales)
    for dtype in out_dtypes:
        assert_same_bits(TRITON.fake_quant(on_device, s2_on_device, dtype), reference.fake_quant(x, s2, dtype))
        decoded = TRITON.dequantize(packed.to(DEVICE), scales.to(DEVICE), s2_on_device, dtype)
        assert_same_bits(decoded, reference.dequantize(packed, scales, s2, dtype))


def _assert_static_ops_match(x: torch.Tensor, amax: torch.Tensor, global_amax: torch.Tensor, out_dtypes=DTYPES) -> None:
    for is_quantized in (True, False):
        on_device = amax.to(DEVICE), global_amax.to(DEVICE), is_quantized
        # Torch divides a tensor by 6 in another way on CUDA.
        scales = reference.static_scales(*on_device).cpu()
        assert_same_bits(TRITON.static_scales(*on_device), scales)
        for dtype in out_dtypes:
            x_hat = TRITON.static_fake_quant(x.to(DEVICE), *on_device, dtype)
            assert_same_bits(x_hat, reference.static_fake_quant(x, scales, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_ops_match_reference_bitwise(case, dtype):
    x = CASES[case].to(dtype)
    for scale in ("pow2", "exact"):
        _assert_ops_match(x, _s2(x, scale))


@pytest.mark.parametrize("scale", SCALES)
def test_ops_match_reference_under_any_global_scale(scale):
    for case in ("many_magnitudes", "infinite"):
        _assert_ops_match(CASES[case], _s2(CASES[case], scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", ["pow2", "exact"])
def test_programs_that_take_several_tiles(scale, dtype, monkeypatch):
    """Tensors of more than 2^24 elements have such programs; here smaller ones are made to."""
    monkeypatch.setattr(triton_kernels, "TILES_PER_PROGRAM", {"quantize": (3, 1)})
    x = torch.randn(6400, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[-1, -1] = 1e3
    _assert_ops_match(x, _s2(x, scale), out_dtypes=(dtype,))


def test_the_scale_of_an_amax_of_negative_zero():
    for is_quantized in (True, False):
        arguments = torch.tensor([-0.0, 1.0, 0.0], device=DEVICE), torch.tensor(1.0, device=DEVICE), is_quantized
        assert_same_bits(TRITON.static_scales(*arguments), reference.static_scales(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in CASES if name != "infinite"])
def test_static_ops_match_reference_bitwise(case, dtype):
    x = CASES[case].to(dtype)
    amax = reference.block_amax(x)
    _assert_static_ops_match(x, amax, amax.max())
    # Stale statistics: values above their amax saturate, scales above 448 do too.
    _assert_static_ops_match(x, (amax * 0.3).to(dtype), (amax.max() * 0.2).to(dtype), out_dtypes=(dtype,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 8, 10, 12, 24, 32, 48, 64, 96, 120, 128, 480])
def test_static_fake_quant_matches_reference_for_any_block_size(block_size, dtype):
    """On odd numbers of blocks, in more than a program of them, out of step with the tile for 24, 48, 96 and 120."""
    num_columns = next(columns for columns in (96, 120, 128, 480) if columns % block_size == 0)
    x = (torch.randn(23, num_columns, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    x[5] *= 1e-4
    x[7, ::3], x[8, 1::3] = -0.0, torch.nan
    amax = x.nan_to_num(0.0).unflatten(-1, (-1, block_size)).abs().amax(-1)
    amax[3], amax[4] = amax[3] * 0.3, 0.0
    _assert_static_ops_match(x, amax, amax.max(), out_dtypes=(dtype, torch.float32))


@pytest.mark.parametrize("global_amax", [0.0, 1e-45, 6 * 2.0**-24, 7 * 2.0**-24, 1e-3, 2.0**68, 1e38])
def test_static_scales_match_reference_under_any_global_amax(global_amax):
    x = CASES["many_magnitudes"]
    _assert_static_ops_match(x, reference.block_amax(x), torch.tensor(global_amax), out_dtypes=(torch.float32,))


def _e4m3_midpoints() -> torch.Tensor:
    """Every E4M3 value, every midpoint of two and the floats next to both; above 448 and below 2^-10 too."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat((values, (values[1:] + values[:-1]) / 2, torch.tensor([460.0, 464.0, 500.0, 1e9, 2.0**-12])))
    return torch.cat((points, torch.nextafter(points, torch.tensor(torch.inf)), torch.nextafter(points, torch.tensor(0.0))))


def test_e4m3_rounding_matches_torch():
    points = _e4m3_midpoints()
    # global_amax = 2688 makes the multiplier 1, so that a scale is E4M3(amax / 6).
    global_amax = torch.tensor(2688.0)
    amax = points * 6
    expected = (amax.to(DEVICE) / 6).cpu().clamp(max=448).to(torch.float8_e4m3fn).float()
    assert_same_bits(TRITON.static_scales(amax.to(DEVICE), global_amax.to(DEVICE), True), expected)


def test_block_scales_of_every_rounding_match_reference():
    amax = (_e4m3_midpoints() * 6).unsqueeze(-1)
    x = amax * torch.linspace(-1, 1, 16)
    _assert_ops_match(x, torch.tensor(1.0), out_dtypes=(torch.float32,))


@pytest.mark.parametrize("significand", [1.0, 1.25, 1.37, 1 + 2.0**-23])
def test_block_scales_match_reference_where_a_sixth_of_amax_is_subnormal(significand):
    """Next to midpoints of E4M3, by 16 multiples of 2^-149 on each side. There amax / 6 rounded twice would end on the other side."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    midpoints = (values[2:] + values[1:-1]) / 2
    for exponent in (-126, -125, -124, -121, -118):
        s2 = (torch.tensor(significand).double() * 2.0**exponent).float()
        units = (midpoints * s2.double() * 6 / 2.0**-149).round().unsqueeze(-1) + torch.arange(-16, 17)
        units = units[units < 2**26]
        x = torch.zeros(units.numel(), 16)
        x[:, 2] = (units * 2.0**-149).float()
        assert_same_bits(TRITON.quantize(x.to(DEVICE), s2.to(DEVICE))[1], reference.quantize(x, s2)[1])


@pytest.mark.parametrize("scale_dtype", [torch.float8_e4m3fn, *DTYPES], ids=str)
def test_dequantize_decodes_every_code_under_every_scale(scale_dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(scale_dtype)
    scales = scales.view(256, 1).repeat(1, 32)
    s2 = torch.tensor([0.37])
    for dtype in DTYPES:
        decoded = TRITON.dequantize(packed.to(DEVICE), scales.to(DEVICE), s2.to(DEVICE), dtype)
        assert_same_bits(decoded, reference.dequantize(packed, scales, s2, dtype))


@pytest.mark.parametrize(
    ("num_columns", "block_size"),
    [
        (48, 8),
        (48, 16),
        (96, 24),
        (96, 32),
        (96, 48),
        (192, 64),
        (256, 128),
        (2, 1),
        (6, 2),
        (24, 4),
        (6, 6),
        (60, 10),
        (48, 12),
        (36, 36),
        (4096, 4096),
    ],
)
def test_dequantize_takes_any_block_size(num_columns, block_size):
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (3, 7, num_columns // 2), generator=generator).byte()
    scales = torch.rand(3, 7, num_columns // block_size, generator=generator)
    decoded = TRITON.dequantize(packed.to(DEVICE), scales.to(DEVICE), torch.tensor(1.5, device=DEVICE), torch.float32)
    assert_same_bits(decoded, reference.dequantize(packed, scales, torch.tensor(1.5), torch.float32))


def test_static_scales_where_a_reciprocal_is_of_all_ones():
    """The significand whose reciprocal Newton's steps miss by an ulp."""
    sixth = torch.tensor([0x3FFFFFFF, 0x3F7FFFFF, 0x40FFFFFF], dtype=torch.int32).view(torch.float32)
    for global_amax in sixth * 6:
        assert (reference.divide(global_amax, 6.0).view(torch.int32) & 0x7FFFFF) == 0x7FFFFF
        amax = global_amax * torch.linspace(0.01, 1, 64)
        _assert_static_ops_match(torch.zeros(64, 16), amax, global_amax, out_dtypes=(torch.float32,))


@pytest.mark.parametrize("is_quantized", [True, False])
def test_static_scales_by_the_product_that_stands_for_the_division_on_cuda(is_quantized):
    amax = torch.rand(300, generator=torch.Generator().manual_seed(3)) + 0.5
    one_sixth = torch.tensor(1 / 6)
    expected = amax * one_sixth
    if is_quantized:
        multiplier = (amax.max() * one_sixth).reciprocal() * 448
        expected = reference.round_to_e4m3(expected * multiplier) * multiplier.reciprocal()
    else:
        assert 30 < (expected != amax / 6).sum() < 150
    scales = torch.empty(300, device=DEVICE)
    arguments = amax.to(DEVICE), amax.max().to(DEVICE), scales, 300
    triton_kernels.static_scales_kernel[(2,)](*arguments, is_quantized, True, 256, enable_fp_fusion=False)
    assert_same_bits(scales, expected)


def test_nan_reaches_amax_scale_and_output():
    x = CASES["gaussian"].clone()
    x[2, 3] = torch.nan
    s2 = torch.tensor(1e-3)
    assert TRITON.block_amax(x.to(DEVICE))[2, 0].isnan()
    scales = TRITON.quantize(x.to(DEVICE), s2.to(DEVICE))[1].float()
    assert int(scales.isnan().sum()) == 1
    assert TRITON.fake_quant(x.to(DEVICE), s2.to(DEVICE), torch.bfloat16)[2, :16].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment_do_not_change_bits(dtype):
    base = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)
    s2 = torch.tensor(1e-3, device=DEVICE)
    for x in (base.t(), base[::2], base[:, 16:48], base.flatten()[1:1025].view(2, 512), base.flatten()[8:1032]):
        expected = x.clone(memory_format=torch.contiguous_format)
        assert_same_bits(TRITON.block_amax(x), reference.block_amax(expected))
        assert_same_bits(TRITON.fake_quant(x, s2, dtype), reference.fake_quant(expected, s2, dtype))
        for actual, wanted in zip(TRITON.quantize(x, s2), reference.quantize(expected, s2), strict=True):
            assert_same_bits(actual, wanted)


def _assert_contract(x: torch.Tensor, s2: torch.Tensor) -> None:
    packed, scales = reference.quantize(x, s2)
    assert_same_bits(reference.fake_quant(x, s2, x.dtype), reference.dequantize(packed, scales, s2, x.dtype))
    assert_same_bits(TRITON.fake_quant(x.to(DEVICE), s2.to(DEVICE), x.dtype), reference.fake_quant(x, s2, x.dtype))
    for actual, wanted in zip(TRITON.quantize(x.to(DEVICE), s2.to(DEVICE)), (packed, scales), strict=True):
        assert_same_bits(actual, wanted)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    num_blocks=st.integers(1, 40),
    exponent_spread=st.sampled_from([0, 3, 30, 120]),
    is_pow2=st.booleans(),
    significand_bits=st.sampled_from([0, 2, 4, 8, 23]),
)
def test_random_values_match_reference(seed, dtype, num_blocks, exponent_spread, is_pow2, significand_bits):
    """Few significand bits make ties frequent; a wide spread of exponents reaches subnormal and saturated scales."""
    generator = torch.Generator().manual_seed(seed)
    significand = torch.randint(0, 1 << significand_bits, (num_blocks, 16), generator=generator) / (1 << significand_bits) + 1
    exponent = torch.randint(-exponent_spread, exponent_spread + 1, (num_blocks, 1), generator=generator)
    exponent = exponent + torch.randint(-5, 1, (num_blocks, 16), generator=generator)
    sign = torch.randint(0, 2, (num_blocks, 16), generator=generator) * 2 - 1
    x = (significand * torch.exp2(exponent.float()) * sign).to(dtype)
    x = torch.where(x.isfinite(), x, torch.ones_like(x))
    _assert_contract(
        x, reference.global_scale(reference.block_amax(x).max(), ScaleRule(global_scale="pow2" if is_pow2 else "exact"))
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale_bits=st.integers(0x00200000, 0x7B000000))
def test_random_bit_patterns_match_reference(seed, scale_bits):
    """Any float32 but NaN, under any s2 from 2^-128 to 2^119."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**31), 2**31, (24, 16), generator=generator).int().view(torch.float32)
    s2 = torch.tensor(scale_bits, dtype=torch.int32).view(torch.float32)
    _assert_contract(x.nan_to_num(1.0, torch.inf, -torch.inf), s2)
