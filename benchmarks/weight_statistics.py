"""Time and memory of the statistics of quantized weights, against training steps without them.

    python benchmarks/weight_statistics.py [--model llama_1b] [--every 20] [--looks 3] [--compiled]

First the kernels' sums are compared with those of the plain PyTorch reference. Then W4A16 and W4A4 train on one GPU as in
`benchmarks/step.py`, with all statistics of `callbacks.scale_stats` as they are by default. Stretches of `--every` steps alternate
with and without a look at their end, in one process on one model, and a look is timed alone: from a device at rest to the values of
all layers on the host. A look's cost is that time over the time of `--every` steps; the target is 0.5 %. The device time is that of a
look's kernels alone. Inputs, which W4A4 measures in a forward at every fifth look, count with a fifth of what they take.

Loggers are not part of it: what they do with the values depends on them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from step import Run, release
from torch import Tensor

from nvfp4_train.callbacks.scale_stats import ScaleStats
from nvfp4_train.kernels import ops, reference, statistics_reference
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.quant.input_statistics import InputClipping
from nvfp4_train.quant.statistics import Statistic, sum_over_ranks

TARGET = 0.005
SHAPES = ((1, 2048, 8192), (1, 37, 80), (1, 1, 16), (16, 96, 512), (128, 7, 48), (3000, 2, 16))
RULES = (ScaleRule(), ScaleRule(global_scale="exact"), ScaleRule(block_scale="mse"))


def quantized(master: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masters [S, n, K], codes, block scales and s2, on the device of the masters."""
    s2 = reference.global_scale(master.nan_to_num(0).abs().amax((1, 2)), rule)
    parts = [torch.ops.nvfp4.quantize(part, scale, rule.block_scale) for part, scale in zip(master, s2, strict=True)]
    codes, scales = (torch.stack([part[index].view(torch.uint8) for part in parts]) for index in (0, 1))
    return master, codes, scales.view(torch.float8_e4m3fn), s2


def check_sums() -> str:
    """Compare both kernels with the reference. Raises AssertionError."""
    counts = [*range(statistics_reference.SIGNAL), *range(statistics_reference.BELOW_FLOOR, statistics_reference.LOG2_S2)]
    num_weights = 0
    for shape in SHAPES:
        for rule in RULES if max(shape) < 3000 else RULES[:1]:
            for has_nan in (False, True):
                torch.manual_seed(len(shape))
                master = torch.randn(shape, device="cuda") * 2.0 ** -torch.randint(0, 12, (*shape[:2], 1), device="cuda")
                if has_nan:
                    master[-1, -1, 3] = torch.nan
                weight = quantized(master, rule)
                on_host = tuple(part.cpu() for part in weight)
                (sums, amax), expected = torch.ops.nvfp4.weight_sums(*weight), statistics_reference.weight_sums(*on_host)
                assert torch.equal(sums.cpu()[counts], expected[0][counts]), (shape, rule, has_nan)
                torch.testing.assert_close(sums.cpu(), expected[0], rtol=1e-6, atol=0, equal_nan=True)
                torch.testing.assert_close(amax.cpu(), expected[1], rtol=0, atol=0, equal_nan=True)
                num_weights += 1
        check_changes(shape)
    return f"sums of {num_weights} weights and changes of {len(SHAPES)} are those of the reference"


def check_changes(shape: tuple[int, ...]) -> None:
    """Three looks, the last of which begins a window."""
    master = torch.randn(shape, device="cuda")
    first = quantized(master, RULES[0])
    kept = [part.clone() for part in (*first, first[1])]
    on_host = [part.cpu() for part in kept]
    for is_new_window in (False, False, True):
        now = quantized(master + 0.2 * torch.randn_like(master), RULES[0])
        found = ops.weight_changes(*now, *kept, is_new_window).cpu()
        expected = statistics_reference.weight_changes(*(part.cpu() for part in now), *on_host, is_new_window)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        counts = [statistics_reference.FLIPS, statistics_reference.OSCILLATIONS, statistics_reference.ELEMENTS]
        assert torch.equal(found[counts], expected[counts]), shape
        for a, b in zip(kept, on_host, strict=True):
            assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)), shape


class Looks:
    """The looks of a run: all that `ScaleStats` does but for what loggers do."""

    def __init__(self, run: Run) -> None:
        self.run = run
        callback = ScaleStats()
        self.of_inputs = [statistic for statistic in callback.statistics if isinstance(statistic, InputClipping)]
        self.of_weights: list[Statistic] = [s for s in callback.statistics if s not in self.of_inputs]

    def take(self) -> dict[str, float]:
        assert self.run.store is not None
        with torch.no_grad():
            names, tables = sum_over_ranks(self.run.store.local_weights(), [*self.of_weights, *self.of_inputs])
            values: dict[str, float] = {}
            for statistic, table in zip([*self.of_weights, *self.of_inputs], tables, strict=True):
                values |= statistic.aggregate(table)
                for name, sums in zip(names, table, strict=True):
                    values |= {f"{name}/{key}": value for key, value in statistic.finish(sums).items()}
        return values

    def measure_inputs(self) -> None:
        for statistic in self.of_inputs:
            ids = self.run.input_ids[:1, : statistic.tokens]
            assert self.run.module.inputs is not None
            statistic.measure(self.run.model, self.run.module.inputs, partial(compute_logits, self.run.model, ids))

    def bytes_kept(self) -> float:
        masters = dict(self.run.model.named_parameters())
        assert self.run.store is not None
        return sum(s.bytes_kept(masters[n].shape, masters[n].shape[-2]) for s in self.of_weights for n in self.run.store.names)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds until the call has returned and the device is at rest, and those in which the device computed."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return wall, sum(event.self_device_time_total for event in trace.key_averages()) / 1e3


def stretch(run: Run, num_steps: int, look: Callable[[], Any] | None = None) -> float:
    """Milliseconds of so many steps, with a look at their end if there is one."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        run.step()
    if look is not None:
        look()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(name: str, activations: str, *, compiled: bool, every: int, num_looks: int) -> list[str]:
    run = Run(name, quantized=True, compiled=compiled, activations=activations)
    looks = Looks(run)
    for _ in range(5):
        run.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    values = looks.take()
    kept = torch.cuda.memory_allocated() - before
    num_weights = sum(parameter.numel() for key, parameter in run.model.named_parameters() if key in run.store.names)
    with_looks, without = [], []
    for _ in range(num_looks):
        without.append(stretch(run, every))
        with_looks.append(stretch(run, every, looks.take))
    alone = [timed(looks.take) for _ in range(3)]
    wall, device = (statistics.median(side) for side in zip(*alone, strict=True))
    of_inputs = 0.0
    if activations != "none":
        looks.measure_inputs()
        of_inputs = statistics.median(timed(looks.measure_inputs)[0] for _ in range(3))
    period = statistics.median(without)
    every_look = looks.of_inputs[0].every
    cost = (wall + of_inputs / every_look) / period
    values = looks.take()
    assert values["flip_rate"] == 0, "no step since the last look"
    side = "W4A16" if activations == "none" else "W4A4"
    lines = [
        f"{side:<7}{period / every:>9.2f}{wall:>9.2f}{device:>9.2f}{of_inputs:>9.2f}"
        f"{statistics.median(with_looks) / period - 1:>11.3%}{cost:>9.3%}{TARGET:>9.1%}{cost / TARGET:>8.2f}"
        f"{kept / 2**20:>9.1f}{kept / num_weights:>9.3f}   {'met' if cost <= TARGET else 'MISSED'}"
    ]
    assert abs(kept - looks.bytes_kept()) < 2**20, "the plan's number, but for s2 and the allocator's rounding"
    del run, looks
    release()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_1b")
    parser.add_argument("--every", type=int, default=20, help="steps from look to look")
    parser.add_argument("--looks", type=int, default=3, help="stretches of each side")
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    print(check_sums(), flush=True)
    options = {"compiled": arguments.compiled, "every": arguments.every, "num_looks": arguments.looks}
    rows = [line for kind in ("none", "nvfp4") for line in measure(arguments.model, kind, **options)]
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {arguments.model}")
    print(f"python benchmarks/weight_statistics.py {' '.join(sys.argv[1:])}".rstrip())
    print(
        f"{'side':<7}{'step ms':>9}{'look ms':>9}{'device':>9}{'inputs':>9}{'in turns':>11}{'cost':>9}{'target':>9}{'ratio':>8}"
        f"{'MiB':>9}{'B/weight':>9}"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
