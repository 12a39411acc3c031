"""Time and peak memory of a training step with quantized weights (W4A16) and inputs (W4A4), against the same code with neither.

    python benchmarks/step.py [--models llama_125m llama_1b] [--steps 20] [--eager-only] [--profile]

A step is what a run does after the data has arrived: forward, loss, backward, clipping, fused AdamW and, with quantization on, the
weight store's update. Weights and tokens are random, and input scales are set for activations of that size. The sides run
alternately in one process, each on its own copy of the model; times are device-synchronised medians over the steps, memory is the
peak that the allocator reached while one side alone was on the device. One side is the plain model under bf16 autocast, with nothing
of this project in it but loss and optimizer;
where Model Optimizer is installed, another is that with its weight-only fake quantization, which runs eagerly. (torchao's NVFP4
training quantizes activations as well, and computes on Blackwell only.)
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import peers
import random_models
import torch
import triton
from torch import nn

from nvfp4_train.kernels.fp4_kernel import nvfp4_fake_quant
from nvfp4_train.losses.next_token import next_token_loss
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, decoder_layers, load_model
from nvfp4_train.models.quirks import parameters_on_meta
from nvfp4_train.models.served_check import check_served
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig, build_optimizer
from nvfp4_train.quant.policy import QuantConfig

BATCH = {"llama_125m": (16, 1024), "llama_1b": (4, 2048)}
"""Sequences and tokens per sequence of a step."""

INPUT_SCALE = 2.0**-8
"""Room for inputs up to 10."""


class Run:
    """One model in training."""

    def __init__(self, name: str, *, quantized: bool, compiled: bool, activations: str = "none") -> None:
        config = random_models.config_of(name)
        model = ModelConfig(config=config, compile=compiled, compute_dtype="bfloat16")
        self.module = QATModule(model=model, quant=QuantConfig(activations=activations), optim=OptimConfig())
        with parameters_on_meta():
            self.module.configure_model()
        self.store = self.module.store if quantized else None
        self.start(self.module.model, config, BATCH[name])

    def start(self, model: nn.Module, config: dict[str, Any], batch: tuple[int, int]) -> None:
        self.model = model
        random_models.fill(model, "cuda")
        self.optimizer, _ = build_optimizer(model, OptimConfig(), total_steps=1000)
        self.input_ids = torch.randint(0, config["vocab_size"], batch, device="cuda")
        if self.store is not None:
            self.store.state.to_empty(device="cuda")
            for group in self.store.manifest.groups:
                self.store.state.input_scale(group[0]).fill_(INPUT_SCALE)
            self.module.update()

    def check(self) -> None:
        """The forward computes with the quantized weights, or with none of them."""
        assert self.module.store is not None
        store, parameters = self.module.store, dict(self.model.named_parameters())
        assert store.is_enabled == (self.store is not None)
        for name in store.names if store.is_enabled else ():
            expected = nvfp4_fake_quant(parameters[name].detach(), store.global_scale[store.slots(name)], torch.bfloat16)
            assert torch.equal(store.compute_weight(name), expected), name
        check_served(self.model, self.input_ids[:1, :64], inputs=self.module.inputs)

    def loss(self) -> torch.Tensor:
        return next_token_loss(compute_logits(self.model, self.input_ids), self.input_ids)

    def step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.store is not None:
            self.store.update()

    def timed_step(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


class AutocastRun(Run):
    """The plain model under bf16 autocast, as Lightning's bf16-mixed runs it; with Model Optimizer's fake quantization if asked."""

    def __init__(self, name: str, *, compiled: bool = False, model_optimizer: bool = False) -> None:
        config = random_models.config_of(name)
        self.store = None
        with parameters_on_meta():
            model = load_model(ModelConfig(config=config))
        if compiled:
            for layer in decoder_layers(model):
                layer.compile()
        self.start(model, config, BATCH[name])
        if model_optimizer:
            peers.quantize_with_model_optimizer(model)

    def loss(self) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return super().loss()


def release() -> None:
    """Free earlier models. torch.compile keeps them, and counts them towards its recompilation limit."""
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


def compare(name: str, *, compiled: bool, steps: int, only: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Milliseconds and GiB of each side, or of some of them."""
    sides: dict[str, Callable[[], Run]] = {
        "off": functools.partial(Run, name, quantized=False, compiled=compiled),
        "W4A16": functools.partial(Run, name, quantized=True, compiled=compiled),
        "W4A4": functools.partial(Run, name, quantized=True, compiled=compiled, activations="nvfp4"),
        "bf16-mixed": functools.partial(AutocastRun, name, compiled=compiled),
    }
    if peers.has_model_optimizer() and not compiled:
        sides["Model Optimizer"] = functools.partial(AutocastRun, name, model_optimizer=True)
    sides = {side: make for side, make in sides.items() if not only or side in only}
    memory = {side: peak_memory(make) for side, make in sides.items()}
    runs = {side: make() for side, make in sides.items()}
    for run in runs.values():
        for _ in range(5):
            run.step()
    for side in runs.keys() & {"off", "W4A16", "W4A4"}:
        runs[side].check()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(steps):
        for side, run in runs.items():
            times[side].append(run.timed_step())
    del run, runs
    release()
    return {side: (statistics.median(times[side]), memory[side]) for side in sides}


def profile(name: str, *, compiled: bool) -> str:
    """Device time of one steady step by kernel."""
    run = Run(name, quantized=True, compiled=compiled, activations="nvfp4")
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
    parser.add_argument(
        "--sides", nargs="+", default=[], help="of those in the table; all of them, 1.2B, take more than 80 GiB"
    )
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the device time of an eager W4A4 step goes")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {arguments.steps} steps each"
    )
    print(f"{'model':<12}{'mode':<10}{'tokens':>8}{'side':>18}{'ms':>10}{'/off':>8}{'GiB':>10}")
    for name in arguments.models:
        batch, tokens = BATCH[name]
        for compiled in (False,) if arguments.eager_only else (False, True):
            rows = compare(name, compiled=compiled, steps=arguments.steps, only=arguments.sides)
            mode = "compiled" if compiled else "eager"
            for side, (ms, gib) in rows.items():
                print(
                    f"{name:<12}{mode:<10}{batch * tokens:>8}{side:>18}{ms:>10.2f}{ms / rows['off'][0]:>8.3f}{gib:>10.3f}",
                    flush=True,
                )
        if arguments.profile:
            print(profile(name, compiled=False), flush=True)


if __name__ == "__main__":
    main()
