"""The kernels on one GPU: first whether they are right, then how near they come to the speed of a copy.

    python benchmarks/kernels.py [--checks] [--times] [--whole-model] [--search]      (all four without an option)
    compute-sanitizer --tool memcheck python benchmarks/kernels.py --small  (every kernel on small tensors; also racecheck, initcheck)

A time is of the public functions: the median over replays of a CUDA graph of several calls, on as many sets of tensors as exceed the
L2 cache. Beside it stands a device-to-device copy that moves as many bytes, measured in the same way right before; the ratio is
copy / ours. Bytes count once per element read or written. A peer that is installed (Model Optimizer, torchao) runs on the same
tensors in the same rotation, but not from a graph, which some of them do not allow: events enclose calls made one after the other.
Rows of the rules that search a block's scale have no target: they are bound by arithmetic, not by memory. `--search` is about the
fitted rule: the checks of its kernels, then what it costs a step of an 8B model over the rule max.
"""

import argparse
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import kernel_checks
import peers
import torch
import triton
import whole_model_checks
from torch import Tensor

from nvfp4_train.kernels import chunks, multi_tensor, reference
from nvfp4_train.kernels.fp4_kernel import (
    compute_fp4_scales,
    fp4_dequantize,
    nvfp4_block_amax,
    nvfp4_choose_steps,
    nvfp4_fake_quant,
    nvfp4_fake_quant_input,
    nvfp4_global_scale,
    nvfp4_quantize,
    nvfp4_quantize_input,
    static_blockwise_fp4_fake_quant,
)
from nvfp4_train.kernels.scale_rules import ScaleRule

BF16 = torch.bfloat16
L2_BYTES = 128 * 2**20
"""Calls rotate through so many sets of tensors that together they exceed this, more than the L2 cache of any GPU so far."""

Row = tuple[str, float, float | None, Callable, tuple]
"""Name, bytes per element, target as a ratio to the copy, the call, and a list for each of its arguments, with an element per set."""

LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)] * 32
LLAMA_125M = ([(768, 768)] * 4 + [(3072, 768)] * 2 + [(768, 3072)]) * 13
"""The quantized weights of `configs/model/llama_125m.yaml`."""
LLAMA_85M = ([(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)]) * 12
"""The same with 12 layers and an intermediate size of 2048."""
MOE_128 = [(128, 1536, 2048), (128, 2048, 768)] * 12

CHECKS = (
    kernel_checks.check_division,
    kernel_checks.check_subnormal_sixths,
    kernel_checks.check_random,
    kernel_checks.check_rules,
    kernel_checks.check_choose_steps,
    kernel_checks.check_block_sizes,
    kernel_checks.check_every_bf16,
    kernel_checks.check_inputs,
    kernel_checks.check_large,
    kernel_checks.check_model_optimizer,
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


def measure_eagerly(calls: Sequence[Callable], num_rounds: int = 7) -> float:
    """Milliseconds of one call, over rounds that make each call once: for what may not be captured in a graph."""
    times = []
    for _ in range(num_rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times[3:])


def measure_host(call: Callable, num_calls: int) -> float:
    """Seconds that the host takes to issue one call, the median."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(num_calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


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
    xs = [torch.randn(shape, device="cuda", dtype=BF16) * 0.02 for _ in range(num_sets)]
    masters = [torch.randn(shape, device="cuda") * 0.02 for _ in range(num_sets)]
    block_amax = nvfp4_block_amax(xs[0])
    global_amax = block_amax.max()
    pow2, exact = (nvfp4_global_scale(global_amax, ScaleRule(global_scale=name)) for name in ("pow2", "exact"))
    packed = [nvfp4_quantize(x, pow2) for x in xs]
    amaxes = [block_amax.clone() for _ in xs]
    rows: list[Row] = [
        ("static fake quant bf16", 4.25, 0.97, lambda x, a: static_blockwise_fp4_fake_quant(x, a, global_amax), (xs, amaxes)),
        ("dynamic fake quant bf16", 4, 0.95, lambda x: nvfp4_fake_quant(x, pow2), (xs,)),
        ("dynamic fake quant, exact s2", 4, 0.95, lambda x: nvfp4_fake_quant(x, exact), (xs,)),
        ("quantize and pack bf16", 2.5625, 0.93, lambda x: nvfp4_quantize(x, pow2), (xs,)),
        ("quantize and pack, exact s2", 2.5625, 0.93, lambda x: nvfp4_quantize(x, exact), (xs,)),
        ("dequantize to bf16", 2.5625, 0.93, lambda p: fp4_dequantize(*p, pow2, dtype=BF16), (packed,)),
        ("block amax bf16", 2.25, 0.95, nvfp4_block_amax, (xs,)),
        ("block amax fp32", 4.25, None, nvfp4_block_amax, (masters,)),
        ("quantize and pack fp32", 4.5625, 0.93, lambda x: nvfp4_quantize(x, pow2), (masters,)),
        ("fake quant fp32 to bf16", 6, 0.93, lambda x: nvfp4_fake_quant(x, pow2, BF16), (masters,)),
        ("input to values and codes", 4.5625, 0.90, lambda x: nvfp4_quantize_input(x, pow2), (xs,)),
        ("input to values", 4, 0.90, lambda x: nvfp4_fake_quant_input(x, pow2), (xs,)),
    ]
    rows += rows_of_rules(xs, masters, global_amax) + rows_of_block_sizes(xs, packed, pow2)
    times = {}
    for name, bytes_per_element, target, call, inputs in rows:
        calls = [functools.partial(call, *arguments) for arguments in zip(*inputs, strict=True)]
        num_bytes = bytes_per_element * num_elements
        copy = measure_copy(num_bytes, num_sets)
        times[name] = measure(calls)
        print_row(name, size, num_bytes, copy, times[name], None if target is None else target * slack)
    for row in ("static fake quant bf16", "dynamic fake quant bf16", "quantize and pack bf16", "dequantize to bf16"):
        for name, peer_calls in peers.kernels(row, xs, amaxes, global_amax):
            peer = measure_eagerly(peer_calls)
            print(f"  {row + ', ' + name:42s} {size:>12s} {peer:9.4f} ms, {peer / times[row]:.2f} times ours", flush=True)


def rows_of_rules(xs: list[Tensor], masters: list[Tensor], global_amax: Tensor) -> list[Row]:
    rows: list[Row] = []
    for name in kernel_checks.SEARCHING:
        rule = ScaleRule(block_scale=name)
        s2 = nvfp4_global_scale(global_amax, rule)
        fake_quant = functools.partial(nvfp4_fake_quant, global_scale=s2, out_dtype=BF16, rule=rule)
        quantize = functools.partial(nvfp4_quantize, global_scale=s2, rule=rule)
        rows += [
            (f"fake quant bf16, {name}", 4, None, fake_quant, (xs,)),
            (f"fake quant fp32, {name}", 6, None, fake_quant, (masters,)),
            (f"quantize bf16, {name}", 2.5625, None, quantize, (xs,)),
            (f"quantize fp32, {name}", 4.5625, None, quantize, (masters,)),
        ]
    rule = kernel_checks.FITTED_RULE
    s2 = nvfp4_global_scale(global_amax, rule)
    hessian = torch.eye(16, device="cuda").repeat(masters[0].shape[-1] // 16, 1, 1)
    steps = [nvfp4_choose_steps(x, s2, hessian, rule) for x in masters]
    return [
        *rows,
        ("fake quant fp32, hessian", 6.0625, None, lambda x, t: nvfp4_fake_quant(x, s2, BF16, rule, t), (masters, steps)),
        ("quantize fp32, hessian", 4.625, None, lambda x, t: nvfp4_quantize(x, s2, rule, t), (masters, steps)),
        ("choose steps fp32, hessian", 4.0625, None, lambda x: nvfp4_choose_steps(x, s2, hessian, rule), (masters,)),
    ]


def rows_of_block_sizes(xs: list[Tensor], packed: list[tuple[Tensor, Tensor]], s2: Tensor) -> list[Row]:
    rows: list[Row] = []
    for block_size in (8, 32, 64, 128):
        amax = xs[0].unflatten(-1, (-1, block_size)).abs().amax(-1).float()
        scales = (amax / amax.max()).to(torch.float8_e4m3fn)
        dequantize = functools.partial(fp4_dequantize, global_scale=s2, block_size=block_size, dtype=BF16)
        codes, amaxes, all_scales = zip(*((codes, amax.clone(), scales.clone()) for codes, _ in packed), strict=True)
        rows += [
            (f"static, blocks of {block_size}", 4 + 4 / block_size, 0.5, static_blockwise_fp4_fake_quant, (xs, amaxes)),
            (f"dequantize, blocks of {block_size}", 2.5 + 1 / block_size, 0.5, dequantize, (codes, all_scales)),
        ]
    return rows


def time_small() -> None:
    @triton.jit
    def empty_kernel(x_ptr):
        pass

    x, master, s2 = torch.randn(4096, device="cuda", dtype=BF16), torch.randn(4096, device="cuda"), torch.ones(1, device="cuda")
    amax = nvfp4_block_amax(x)
    global_amax = amax.max()
    packed = nvfp4_quantize(x, s2)
    calls = {
        "empty kernel": lambda: empty_kernel[(1,)](x),
        "block amax": lambda: nvfp4_block_amax(x),
        "dynamic fake quant": lambda: nvfp4_fake_quant(x, s2),
        "static fake quant": lambda: static_blockwise_fp4_fake_quant(x, amax, global_amax),
        "static scales": lambda: compute_fp4_scales(amax, global_amax),
        "quantize and pack": lambda: nvfp4_quantize(x, s2),
        "dequantize": lambda: fp4_dequantize(*packed, s2, dtype=BF16),
        "fake quant fp32 to bf16": lambda: nvfp4_fake_quant(master, s2, BF16),
        "quantize and pack fp32": lambda: nvfp4_quantize(master, s2),
        "input to values and codes": lambda: nvfp4_quantize_input(x, s2),
    }
    empty = measure([calls["empty kernel"]] * 100)
    for name, call in calls.items():
        device = measure([call] * 100)
        host = measure_host(call, 300)
        verdict = "met" if device <= empty + 0.003 else "MISSED"
        print(
            f"4096 elements, {name:24s} {device * 1e3:6.2f} us on the device (target: empty kernel + 3 us, {verdict}), "
            f"{host * 1e6:6.2f} us of host",
            flush=True,
        )


def time_whole_model(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    target: float | None = 1 / 1.1,
    most_ms: float | None = None,
    most_host_ms: float | None = None,
) -> None:
    """A step of fp32 masters to bf16 compute weights, while exponents stay and when all move; target as a ratio to the copy."""
    masters = [torch.randn(shape, device="cuda") * 0.02 for shape in shapes]
    num_elements = sum(master.numel() for master in masters)
    decoded = [torch.empty_like(master, dtype=BF16) for master in masters]
    slots = chunks.slots_of_groups(masters, list(range(len(masters))))
    quantizer = multi_tensor.MultiTensorQuantizer(masters, *slots, decoded=decoded)
    quantizer.step()
    whole_model_checks.check_scales(quantizer)
    for index in (0, -1):
        s2 = quantizer.global_scales[slots[0][index]]
        one = masters[index][0] if masters[index].dim() == 3 else masters[index]
        out = decoded[index][0] if masters[index].dim() == 3 else decoded[index]
        kernel_checks.assert_same(out, reference.fake_quant(one, s2, BF16), "the whole-model pass")
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    quantizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated, "a step allocated memory"
    # One copy of gigabytes is slower than copies of its parts, so the parts are the floor.
    num_parts = max(1, num_elements // 2**27)
    copy = measure_copy(6 * num_elements / num_parts, 4) * num_parts
    steady = measure([quantizer.step] * 4)
    print_row(f"{name}, steady", f"{num_elements / 1e6:.1f}M", 6 * num_elements, copy, steady, target)
    if most_ms is not None:
        print(f"  device: {steady:.4f} ms, target {most_ms} ms {'met' if steady <= most_ms else 'MISSED'}")

    def moving_step() -> None:
        quantizer.global_scales.fill_(1e-9)
        quantizer.step()

    print(f"  all exponents move: {measure([moving_step] * 4):.4f} ms")
    host = measure_host(quantizer.step, 20) * 1e3
    torch.cuda.empty_cache()
    verdict = "" if most_host_ms is None else f", target {most_host_ms} ms {'met' if host <= most_host_ms else 'MISSED'}"
    print(f"  host: {host:.3f} ms{verdict}, {len(masters)} masters, {slots[1]} scales", flush=True)


REFIT_EVERY, STEP_MS = 10, 850.0
"""Steps from one search to the next, and a bf16 step of Llama 8B on 8192 tokens on one H100, for the share that searches take."""


def time_search(shapes: Sequence[tuple[int, ...]] = LLAMA_8B) -> None:
    """A step of fp32 masters to bf16 compute weights under the rule max, and under the fitted rule with steps kept or chosen."""
    masters = [torch.randn(shape, device="cuda") * 0.02 for shape in shapes]
    decoded = [torch.empty_like(master, dtype=BF16) for master in masters]
    steps = [torch.zeros(*shape[:-1], shape[-1] // 16, dtype=torch.int8, device="cuda") for shape in shapes]
    source = kernel_checks.RandomInput(16, "cuda")
    hessians = [kernel_checks.random_hessians(shape[-1] // 16, source) for shape in shapes]
    slots = chunks.slots_of_groups(masters, list(range(len(masters))))
    rule = kernel_checks.FITTED_RULE
    largest = multi_tensor.MultiTensorQuantizer(masters, *slots, decoded=decoded)
    state = {"steps": steps, "hessians": hessians}
    quantizer = multi_tensor.MultiTensorQuantizer(masters, *slots, decoded=decoded, rule=rule, **state)
    times = {"max": measure([largest.step] * 4)}
    quantizer.step(refit=True)
    for index in (0, -1):
        rows = masters[index][-96:]
        expected = reference.choose_steps(rows, quantizer.global_scales[slots[0][index]], hessians[index], rule)
        kernel_checks.assert_same(steps[index][-96:], expected, "steps of the whole model")
    times["hessian, steps kept"] = measure([quantizer.step] * 4)
    times["hessian, steps chosen"] = measure([functools.partial(quantizer.step, refit=True)] * 2)
    times["the search alone"] = measure([quantizer._passes.choose_steps] * 2)
    kept, chosen = times["hessian, steps kept"], times["hessian, steps chosen"]
    amortised = kept + (chosen - kept) / REFIT_EVERY - times["max"]
    num_elements = sum(master.numel() for master in masters)
    print(f"a step of {num_elements / 1e6:.0f}M weights in {len(masters)}, {len(rule.steps)} candidates:")
    for name, milliseconds in times.items():
        print(f"  {name:24s} {milliseconds:9.3f} ms")
    share = amortised / STEP_MS
    print(
        f"  over max, chosen every {REFIT_EVERY}: {amortised:.3f} ms, {share:.2%} of {STEP_MS:.0f} ms  "
        f"target 1.5% {'met' if share <= 0.015 else 'MISSED'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("checks", "times", "whole-model", "search", "small"):
        parser.add_argument(f"--{option}", action="store_true")
    options = parser.parse_args()
    is_all = not any(vars(options).values())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    start_of_all = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, commit {commit}")
    with torch.no_grad():
        if options.checks or is_all:
            for check in CHECKS:
                start = time.perf_counter()
                print(f"equal: {check()}  ({time.perf_counter() - start:.1f} s)", flush=True)
                torch.cuda.empty_cache()
        if options.small:
            print(f"equal: {whole_model_checks.check_small()}")
        if options.times or is_all:
            for shape, slack in (((16384, 8192), 1.0), ((8192, 8192), 0.9), ((4096, 4096), 0.9)):
                time_kernels(shape, slack)
                torch.cuda.empty_cache()
            time_small()
        if options.whole_model or is_all:
            time_whole_model("Llama 8B", LLAMA_8B)
            # For small models the targets are times, not ratios.
            time_whole_model("Llama 125M", LLAMA_125M, target=None, most_ms=0.15, most_host_ms=0.1)
            time_whole_model("Llama 85M", LLAMA_85M, target=None, most_ms=0.15, most_host_ms=0.1)
            time_whole_model("MoE, 128 experts", MOE_128)
            torch.cuda.empty_cache()
        if options.search or is_all:
            if not is_all:
                print(f"equal: {kernel_checks.check_choose_steps()}", flush=True)
                print(f"equal: {whole_model_checks.check_small()}", flush=True)
                torch.cuda.empty_cache()
            time_search()
    print(f"all of this in {time.perf_counter() - start_of_all:.0f} s")


if __name__ == "__main__":
    main()
