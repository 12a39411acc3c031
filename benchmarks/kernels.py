"""The kernels on one GPU: first whether they are right, then how near they come to the speed of a copy.

    python benchmarks/kernels.py [--checks] [--times] [--whole-model]      (all three without an option)

A time is the median over replays of a CUDA graph of several launches, on as many sets of tensors as exceed the L2 cache. Beside it
stands a device-to-device copy that moves as many bytes, measured in the same way right before; the ratio is copy / ours. Bytes
count once per element read or written. A peer that is installed (Model Optimizer, torchao) runs on the same tensors.
"""

import argparse
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import peers
import torch
import triton
import triton.language as tl

from nvfp4_train.kernels import fp4_kernel, multi_tensor, reference, triton_arithmetic

BF16 = torch.bfloat16
L2_BYTES = 128 * 2**20
"""Sets of tensors rotate until they exceed this."""

LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)] * 32
LLAMA_125M = ([(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)]) * 12
MOE_128 = [(128, 1536, 2048), (128, 2048, 768)] * 12


# ---- checks ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _division_kernel(wrong_ptr, TILE: tl.constexpr):
    """Count disagreements of the fast division with IEEE division next to every place where a rounding could turn.

    Of a divisor every significand; of the quotient every tie of E2M1 and E4M3, and its neighbours.
    """
    b = triton_arithmetic.from_bits(0x3F800000 + tl.program_id(0) * TILE + tl.arange(0, TILE))
    one_over = triton_arithmetic.reciprocal(b)
    wrong = (one_over != tl.div_rn(1.0, b)).to(tl.int32)
    for sixteenths in range(16, 32):
        at = triton_arithmetic.to_bits(b * (sixteenths / 16.0))
        for neighbour in range(-4, 5):
            a = triton_arithmetic.from_bits(at + neighbour)
            wrong += (triton_arithmetic.divide(a, b, one_over) != tl.div_rn(a, b)).to(tl.int32)
    tl.atomic_add(wrong_ptr, tl.sum(wrong, 0))


def check_division() -> str:
    wrong = torch.zeros(1, dtype=torch.int32, device="cuda")
    _division_kernel[(2**23 // 1024,)](wrong, TILE=1024, enable_fp_fusion=False)
    assert wrong.item() == 0, f"{wrong.item()} quotients differ from IEEE division"
    return "1.2e9 quotients: every significand of the divisor, all ties of E2M1 and E4M3, 4 neighbours on each side"


def _same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    return torch.equal(actual.view(integer), expected.view(integer))


def check_random(num_elements: float = 1e9) -> str:
    """Exponents over the whole range, few or many significand bits (so ties), subnormals; both kinds of s2; all dtypes."""
    chunk, done = 2**24, 0
    generator = torch.Generator("cuda").manual_seed(0)

    def uniform(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cuda")

    while done < num_elements:
        spread = (0, 4, 20, 60, 130)[done // chunk % 5]
        bits = (2, 4, 7, 10, 23)[done // chunk // 5 % 5]
        significand = 1 + uniform(0, 2**bits, chunk // 16, 16) / 2**bits
        exponent = uniform(-spread, spread + 1, chunk // 16, 1) + uniform(-6, 1, chunk // 16, 16)
        x = significand * torch.exp2(exponent.float().clamp(-149, 127)) * (1 - 2 * uniform(0, 2, chunk // 16, 16))
        x = x.to((torch.float32, BF16, torch.float16)[done // chunk % 3]).nan_to_num(1.0, 1.0, -1.0)
        s2 = reference.global_scale(reference.block_amax(x).amax(), power_of_two=done // chunk % 2 == 0)
        packed, scales = torch.ops.nvfp4.quantize(x, s2)
        expected = reference.quantize(x, s2)
        assert _same(packed, expected[0]), f"codes differ from the reference: spread={spread} bits={bits} {x.dtype}"
        assert _same(scales, expected[1]), f"scales differ from the reference: spread={spread} bits={bits} {x.dtype}"
        x_hat = torch.ops.nvfp4.fake_quant(x, s2, x.dtype)
        assert _same(x_hat, reference.fake_quant(x, s2, x.dtype)), f"values differ: spread={spread} bits={bits} {x.dtype}"
        assert _same(x_hat, torch.ops.nvfp4.dequantize(packed, scales, s2, x.dtype)), "dequantize differs"
        done += chunk
    return f"{done:.2e} random elements: codes, scales, values, decoding"


def check_every_bf16(num_scales: int = 4096) -> str:
    values = torch.arange(2**16, device="cuda").to(torch.int16).view(BF16)
    values = values[values.isfinite()][: 65280 // 16 * 16]
    amax = torch.exp2(torch.linspace(-14, 14, num_scales, device="cuda"))
    global_amax = amax.max()
    for part in amax.split(64):
        x = values.repeat(len(part), 1)
        block_amax = part.unsqueeze(1).expand(-1, values.numel() // 16).contiguous()
        expected = reference.static_fake_quant(x, reference.static_scales(block_amax, global_amax), BF16)
        assert _same(torch.ops.nvfp4.static_fake_quant(x, block_amax, global_amax, True, BF16), expected)
    return f"every finite bf16 value under {num_scales} scales"


def check_large() -> str:
    x = torch.randn(2**20 + 64, 2048, device="cuda", dtype=BF16)
    s2 = torch.tensor(2.0**-9, device="cuda")
    packed, scales = torch.ops.nvfp4.quantize(x, s2)
    x_hat = torch.ops.nvfp4.fake_quant(x, s2, BF16)
    assert _same(torch.ops.nvfp4.dequantize(packed, scales, s2, BF16), x_hat)
    for rows in (slice(0, 64), slice(2**19, 2**19 + 64), slice(2**20, None)):
        expected = reference.quantize(x[rows], s2)
        assert _same(packed[rows], expected[0])
        assert _same(scales[rows], expected[1])
    return f"{x.numel():.3e} elements in one tensor (above 2^31)"


def check_model_optimizer() -> str:
    if not peers.has_model_optimizer():
        return "Model Optimizer: not installed, not compared"
    peer = peers.model_optimizer_functions()
    count = num_other = 0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device="cuda")
    for dtype in (torch.float32, BF16, torch.float16):
        for magnitude in (1.0, 1e-3, 30.0):
            x = (torch.randn(4096, 4096, device="cuda") * magnitude).to(dtype)
            x[0, :64] = 0.0
            amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
            amax[1, :8] = torch.tensor([0, 1e-6, 6, 6.375, 1e-4, 3, 2.0**-14, 448], device="cuda").to(dtype)
            for is_quantized in (True, False):
                for factor in (None, 1.0, 0.3, 4.0, 0.0):
                    arguments = amax, None if factor is None else amax.max().float() * factor, is_quantized
                    assert _same(fp4_kernel.compute_fp4_scales(*arguments), peer.compute_fp4_scales(*arguments))
                    ours = fp4_kernel.static_blockwise_fp4_fake_quant(x, *arguments)
                    is_other = ours != peer.static_blockwise_fp4_fake_quant(x, *arguments)
                    num_other += int(is_other.sum())
                    scales = fp4_kernel.compute_fp4_scales(*arguments).unsqueeze(-1).expand(*amax.shape, 16).reshape(x.shape)
                    quotients = x.float().abs()[is_other] / scales[is_other]
                    assert ((quotients.unsqueeze(-1) / ties - 1).abs().amin(-1) < 2.0**-21).all()
                    count += x.numel()
    return (
        f"compute_fp4_scales equals Model Optimizer's bit for bit, static_blockwise_fp4_fake_quant in all but {num_other} of "
        f"{count:.1e} values: those are within 4 ulp of a tie of two codes, which its approximate division moves"
    )


# ---- times -------------------------------------------------------------------------------------------------------------------


def measure(calls: Sequence[Callable], num_replays: int = 15) -> float:
    """Milliseconds of one call, over a graph that makes each call once."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(num_replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    del kept
    return statistics.median(times[2:])


def measure_alone(call: Callable, num_calls: int = 7) -> float:
    """Milliseconds of a call that takes milliseconds and may not be captured in a graph."""
    times = []
    for _ in range(num_calls + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def measure_host(call: Callable, num_calls: int) -> float:
    """Seconds that the host takes to issue one call."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    host = (time.perf_counter() - start) / num_calls
    torch.cuda.synchronize()
    return host


def measure_copy(num_bytes: float, num_sets: int) -> float:
    """Milliseconds of a copy that reads and writes num_bytes in all."""
    sources = [torch.ones(int(num_bytes) // 8, device="cuda") for _ in range(num_sets)]
    return measure([source.clone for source in sources])


def print_row(name: str, size: str, num_bytes: float, copy: float, ours: float, target: float | None = None) -> None:
    verdict = "" if target is None else f"  target {target:.3f} {'met' if copy / ours >= target else 'MISSED'}"
    rate = num_bytes / ours / 1e9
    print(
        f"{name:28s} {size:>12s} {copy:9.4f} ms copy {ours:9.4f} ms {rate:5.2f} TB/s  ratio {copy / ours:.3f}{verdict}",
        flush=True,
    )


def time_kernels(shape: tuple[int, int], slack: float) -> None:
    num_elements = shape[0] * shape[1]
    num_sets = max(4, L2_BYTES // (4 * num_elements) + 1)
    size = f"{shape[0]}x{shape[1]}"
    ops = torch.ops.nvfp4
    xs = [torch.randn(shape, device="cuda", dtype=BF16) * 0.02 for _ in range(num_sets)]
    masters = [torch.randn(shape, device="cuda") * 0.02 for _ in range(num_sets)]
    block_amax, global_amax = ops.amax(xs[0])
    pow2, exact = (reference.global_scale(global_amax, is_pow2) for is_pow2 in (True, False))
    packed = [ops.quantize(x, pow2) for x in xs]
    amaxes = [block_amax.clone() for _ in xs]
    rows: list[tuple[str, float, float | None, Callable, tuple]] = [
        ("static fake quant bf16", 4.25, 0.97, lambda x, a: ops.static_fake_quant(x, a, global_amax, True, BF16), (xs, amaxes)),
        ("dynamic fake quant bf16", 4, 0.95, lambda x: ops.fake_quant(x, pow2, BF16), (xs,)),
        ("  with an exact s2", 4, None, lambda x: ops.fake_quant(x, exact, BF16), (xs,)),
        ("quantize and pack bf16", 2.5625, 0.93, lambda x: ops.quantize(x, pow2), (xs,)),
        ("  with an exact s2", 2.5625, None, lambda x: ops.quantize(x, exact), (xs,)),
        ("dequantize to bf16", 2.5625, 0.93, lambda p: ops.dequantize(*p, pow2, BF16), (packed,)),
        ("block and global amax bf16", 2.25, 0.95, ops.amax, (xs,)),
        ("block and global amax fp32", 4.25, None, ops.amax, (masters,)),
        ("quantize and pack fp32", 4.5625, 0.93, lambda x: ops.quantize(x, pow2), (masters,)),
        ("fake quant fp32 to bf16", 6, 0.93, lambda x: ops.fake_quant(x, pow2, BF16), (masters,)),
    ]
    for name, bytes_per_element, target, call, inputs in rows:
        calls = [functools.partial(call, *arguments) for arguments in zip(*inputs, strict=True)]
        num_bytes = bytes_per_element * num_elements
        copy = measure_copy(num_bytes, num_sets)
        print_row(name, size, num_bytes, copy, measure(calls), None if target is None else target * slack)
    for row in ("static fake quant", "dynamic fake quant", "quantize and pack", "dequantize"):
        for name, call in peers.kernels(row, xs[0], block_amax, global_amax):
            print(f"  {row + ', ' + name:36s} {size:>12s} {measure_alone(call):9.4f} ms", flush=True)


def time_small() -> None:
    @triton.jit
    def empty_kernel(x_ptr):
        pass

    x, s2 = torch.randn(4096, device="cuda", dtype=BF16), torch.ones(1, device="cuda")
    amax, global_amax = torch.ops.nvfp4.amax(x)
    packed = torch.ops.nvfp4.quantize(x, s2)
    calls = {
        "empty kernel": lambda: empty_kernel[(1,)](x),
        "dynamic fake quant": lambda: torch.ops.nvfp4.fake_quant(x, s2, BF16),
        "static fake quant": lambda: torch.ops.nvfp4.static_fake_quant(x, amax, global_amax, True, BF16),
        "quantize and pack": lambda: torch.ops.nvfp4.quantize(x, s2),
        "dequantize": lambda: torch.ops.nvfp4.dequantize(*packed, s2, BF16),
    }
    for name, call in calls.items():
        device = measure([call] * 100)
        host = measure_host(call, 300)
        print(f"4096 elements, {name:20s} {device * 1e3:6.2f} us on the device, {host * 1e6:6.2f} us of host", flush=True)


def time_whole_model(name: str, shapes: Sequence[tuple[int, ...]], target: float | None = 1 / 1.1) -> None:
    """A step of fp32 masters to bf16 compute weights, while exponents stay and when all move; target as a ratio to the copy."""
    masters = [torch.randn(shape, device="cuda") * 0.02 for shape in shapes]
    num_elements = sum(master.numel() for master in masters)
    decoded = [torch.empty_like(master, dtype=BF16) for master in masters]
    slots = multi_tensor.slots_of_groups(masters, list(range(len(masters))))
    quantizer = multi_tensor.MultiTensorQuantizer(masters, *slots, decoded=decoded)
    quantizer.step()
    for index in (0, -1):
        s2 = quantizer.global_scales[slots[0][index]]
        one = masters[index][0] if masters[index].dim() == 3 else masters[index]
        out = decoded[index][0] if masters[index].dim() == 3 else decoded[index]
        assert _same(out, reference.fake_quant(one, s2, BF16)), "the whole-model pass differs from the reference"
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    quantizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated, "a step allocated memory"
    # A copy of gigabytes at once is slower than its parts.
    num_parts = max(1, num_elements // 2**27)
    copy = measure_copy(6 * num_elements / num_parts, 4) * num_parts
    steady = measure([quantizer.step] * 4)
    print_row(f"{name}, steady", f"{num_elements / 1e6:.0f}M", 6 * num_elements, copy, steady, target)

    def moving_step() -> None:
        quantizer.global_scales.fill_(1e-9)
        quantizer.step()

    print(f"  all exponents move: {measure([moving_step] * 4):.4f} ms")
    host = measure_host(quantizer.step, 20)
    torch.cuda.empty_cache()
    print(f"  host: {host * 1e3:.3f} ms, {len(masters)} masters, {slots[1]} scales", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("checks", "times", "whole-model"):
        parser.add_argument(f"--{option}", action="store_true")
    options = parser.parse_args()
    is_all = not any(vars(options).values())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, commit {commit}")
    with torch.no_grad():
        if options.checks or is_all:
            for check in (check_division, check_random, check_every_bf16, check_large, check_model_optimizer):
                start = time.perf_counter()
                print(f"equal: {check()}  ({time.perf_counter() - start:.0f} s)", flush=True)
            torch.cuda.empty_cache()
        if options.times or is_all:
            for shape, slack in (((16384, 8192), 1.0), ((8192, 8192), 0.9), ((4096, 4096), 0.9)):
                time_kernels(shape, slack)
                torch.cuda.empty_cache()
            time_small()
        if options.whole_model or is_all:
            time_whole_model("Llama 8B", LLAMA_8B)
            # Launches and the last wave weigh here: at most 0.15 ms is asked for.
            time_whole_model("Llama 125M", LLAMA_125M, target=None)
            time_whole_model("MoE, 128 experts", MOE_128)


if __name__ == "__main__":
    main()
