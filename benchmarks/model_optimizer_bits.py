"""Model Optimizer's static fake quant against ours with the one difference between them taken away: its approximate division.

    python benchmarks/model_optimizer_bits.py       (no GPU; needs nvidia-modelopt 0.47, pulp and scipy)

On a GPU its kernel divides approximately, and values next to a tie of two codes may take the other one (`kernels.py` counts them).
Triton's interpreter runs the same kernel on the CPU, where division is IEEE division, as it is in ours everywhere.
"""

import contextlib
import os

os.environ["TRITON_INTERPRET"] = "1"

import peers
import torch
from kernel_checks import assert_same

from nvfp4_train.kernels import fp4_kernel

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def inputs(dtype: torch.dtype, magnitude: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x and its block amax: random, zeros of both signs, and multiples of the scale on a tie and right beside it."""
    x = torch.randn(96, 64) * magnitude
    x[0], x[0, :32] = 0.0, -0.0
    amax = x.unflatten(-1, (-1, 16)).abs().amax(-1).to(dtype)
    amax[1] = torch.tensor([0, 1e-6, 6, 6.375])
    amax[2] = torch.tensor([1e-4, 3, 2.0**-14, 448])
    scales = fp4_kernel.compute_fp4_scales(amax)[40:].unsqueeze(-1)
    on_ties = scales * torch.tensor([*TIES, *(-tie for tie in TIES), 6.0, 0.1])
    neighbours = on_ties.view(torch.int32) + torch.randint(-1, 2, on_ties.shape, dtype=torch.int32)
    x[40:] = torch.where(on_ties == 0, 0.0, neighbours.view(torch.float32)).flatten(1)
    return x.to(dtype), amax


def main() -> None:
    peer = peers.model_optimizer_functions()
    from modelopt.torch.kernels.quantization.common import nvfp4_quant

    # What the interpreter has not.
    nvfp4_quant.libdevice = type("libdevice", (), {"isnan": staticmethod(lambda x: x != x)})
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.manual_seed(0)
    count = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for magnitude in (1.0, 1e-3, 30.0):
            x, amax = inputs(dtype, magnitude)
            for is_quantized in (True, False):
                for factor in (None, 1.0, 0.3, 4.0):
                    arguments = amax, None if factor is None else amax.max().float() * factor, is_quantized
                    what = f"of {dtype} times {magnitude}, is_quantized={is_quantized}, factor {factor}"
                    scales = fp4_kernel.compute_fp4_scales(*arguments)
                    assert_same(peer.compute_fp4_scales(*arguments), scales, f"compute_fp4_scales {what}")
                    # The interpreter cuts float32 off where it should round it to 16 bits.
                    x_hat = fp4_kernel.static_blockwise_fp4_fake_quant(x, *arguments, out_dtype=torch.float32)
                    theirs = peer.static_blockwise_fp4_fake_quant(x, *arguments, out_dtype=torch.float32)
                    assert_same(theirs, x_hat, f"static_blockwise_fp4_fake_quant {what}")
                    count += x.numel()
    print(f"equal: {count} values of Model Optimizer's static fake quant under IEEE division, bit for bit")


if __name__ == "__main__":
    main()
