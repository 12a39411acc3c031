"""The public functions: what they accept, what they refuse, and that they are the operators behind them."""

import inspect

import pytest
import torch
from kernel_cases import CASES, DEVICE, DTYPES, assert_same_bits

from nvfp4_train.kernels import fp4_kernel, reference
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule

X = CASES["odd_3d"].to(DEVICE)
AMAX = reference.block_amax(X)
S2 = torch.tensor([2.0**-8], device=DEVICE)
PACKED, BLOCK_SCALES = reference.quantize(X, S2)


def test_documented_functions_keep_names_order_and_defaults():
    documented = {
        fp4_kernel.compute_fp4_scales: {"amax": None, "global_amax": None, "quantize_block_scales": True},
        fp4_kernel.fp4_dequantize: {
            "packed_tensor": None, "scale_tensor": None, "global_scale": None,
            "block_size": 16, "tile_size": 128, "dtype": torch.float32,
        },
        fp4_kernel.static_blockwise_fp4_fake_quant: {
            "x": None, "amax": None, "global_amax": None, "quantize_block_scales": True, "out_dtype": None,
        },
    }  # fmt: skip
    for function, parameters in documented.items():
        found = inspect.signature(function).parameters
        assert list(found) == list(parameters)
        for name, default in parameters.items():
            assert found[name].default in (default, inspect.Parameter.empty), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_quant_is_dequantized_quantize(dtype):
    x = X.to(dtype)
    packed, scales = fp4_kernel.nvfp4_quantize(x, S2)
    assert packed.shape == (*x.shape[:-1], x.shape[-1] // 2)
    assert scales.dtype == torch.float8_e4m3fn
    x_hat = fp4_kernel.nvfp4_fake_quant(x, S2)
    assert_same_bits(x_hat, fp4_kernel.fp4_dequantize(packed, scales, S2, dtype=dtype))
    assert_same_bits(fp4_kernel.nvfp4_fake_quant(x, S2, torch.float32), fp4_kernel.fp4_dequantize(packed, scales, S2))


def test_static_fake_quant_with_pow2_statistics_equals_nvfp4_fake_quant():
    global_amax = AMAX.max()
    s2 = fp4_kernel.nvfp4_global_scale(global_amax)
    x_hat = fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX, 2688 * s2)
    # But for the sign of zeros.
    assert torch.equal(x_hat, fp4_kernel.nvfp4_fake_quant(X, s2))
    assert not x_hat[x_hat == 0].signbit().any()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (3, 15), (3, 5, 3)])
def test_static_fake_quant_takes_amax_of_any_shape(shape):
    x_hat = fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX.reshape(shape), out_dtype=torch.bfloat16)
    scales = fp4_kernel.compute_fp4_scales(AMAX)
    assert_same_bits(x_hat, reference.static_fake_quant(X, scales, torch.bfloat16))


BLOCK_SIZES = [1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 64, 96, 120, 128, 480]


def _fake_quant_in_floats(x, amax, global_amax, is_quantized, block_size):
    """Element by element: the quotient, its place between the midpoints of E2M1, and the value there."""
    # On DEVICE: torch divides by 6 in another way on CUDA.
    scales = (amax.to(DEVICE).float() / 6).cpu()
    if is_quantized:
        # In Model Optimizer's arithmetic, a reciprocal and a product.
        inverse = ((global_amax.to(DEVICE).float() / 6).cpu().reciprocal() * 448).item()
        scales = (scales * inverse).clamp(max=448).to(torch.float8_e4m3fn).float() * torch.tensor(inverse).reciprocal()
    scales = scales.flatten().repeat_interleave(block_size).view(x.shape)
    quotients = x.float().abs() / scales
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    is_above = (quotients.unsqueeze(-1) > midpoints) | (quotients.unsqueeze(-1) == midpoints) & (torch.arange(7) % 2 == 1)
    values = torch.tensor(reference.E2M1_VALUES)[is_above.sum(-1)] * scales * x.float().sign()
    return torch.where(scales == 0, 0.0, values).where(x.isfinite(), torch.nan) + 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_static_fake_quant_takes_blocks_of_any_size(block_size, dtype):
    """The size is that of x over that of amax; a zero scale makes zeros, and NaN stays NaN."""
    num_columns = next(columns for columns in (96, 120, 128, 480) if columns % block_size == 0)
    x = torch.randn(3, 2, num_columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    amax = x.unflatten(-1, (-1, block_size)).abs().amax(-1)
    amax[1, 0] *= 0.3  # stale statistics, which saturate
    amax[2, 1] = 0.0
    x[0, 0, 1] = torch.nan
    x[2, 1, 0] = -1.0
    for global_amax in (None, torch.tensor(1.7)):
        for is_quantized in (True, False):
            arguments = amax.to(DEVICE), None if global_amax is None else global_amax.to(DEVICE), is_quantized
            x_hat = fp4_kernel.static_blockwise_fp4_fake_quant(x.to(DEVICE), *arguments)
            wanted = _fake_quant_in_floats(
                x, amax, amax.max() if global_amax is None else global_amax, is_quantized, block_size
            )
            assert_same_bits(x_hat, wanted.to(dtype))
            assert (x_hat[2, 1] == 0).all()
            assert x_hat[0, 0, 1].isnan()


def test_fake_quant_lands_on_the_grid_and_keeps_fixed_points():
    scales = fp4_kernel.compute_fp4_scales(AMAX)
    x_hat = fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX)
    ratio = (x_hat.unflatten(-1, (-1, 16)) / scales.unsqueeze(-1)).abs()
    grid = torch.tensor(reference.E2M1_VALUES, device=DEVICE)
    assert float((ratio.unsqueeze(-1) - grid).abs().amin(-1).max()) < 1e-6
    assert torch.equal(fp4_kernel.static_blockwise_fp4_fake_quant(x_hat, AMAX), x_hat)


@pytest.mark.parametrize("scale_dtype", [torch.float8_e4m3fn, *DTYPES], ids=str)
def test_dequantize_takes_scales_of_any_dtype_and_ignores_tile_size(scale_dtype):
    expected = reference.dequantize(PACKED, BLOCK_SCALES, S2, torch.float32)
    assert_same_bits(fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES.to(scale_dtype), S2, tile_size=64), expected)


@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (0,), (2, 0, 16)])
def test_empty_tensors_pass_through(shape):
    x = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
    amax = fp4_kernel.nvfp4_block_amax(x)
    assert amax.shape == (*shape[:-1], shape[-1] // 16)
    assert fp4_kernel.compute_fp4_scales(amax).shape == amax.shape
    assert fp4_kernel.static_blockwise_fp4_fake_quant(x, amax).shape == x.shape
    assert fp4_kernel.nvfp4_fake_quant(x, S2).shape == x.shape
    packed, scales = fp4_kernel.nvfp4_quantize(x, S2)
    assert fp4_kernel.fp4_dequantize(packed, scales, S2).shape == x.shape
    hessian = torch.empty(shape[-1] // 16, 16, 16, device=DEVICE)
    assert fp4_kernel.nvfp4_choose_steps(x, S2, hessian, FITTED).shape == amax.shape


def test_a_scale_of_more_dimensions_lends_none_to_the_result():
    x, amax, one = torch.randn(3, 32, device=DEVICE), torch.rand(3, 2, device=DEVICE), torch.ones(1, 1, 1, device=DEVICE)
    packed, scales = fp4_kernel.nvfp4_quantize(x, one)
    assert (packed.shape, scales.shape) == ((3, 16), (3, 2))
    assert fp4_kernel.nvfp4_fake_quant(x, one).shape == x.shape
    assert fp4_kernel.fp4_dequantize(packed, scales, one).shape == x.shape
    assert fp4_kernel.compute_fp4_scales(amax, one).shape == amax.shape
    assert fp4_kernel.static_blockwise_fp4_fake_quant(x, amax, one).shape == x.shape


def test_scales_of_no_blocks_have_no_gradient():
    assert not fp4_kernel.compute_fp4_scales(torch.empty(0, 2, requires_grad=True)).requires_grad


def test_global_amax_defaults_to_the_largest_amax():
    assert_same_bits(fp4_kernel.compute_fp4_scales(AMAX), fp4_kernel.compute_fp4_scales(AMAX, AMAX.max()))
    assert_same_bits(fp4_kernel.compute_fp4_scales(AMAX, quantize_block_scales=False), AMAX / 6)


def _with(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


def test_steps_of_a_fitted_rule_are_taken_as_they_are():
    hessian = torch.eye(16, device=DEVICE).expand(3, 16, 16)
    steps = fp4_kernel.nvfp4_choose_steps(X, S2, hessian, FITTED)
    assert steps.dtype == torch.int8
    packed, scales = fp4_kernel.nvfp4_quantize(X, S2, FITTED, steps)
    largest = fp4_kernel.nvfp4_quantize(X, S2)[1].view(torch.uint8)
    assert torch.equal(scales.view(torch.uint8).int() - largest.int(), steps.int())
    assert (steps != 0).any()
    x_hat = fp4_kernel.nvfp4_fake_quant(X, S2, rule=FITTED, steps=steps)
    assert_same_bits(x_hat, fp4_kernel.fp4_dequantize(packed, scales, S2))
    assert (x_hat - X).norm() < (fp4_kernel.nvfp4_fake_quant(X, S2) - X).norm()


FITTED = ScaleRule(block_scale="hessian")
STEPS = torch.zeros(3, 5, 3, dtype=torch.int8, device=DEVICE)
HESSIAN = torch.zeros(3, 16, 16, device=DEVICE)

BAD_CALLS = {
    "no steps": (lambda: fp4_kernel.nvfp4_quantize(X, S2, FITTED), "steps are required under rule 'hessian', got None"),
    "no steps to decode": (lambda: fp4_kernel.nvfp4_fake_quant(X, S2, rule=FITTED), "steps are required under rule 'hessian'"),
    "steps of another rule": (
        lambda: fp4_kernel.nvfp4_fake_quant(X, S2, steps=STEPS),
        "steps are for fitted rules alone, got some under rule 'max'",
    ),
    "shape of steps": (
        lambda: fp4_kernel.nvfp4_quantize(X, S2, FITTED, STEPS[:2]),
        r"steps must be int8 of shape \(3, 5, 3\) .* got torch.int8 of shape \(2, 5, 3\)",
    ),
    "dtype of steps": (lambda: fp4_kernel.nvfp4_quantize(X, S2, FITTED, STEPS.int()), "steps must be int8 .* got torch.int32"),
    "device of steps": (
        lambda: fp4_kernel.nvfp4_quantize(X, S2, FITTED, STEPS.to("meta")),
        "steps must be on the device of the quantized tensor",
    ),
    "steps are a list": (lambda: fp4_kernel.nvfp4_quantize(X, S2, FITTED, [1]), "steps must be a tensor, got list"),
    "a rule without steps": (
        lambda: fp4_kernel.nvfp4_choose_steps(X, S2, HESSIAN, MAX_RULE),
        "rule must be fitted to choose steps, as block_scale='hessian' is, got 'max'",
    ),
    "shape of the Hessian": (
        lambda: fp4_kernel.nvfp4_choose_steps(X, S2, HESSIAN[:2], FITTED),
        r"hessian must be float32 of shape \(3, 16, 16\) .* got torch.float32 of shape \(2, 16, 16\)",
    ),
    "dtype of the Hessian": (
        lambda: fp4_kernel.nvfp4_choose_steps(X, S2, HESSIAN.double(), FITTED),
        "hessian must be float32 .* got torch.float64",
    ),
    "device of the Hessian": (
        lambda: fp4_kernel.nvfp4_choose_steps(X, S2, HESSIAN.to("meta"), FITTED),
        "hessian must be on the device of the quantized tensor",
    ),
    "steps of K = 24": (
        lambda: fp4_kernel.nvfp4_choose_steps(X[..., :24], S2, HESSIAN, FITTED),
        "multiple of the block size 16",
    ),
    "x is integer": (lambda: fp4_kernel.nvfp4_block_amax(X.int()), "dtype of x must be one of .* got torch.int32"),
    "x is double": (lambda: fp4_kernel.nvfp4_quantize(X.double(), S2), "dtype of x must be one of .* got torch.float64"),
    "K is 24": (lambda: fp4_kernel.nvfp4_fake_quant(X[..., :24], S2), r"multiple of the block size 16, got shape \(3, 5, 24\)"),
    "x is a scalar": (lambda: fp4_kernel.nvfp4_block_amax(X.sum()), "multiple of the block size 16, got shape"),
    "two global scales": (lambda: fp4_kernel.nvfp4_quantize(X, S2.repeat(2)), "global_scale must have one element, got 2"),
    "integer global scale": (lambda: fp4_kernel.nvfp4_quantize(X, S2.int()), "dtype of global_scale must be one of"),
    "out_dtype": (lambda: fp4_kernel.nvfp4_fake_quant(X, S2, torch.int8), "out_dtype must be one of .* got torch.int8"),
    "amax has no divisor of x": (
        lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX.flatten()[:7]),
        r"a number of elements that divides the 720 of x, got 7 in shape \(7,\) for x of shape \(3, 5, 48\)",
    ),
    "blocks across rows": (
        lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX.flatten()[:10]),
        "must divide the last dimension of x, 48, but it is 72: amax must have one element per block, got 10",
    ),
    "no amax": (lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX[:0]), "divides the 720 of x, got 0 in shape"),
    "amax of nothing": (lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X[:0], AMAX), "no element where x has none, got 45"),
    "static x is a scalar": (
        lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X.sum(), AMAX.max()),
        "x must have at least one dimension",
    ),
    "amax K is 24": (lambda: fp4_kernel.nvfp4_block_amax(X[..., :24]), "multiple of the block size 16"),
    "static x is integer": (lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X.int(), AMAX), "dtype of x must be"),
    "static out_dtype": (
        lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX, out_dtype=torch.float64),
        "out_dtype must be one of",
    ),
    "amax is integer": (lambda: fp4_kernel.compute_fp4_scales(AMAX.int()), "dtype of amax must be one of"),
    "amax has NaN": (
        lambda: fp4_kernel.compute_fp4_scales(_with(AMAX.cpu(), torch.nan)),
        "amax must be finite and not negative, got 1 NaN, Inf or negative among 45",
    ),
    "amax has Inf": (
        lambda: fp4_kernel.static_blockwise_fp4_fake_quant(X.cpu(), _with(AMAX.cpu(), torch.inf)),
        "amax must be finite and not negative, got 1 NaN, Inf or negative among 45",
    ),
    "global amax is NaN": (
        lambda: fp4_kernel.compute_fp4_scales(AMAX.cpu(), AMAX.cpu().max() * torch.nan),
        "global_amax must be finite and not negative, got 1 NaN, Inf or negative among 1",
    ),
    "global amax is a vector": (
        lambda: fp4_kernel.compute_fp4_scales(AMAX, AMAX[0, 0]),
        "global_amax must have one element, got 3",
    ),
    "amax is negative": (
        lambda: fp4_kernel.compute_fp4_scales(torch.tensor([1.0, -1.0])),
        "got 1 NaN, Inf or negative among 2",
    ),
    "amax is a list": (lambda: fp4_kernel.compute_fp4_scales([1.0]), "amax must be a tensor, got list"),
    "x is a list": (lambda: fp4_kernel.nvfp4_fake_quant([1.0], torch.ones(1)), "x must be a tensor, got list"),
    "global scale is a number": (
        lambda: fp4_kernel.nvfp4_fake_quant(torch.ones(1, 16), 1.0),
        "global_scale must be a tensor, got float",
    ),
    "global amax is Inf": (lambda: fp4_kernel.nvfp4_global_scale(torch.tensor([torch.inf, 1])), "global_amax must be finite"),
    "global scale is 0": (
        lambda: fp4_kernel.nvfp4_quantize(X.cpu(), torch.zeros(1)),
        r"must lie in 2\^-128 to 2\^119, .* got 0",
    ),
    "global scale is NaN": (lambda: fp4_kernel.nvfp4_fake_quant(X.cpu(), torch.tensor(torch.nan)), "must lie in .* got nan"),
    "packed is a list": (lambda: fp4_kernel.fp4_dequantize([1], BLOCK_SCALES, S2), "packed_tensor must be a tensor, got list"),
    "scales are a list": (lambda: fp4_kernel.fp4_dequantize(PACKED, [1.0], S2), "scale_tensor must be a tensor, got list"),
    "global amax of nothing": (lambda: fp4_kernel.compute_fp4_scales(AMAX[:0], "x"), "global_amax must be a tensor, got str"),
    "devices": (lambda: fp4_kernel.nvfp4_quantize(X, S2.to("meta")), "global_scale must be on the device of"),
    "packed dtype": (
        lambda: fp4_kernel.fp4_dequantize(PACKED.int(), BLOCK_SCALES, S2),
        "packed_tensor must be uint8, got torch.int32",
    ),
    "packed scalar": (lambda: fp4_kernel.fp4_dequantize(PACKED[0, 0, 0], BLOCK_SCALES, S2), "at least one dimension"),
    "scale dtype": (
        lambda: fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES.view(torch.uint8), S2),
        "dtype of scale_tensor must be one of .* got torch.uint8",
    ),
    "scale shape": (
        lambda: fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES[:2], S2),
        r"scale_tensor must have shape \(3, 5, 3\) .* got \(2, 5, 3\)",
    ),
    "scale of other block size": (
        lambda: fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES, S2, block_size=8),
        r"scale_tensor must have shape \(3, 5, 6\)",
    ),
    "block size": (
        lambda: fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES, S2, block_size=32),
        "block_size must divide the 48 columns",
    ),
    "block size 0": (lambda: fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES, S2, block_size=0), "block_size must divide"),
    "dequantize global scale": (
        lambda: fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES, S2.repeat(3)),
        "global_scale must have one element, got 3",
    ),
    "dequantize dtype": (
        lambda: fp4_kernel.fp4_dequantize(PACKED, BLOCK_SCALES, S2, dtype=torch.uint8),
        "dtype must be one of",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_with_what_was_required_and_what_came(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_the_host_never_waits_for_the_device_and_a_nan_is_passed_on():
    nan = torch.tensor(torch.nan, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [
            fp4_kernel.compute_fp4_scales(AMAX, nan),
            fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX, nan),
            fp4_kernel.static_blockwise_fp4_fake_quant(X, AMAX * nan),
            fp4_kernel.nvfp4_global_scale(nan),
            fp4_kernel.nvfp4_fake_quant(X, nan),
            fp4_kernel.fp4_dequantize(*fp4_kernel.nvfp4_quantize(X, nan), nan),
            fp4_kernel.nvfp4_block_amax(X * nan),
            fp4_kernel.nvfp4_quantize_input(X * nan, S2)[0],
            fp4_kernel.nvfp4_fake_quant_input(X * nan, S2),
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.isnan().all() for result in results)
