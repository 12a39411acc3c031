"""What the kernel tests share: the implementation under test, named inputs, comparison bit by bit."""

import repaired_interpreter  # noqa: F401  (changes what it imports)
import torch
from torch import Tensor

from nvfp4_train.kernels import multi_tensor_kernels, ops, reference, triton_kernels  # noqa: F401  (ops registers torch.ops.nvfp4)
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = torch.ops.nvfp4 if DEVICE == "cuda" else triton_kernels
"""The Triton kernels: on a GPU behind the operators, otherwise called directly, in the interpreter."""


class TritonQuantizer(MultiTensorQuantizer):
    """Takes the Triton passes on the CPU too, in the interpreter."""

    _make_passes = multi_tensor_kernels.TritonPasses


QUANTIZERS = [MultiTensorQuantizer, TritonQuantizer]


def outputs_of(masters):
    """Filled with NaN and all ones, so that what is not written shows."""
    decoded = [torch.full_like(master, torch.nan, dtype=torch.bfloat16) for master in masters]
    packed = [torch.full((*m.shape[:-1], m.shape[-1] // 2), 255, dtype=torch.uint8, device=m.device) for m in masters]
    scales = [torch.full((*m.shape[:-1], m.shape[-1] // 16), 255, dtype=torch.uint8, device=m.device) for m in masters]
    return {"decoded": decoded, "packed": packed, "scales": [s.view(torch.float8_e4m3fn) for s in scales]}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits, so that -0.0 differs from 0.0; any NaN equals any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    actual, expected = actual.cpu().contiguous(), expected.cpu().contiguous()
    if actual.dtype in DTYPES:
        is_nan = expected.isnan()
        assert torch.equal(actual.isnan(), is_nan)
        actual, expected = actual.masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    is_different = actual.view(integer) != expected.view(integer)
    assert not is_different.any(), (
        f"{int(is_different.sum())} of {actual.numel()} differ, first {actual[is_different][0]} for {expected[is_different][0]}"
    )


def _gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ties() -> Tensor:
    """Multiples of 1/8 up to 8, and the floats next to them, under every E4M3 significand as block maximum."""
    grid = torch.arange(0, 8.01, 0.125)
    grid = torch.cat((grid, torch.nextafter(grid, torch.tensor(9.0)), torch.nextafter(grid, torch.tensor(-1.0)))).clamp(min=0)
    grid = torch.cat((grid, -grid))
    scales = torch.arange(8, 16).float() / 8
    x = torch.zeros(8, 2 * -(-grid.numel() // 15), 16)
    for row, scale in zip(x, scales, strict=True):
        values = torch.zeros(row.shape[0] * 15)
        values[: grid.numel()] = grid.clamp(-6, 6) * scale
        row[:, :15] = values.view(-1, 15)
        row[:, 15] = 6 * scale
    return x.flatten(1)


def _tiny_block() -> Tensor:
    x = _gaussian(8, 64)
    x[3, 16:32] *= 1e-6
    x[5, :16] *= 1e-12
    return x


def _zeros_of_both_signs() -> Tensor:
    x = _gaussian(4, 48)
    x[0, ::3] = 0.0
    x[1, ::2] = -0.0
    x[2] = -0.0
    x[3, :16] = -1e-6
    x[3, 15] = 4.0
    return x


def _infinite() -> Tensor:
    x = _gaussian(4, 32)
    x[1, 3], x[2, 20] = float("inf"), -float("inf")
    return x


CASES = {
    "gaussian": _gaussian(37, 160),
    "one_block": _gaussian(1, 16),
    "vector": _gaussian(48),
    "odd_3d": _gaussian(3, 5, 48),
    "experts": _gaussian(2, 7, 4, 32) * torch.tensor([1.0, 1e-3]).view(2, 1, 1, 1),
    "many_magnitudes": _gaussian(64, 48) * torch.exp2(torch.linspace(-140, 100, 64)).unsqueeze(1),
    "ties": _ties(),
    "tiny_block": _tiny_block(),
    "zeros_of_both_signs": _zeros_of_both_signs(),
    "all_zero": torch.zeros(5, 32),
    "subnormal": _gaussian(9, 32) * 2.0**-138,
    "infinite": _infinite(),
}
