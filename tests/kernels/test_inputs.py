"""The chain of inputs: the reference against NumPy, and the Triton kernels against the reference, bit for bit."""

import numpy as np
import pytest
import torch
from kernel_cases import CASES, DEVICE, DTYPES, assert_same_bits

from nvfp4_train.kernels import fp4_kernel, input_kernels, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TRITON = torch.ops.nvfp4 if DEVICE == "cuda" else input_kernels
SCALES = [2.0**-100, 2.0**-20, 2.0**-9, 1.0, 2.0**7, 2.0**100]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(8 + b % 8) * 2.0 ** (b // 8 - 10) if b >= 8 else b * 2.0**-9 for b in range(127)])


def nearest(values: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Index of the nearest value, of the even one where two are as near. In float64, which is exact here."""
    above = np.searchsorted(values, magnitudes).clip(1, len(values) - 1)
    middle = (values[above - 1] + values[above]) / 2
    is_up = (magnitudes > middle) | ((magnitudes == middle) & (above % 2 == 0))
    return np.where(is_up, above, above - 1)


def quantize_in_numpy(x: np.ndarray, g: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decoded values, codes and scale bytes of float32 blocks [M, 16], as accuracy.md has the chain."""
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        ratio = np.float32(g) * (np.abs(x).max(1) * np.float32(1 / 6))
        scales = nearest(E4M3, np.minimum(ratio, np.float32(448)).astype(np.float64))
        value = E4M3[scales].astype(np.float32)
        products = np.abs(x) * (np.float32(g) / value)[:, None]
        codes = nearest(E2M1, np.nan_to_num(products, posinf=6).clip(max=6).astype(np.float64))
        codes = np.where(value[:, None] == 0, 0, codes + 8 * (x < 0))
        decoded = E2M1[codes & 7] * np.where(codes & 8, -1.0, 1.0) * value.astype(np.float64)[:, None] / g
    return decoded.astype(np.float32), codes.astype(np.uint8), scales.astype(np.uint8)


def assert_reference_is_numpy(x: torch.Tensor, input_scale: float) -> None:
    packed, scales = reference.quantize_input(x, torch.tensor([input_scale]))
    x_hat = reference.dequantize(packed, scales, torch.tensor(input_scale), torch.float32)
    decoded, codes, scale_bytes = quantize_in_numpy(x.float().reshape(-1, 16).numpy(), 1 / input_scale)
    assert np.array_equal(scales.view(torch.uint8).numpy().reshape(-1), scale_bytes)
    assert np.array_equal(reference.unpack(packed).numpy().reshape(-1, 16), codes)
    assert np.array_equal(x_hat.numpy().reshape(-1, 16).view(np.int32), decoded.view(np.int32))


def assert_triton_is_reference(x: torch.Tensor, input_scale: torch.Tensor) -> None:
    packed, scales = reference.quantize_input(x, input_scale)
    on_device = x.to(DEVICE), input_scale.to(DEVICE)
    x_hat, packed_by_triton, scales_by_triton = TRITON.quantize_input(*on_device)
    assert_same_bits(packed_by_triton, packed)
    assert_same_bits(scales_by_triton, scales)
    assert_same_bits(x_hat, reference.dequantize(packed, scales, input_scale, x.dtype))
    assert_same_bits(TRITON.fake_quant_input(*on_device), x_hat)


def blocks_of_every_scale() -> torch.Tensor:
    """Blocks whose amax gives, under g = 1, each E4M3 value, each midpoint of two, the floats beside them, and what saturates.

    amax * fp32(1 / 6) is rounded, so that amax = 6 * midpoint is tried with its neighbours too.
    """
    points = torch.from_numpy(np.concatenate((E4M3, (E4M3[1:] + E4M3[:-1]) / 2, [460.0, 464.0, 500.0, 1e9]))).float() * 6
    amax = torch.cat([(points.view(torch.int32) + step).clamp(min=0).view(torch.float32) for step in range(-3, 4)])
    return amax.unsqueeze(1) * torch.linspace(-1, 1, 16)


def blocks_of_every_tie() -> torch.Tensor:
    """Under g = 1 and each block scale, all ties of two codes and the floats beside them, of both signs."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    scales = torch.from_numpy(E4M3[1:]).float().unsqueeze(1)
    beside = [((ties * scales).view(torch.int32) + step).view(torch.float32) for step in range(-2, 3)]
    values = torch.cat([*beside, *(-x for x in beside)], dim=1)
    return torch.cat((values.unflatten(1, (-1, 14)), scales.mul(6).view(-1, 1, 1).expand(-1, 5, 2)), dim=2).view(-1, 16)


def every_bf16() -> torch.Tensor:
    """Every finite bf16, with values of nearly the same magnitude in a block."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    return values[values.abs().argsort(stable=True)].view(-1, 16)


@pytest.mark.parametrize("input_scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_serving_chain(dtype, input_scale):
    for case in CASES:
        assert_reference_is_numpy(CASES[case].to(dtype), input_scale)


def test_the_reference_at_every_rounding():
    assert_reference_is_numpy(blocks_of_every_scale(), 1.0)
    assert_reference_is_numpy(blocks_of_every_tie(), 1.0)
    for scale in (2.0**-12, 1.0):
        assert_reference_is_numpy(every_bf16(), scale)


def test_the_chain_is_a_product_where_that_of_weights_is_a_quotient():
    """Both are correct roundings of their own formula; what tells them apart is a tie that 1 / scale, rounded, misses."""
    x = blocks_of_every_tie()
    scales = reference.quantize_input(x, torch.ones(1))[1].float()
    codes = reference.unpack(reference.quantize_input(x, torch.ones(1))[0])
    is_other = codes != reference.encode(x, scales)
    assert 0 < is_other.sum() < x.numel() / 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_triton_is_the_reference(case, dtype):
    for input_scale in SCALES[::2]:
        assert_triton_is_reference(CASES[case].to(dtype), torch.tensor([input_scale]))


def test_triton_is_the_reference_at_every_rounding():
    for x in (blocks_of_every_scale(), blocks_of_every_tie()):
        assert_triton_is_reference(x, torch.tensor(1.0))
    assert_triton_is_reference(every_bf16(), torch.tensor(2.0**-12))


def test_a_block_whose_scale_is_zero_is_zero():
    """With values of both signs: E2M1 has a negative zero, and it is not written there."""
    x = torch.full((1, 32), 2.0**-14)
    x[0, ::2] *= -1
    x[0, 31] = 6.0
    for x_hat, packed, scales in (
        torch.ops.nvfp4.quantize_input(x, torch.ones(1)),
        TRITON.quantize_input(x.to(DEVICE), torch.ones(1, device=DEVICE)),
    ):
        assert scales.view(torch.uint8)[0, 0] == 0
        assert not packed[0, :8].any()
        assert_same_bits(x_hat[0, :16], torch.zeros(16))
        assert (packed[0, 8:15] == 0x08).all()


def test_nan_makes_its_block_nan():
    x = CASES["gaussian"].clone()
    x[2, 3] = torch.nan
    for x_hat, _, scales in (
        torch.ops.nvfp4.quantize_input(x, torch.ones(1)),
        TRITON.quantize_input(x.to(DEVICE), torch.ones(1, device=DEVICE)),
    ):
        assert scales[2, 0].float().isnan()
        assert x_hat[2, :16].isnan().all()
        assert x_hat.isnan().sum() == 16


def test_public_functions_are_the_operators():
    x, input_scale = CASES["odd_3d"].bfloat16().to(DEVICE), torch.tensor([[2.0**-8]], device=DEVICE)
    x_hat, packed, scales = fp4_kernel.nvfp4_quantize_input(x, input_scale)
    assert (x_hat.shape, packed.shape, scales.shape) == ((3, 5, 48), (3, 5, 24), (3, 5, 3))
    assert_same_bits(x_hat, fp4_kernel.fp4_dequantize(packed, scales, input_scale, dtype=torch.bfloat16))
    assert_same_bits(x_hat, fp4_kernel.nvfp4_fake_quant_input(x, input_scale))
    for empty in (x[:0], x[..., :0]):
        x_hat, packed, scales = fp4_kernel.nvfp4_quantize_input(empty, input_scale)
        assert fp4_kernel.nvfp4_fake_quant_input(empty, input_scale).shape == x_hat.shape == empty.shape
        assert 2 * packed.shape[-1] == empty.shape[-1]


@pytest.mark.parametrize(
    ("x", "input_scale", "message"),
    [
        (torch.ones(2, 24), torch.ones(1), r"multiple of the block size 16, got shape \(2, 24\)"),
        (torch.ones(2, 16).int(), torch.ones(1), "dtype of x must be one of .* got torch.int32"),
        (torch.ones(2, 16), 1.0, "input_scale must be a tensor, got float"),
        (torch.ones(2, 16), torch.ones(1).bfloat16(), "input_scale must be float32, got torch.bfloat16"),
        (torch.ones(2, 16), torch.ones(2), "input_scale must have one element, got 2"),
        (torch.ones(2, 16), torch.ones(1, device="meta"), "input_scale must be on the device of"),
        *(
            (torch.ones(2, 16), torch.tensor(value), r"a power of two from 2\^-100 to 2\^100, got")
            for value in (0.0, 3.0, -1.0, 2.0**101, 2.0**-101, torch.inf, torch.nan)
        ),
    ],
)
def test_bad_input_is_refused(x, input_scale, message):
    for function in (fp4_kernel.nvfp4_quantize_input, fp4_kernel.nvfp4_fake_quant_input):
        with pytest.raises(ValueError, match=message):
            function(x, input_scale)
