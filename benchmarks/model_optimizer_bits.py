"""Model Optimizer's static fake quant against ours with the one difference between them taken away: its approximate division.

    python benchmarks/model_optimizer_bits.py       (no GPU; needs nvidia-modelopt 0.47, pulp and scipy)

On a GPU its kernel divides approximately, and values next to a tie of two codes may take the other one (`kernels.py` counts them).
Triton's interpreter runs the same kernel on the CPU, where division is IEEE division, as it is in ours everywhere.
"""

import contextlib
import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import peers
import torch
from kernel_checks import assert_same

from nvfp4_train.kernels import fp4_kernel

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def block_amax(dtype: torch.dtype, magnitude: float) -> torch.Tensor:
    amax = (torch.randn(96, 4).abs() + 1) * magnitude
    amax[0] = 0
    amax[1] = torch.tensor([0, 1e-6, 6, 6.375])
    amax[2] = torch.tensor([1e-4, 3, 2.0**-14, 448])
    return amax.to(dtype)


def values(scales: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of random multiples of the scales, zeros of both signs and, from row 8 on, ties of two codes and what is right beside."""
    x = torch.randn(96, 4, block_size) * 3 * scales.unsqueeze(-1)
    x[0], x[0, :2] = 0.0, -0.0
    on_ties = scales[8:].unsqueeze(-1) * torch.tensor([*TIES, *(-tie for tie in TIES), 6.0, 0.1] * 8)[:block_size]
    # A bf16 or float16 neighbour is 2^16 or 2^13 units of float32 away, which the conversion rounds to.
    distance = {torch.float32: 1, torch.bfloat16: 2**16, torch.float16: 2**13}[dtype]
    beside = on_ties.view(torch.int32) + distance * torch.randint(-1, 2, on_ties.shape, dtype=torch.int32)
    x[8:] = torch.where(on_ties == 0, 0.0, beside.view(torch.float32))
    return x.flatten(1).to(dtype)


def main() -> None:
    peer = peers.model_optimizer_functions()
    from modelopt.torch.kernels.quantization.common import nvfp4_quant

    # The interpreter has no libdevice.
    nvfp4_quant.libdevice = type("libdevice", (), {"isnan": staticmethod(lambda x: x != x)})
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.manual_seed(0)
    count = num_near = 0
    for dtype, block_size in itertools.product((torch.float32, torch.bfloat16, torch.float16), (16, 8, 32, 64, 128)):
        # The other sizes differ in nothing but how many elements share a scale.
        magnitudes, factors = ((1.0, 1e-3, 30.0), (None, 1.0, 0.3, 4.0)) if block_size == 16 else ((1.0,), (None, 0.3))
        for magnitude, is_quantized, factor in itertools.product(magnitudes, (True, False), factors):
            amax = block_amax(dtype, magnitude)
            arguments = amax, None if factor is None else amax.max().float() * factor, is_quantized
            what = f"of {dtype} times {magnitude}, blocks of {block_size}, is_quantized={is_quantized}, factor {factor}"
            scales = fp4_kernel.compute_fp4_scales(*arguments)
            assert_same(peer.compute_fp4_scales(*arguments), scales, f"compute_fp4_scales {what}")
            x = values(scales, block_size, dtype)
            # The interpreter cuts float32 off where it should round it to 16 bits.
            x_hat = fp4_kernel.static_blockwise_fp4_fake_quant(x, *arguments, out_dtype=torch.float32)
            theirs = peer.static_blockwise_fp4_fake_quant(x, *arguments, out_dtype=torch.float32)
            assert_same(theirs, x_hat, f"static_blockwise_fp4_fake_quant {what}")
            count += x.numel()
            quotients = (x.double().abs().unflatten(1, (-1, block_size)) / scales.double().unsqueeze(-1)).unsqueeze(-1)
            num_near += int(((quotients / torch.tensor(TIES).double() - 1).abs().amin(-1) < 2.0**-21).sum())
    print(
        f"equal: {count} values of Model Optimizer's static fake quant under IEEE division, in blocks of 8 to 128, bit for bit, "
        f"{num_near} of them within 4 ulp of float32 of a tie"
    )


if __name__ == "__main__":
    main()
