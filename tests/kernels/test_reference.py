"""`reference` against the format itself: golden bytes, an independent decoder, brute force in float64."""

import pytest
import torch
from kernel_cases import CASES, assert_same_bits

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import ScaleRule

FINITE_CASES = [name for name in CASES if name != "infinite"]


def test_golden_packing_vector():
    values = [6, -6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.1, -0.0, -5, -2.5, 0.2, -0.75]
    codes = reference.encode(torch.tensor(values), torch.ones(1))
    assert reference.pack(codes).numpy().tobytes().hex(" ") == "f7 20 42 64 86 08 ce a0"


def test_unpack_inverts_pack():
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(reference.pack(reference.unpack(packed)), packed)


def test_every_value_takes_the_nearest_code_and_ties_take_the_even_one():
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat((midpoints, torch.nextafter(midpoints, torch.tensor(0.0)), torch.nextafter(midpoints, torch.tensor(9.0))))
    x = torch.cat((x, torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 8))
    distance = (x.double().unsqueeze(-1) - torch.tensor(reference.E2M1_VALUES).double()).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    codes = reference.encode_e2m1(x).long()
    assert nearest.gather(-1, codes.unsqueeze(-1)).all()
    is_tie = nearest.sum(-1) == 2
    assert int(is_tie.sum()) >= len(midpoints)
    assert (codes[is_tie] % 2 == 0).all()


@pytest.mark.parametrize("rule", ["pow2", "exact"])
def test_global_scale_of_extremes(rule):
    amax = torch.tensor([0.0, 1e-45, 7.8e-36, 8e-36, 3.4e38, torch.inf, torch.nan])
    scale = reference.global_scale(amax, ScaleRule(global_scale=rule))
    assert torch.equal(scale[:3], torch.ones(3))
    assert (scale[3:5].isfinite() & (scale[3:5] > 0) & (1 / scale[3:5]).isfinite()).all()
    assert scale[5].isinf()
    assert scale[6].isnan()


@pytest.mark.parametrize("case", FINITE_CASES)
def test_pow2_decoded_values_are_exact_in_bf16_in_every_order_of_operations(case):
    x = CASES[case]
    s2 = reference.global_scale(reference.block_amax(x).max())
    packed, scales = reference.quantize(x, s2)
    x_hat = reference.dequantize(packed, scales, s2, torch.float32)
    assert_same_bits(x_hat.bfloat16().float(), x_hat)
    values = reference.decode(reference.unpack(packed), torch.ones_like(scales, dtype=torch.float32))
    scales = scales.float().repeat_interleave(16, dim=-1)
    assert_same_bits(values * scales * s2, x_hat)
    assert_same_bits(values * scales / (1 / s2), x_hat)


def test_static_scales_equal_the_contract_under_a_pow2_scale():
    """With s2 = 2^k, global_amax = 2688 * s2 makes both chains one, wherever the contract's floor of 2^-6 does not act."""
    x = CASES["gaussian"]
    amax = reference.block_amax(x)
    s2 = reference.global_scale(amax.max())
    assert_same_bits(reference.static_scales(amax, 2688 * s2), reference.block_scales(x, s2) * s2)


@pytest.mark.parametrize("case", FINITE_CASES)
def test_zeros_have_code_zero_and_scales_are_positive(case):
    x = CASES[case]
    packed, scales = reference.quantize(x, reference.global_scale(reference.block_amax(x).max()))
    assert (scales.float() > 0).all()
    assert (reference.unpack(packed)[x == 0] == 0).all()


@pytest.mark.parametrize("global_scale", ["pow2", "exact"])
@pytest.mark.parametrize("case", [name for name in FINITE_CASES if CASES[name].dim() == 2])
def test_compressed_tensors_decodes_the_same_values(case, global_scale):
    """Its decoder divides by a global scale of shape [1] and ends in bf16: the same bits only if s2 is a power of two."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="needs compressed-tensors, of the test extra")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    x = CASES[case]
    s2 = reference.global_scale(reference.block_amax(x).max(), ScaleRule(global_scale=global_scale)).reshape(1)
    packed, scales = reference.quantize(x, s2)
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    compressor = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": 1 / s2}
    decoded = compressor.decompress(tensors, scheme)["weight"]
    if global_scale == "pow2":
        assert torch.equal(decoded, reference.dequantize(packed, scales, s2, torch.bfloat16))
    else:
        torch.testing.assert_close(decoded.float(), reference.dequantize(packed, scales, s2, torch.float32), rtol=2**-8, atol=0)
