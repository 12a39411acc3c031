"""Time and peak memory of a training step with weight fake quantization on, against the same code with it off.

    python benchmarks/step.py [--models llama_125m llama_1b] [--steps 20] [--eager-only] [--profile]

A step is what a run does after the data has arrived: forward, loss, backward, clipping, fused AdamW and, with quantization on, the
weight store's update. Weights and tokens are random. The two sides run alternately in one process, each on its own copy of the
model; times are device-synchronised medians over the steps, memory is the peak that the allocator reached while one side alone
was on the device. Where Model Optimizer is installed, its weight-only fake quantization of the same model, eager under bf16
autocast, is a third side. (torchao's NVFP4 training quantizes activations as well, and computes on Blackwell only.)
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
import triton
import yaml

from nvfp4_train.losses import next_token_loss
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, load_model
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig, build_optimizer
from nvfp4_train.quant.policy import QuantConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "model"
BATCH = {"llama_125m": (16, 1024), "llama_1b": (4, 2048)}
"""Sequences and tokens per sequence of a step."""


class Run:
    """One model in training."""

    def __init__(self, name: str, *, quantized: bool, compiled: bool) -> None:
        fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        model_config = ModelConfig(config=fields["config"], compile=compiled)
        torch.manual_seed(0)
        self.module = QATModule(model=model_config, quant=QuantConfig(), optim=OptimConfig())
        with torch.device("cuda"):
            self.module.configure_model()
        self.module.cuda()
        self.quantized = quantized
        self.optimizer, _ = build_optimizer(self.module.model, OptimConfig(), total_steps=1000)
        batch, tokens = BATCH[name]
        self.input_ids = torch.randint(0, fields["config"]["vocab_size"], (batch, tokens), device="cuda")
        if quantized:
            self.module.store.update()

    def step(self) -> None:
        loss = next_token_loss(self.module(self.input_ids), self.input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.quantized:
            self.module.store.update()

    def timed_step(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


class PeerRun(Run):
    """The same model, loss and optimizer, with Model Optimizer's fake quantization in every forward."""

    def __init__(self, name: str) -> None:
        fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = load_model(ModelConfig(config=fields["config"]))
        peers.quantize_weights_with_model_optimizer(self.model)
        self.optimizer, _ = build_optimizer(self.model, OptimConfig(), total_steps=1000)
        batch, tokens = BATCH[name]
        self.input_ids = torch.randint(0, fields["config"]["vocab_size"], (batch, tokens), device="cuda")

    def step(self) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = next_token_loss(compute_logits(self.model, self.input_ids), self.input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def release() -> None:
    """Free a model of the past, which torch.compile keeps, and counts towards the recompilations that it allows."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def peak_memory(make: Callable[[], Run]) -> float:
    """GiB at the peak of a steady step."""
    run = make()
    for _ in range(3):
        run.step()
    torch.cuda.reset_peak_memory_stats()
    run.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    del run
    release()
    return peak


def compare(name: str, *, compiled: bool, steps: int) -> list[tuple[float, float]]:
    """Milliseconds and GiB of each side: off, on and, in eager mode, the peer if there is one."""
    sides: list[Callable[[], Run]] = [
        functools.partial(Run, name, quantized=quantized, compiled=compiled) for quantized in (False, True)
    ]
    if peers.has_model_optimizer() and not compiled:
        sides.append(functools.partial(PeerRun, name))
    memory = [peak_memory(make) for make in sides]
    runs = [make() for make in sides]
    for run in runs:
        for _ in range(5):
            run.step()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(steps):
        for run, measured in zip(runs, times, strict=True):
            measured.append(run.timed_step())
    del run, runs
    release()
    return list(zip(map(statistics.median, times), memory, strict=True))


def profile(name: str, *, quantized: bool, compiled: bool) -> str:
    """Device time of one steady step by kernel."""
    run = Run(name, quantized=quantized, compiled=compiled)
    for _ in range(5):
        run.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as trace:
        run.timed_step()
    return trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(BATCH), default=sorted(BATCH))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the device time of a quantized eager step goes")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {arguments.steps} steps each"
    )
    print(f"{'model':<12}{'mode':<10}{'tokens':>8}{'side':>18}{'ms':>10}{'/off':>8}{'GiB':>10}")
    for name in arguments.models:
        batch, tokens = BATCH[name]
        for compiled in (False,) if arguments.eager_only else (False, True):
            rows = compare(name, compiled=compiled, steps=arguments.steps)
            mode = "compiled" if compiled else "eager"
            for side, (ms, gib) in zip(("off", "on", "Model Optimizer"), rows, strict=False):
                print(
                    f"{name:<12}{mode:<10}{batch * tokens:>8}{side:>18}{ms:>10.2f}{ms / rows[0][0]:>8.3f}{gib:>10.2f}",
                    flush=True,
                )
        if arguments.profile:
            print(profile(name, quantized=True, compiled=False), flush=True)


if __name__ == "__main__":
    main()
