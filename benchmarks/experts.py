"""Time of a training step of a mixture of experts with quantized weights (W4A16) and inputs (W4A4), against the same code with neither.

    python benchmarks/experts.py [--model qwen3_30b_a3b] [--layers 4] [--tokens 4096] [--steps 20] [--compile] [--profile]

The model has the shape of `configs/model/NAME.yaml` with fewer layers, as many as one GPU holds with masters, gradients and AdamW. A
step is forward, loss, backward, clipping, fused AdamW and, with quantization on, the store's update. All sides are the same model,
which is switched between steps, so they run side by side in the memory of one. Times are device-synchronised medians. Before that the
weights of some experts of every layer are compared with the reference, and the whole model with the plain transformers class, module
by module.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import random_models
import torch
import triton
from step import INPUT_SCALE

from nvfp4_train.kernels import reference
from nvfp4_train.losses.next_token import next_token_loss
from nvfp4_train.models.build import build_model
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits
from nvfp4_train.models.quirks import parameters_on_meta
from nvfp4_train.models.served_check import check_served
from nvfp4_train.optim import OptimConfig, build_optimizer
from nvfp4_train.quant.experts import find_experts
from nvfp4_train.quant.policy import QuantConfig

SIDES = ("off", "W4A16", "W4A4")
CHECKED_EXPERTS = 4


class Run:
    """One model whose weights and inputs are quantized, or not, from one step to the next."""

    def __init__(self, name: str, num_layers: int, num_tokens: int, *, compiled: bool) -> None:
        fields = random_models.config_of(name) | {"num_hidden_layers": num_layers}
        config = ModelConfig(config=fields, compile=compiled, compute_dtype="bfloat16")
        with parameters_on_meta():
            built = build_model(config, QuantConfig(activations="nvfp4"), torch.device("cpu"), compute_dtype=torch.bfloat16)
        self.model, self.store, self.inputs = built.model, built.store, built.inputs
        random_models.fill(self.model, "cuda")
        self.store.state.to_empty(device="cuda")
        for group in self.store.manifest.groups:
            self.store.state.input_scale(group[0]).fill_(INPUT_SCALE)
        self.optimizer, _ = build_optimizer(self.model, OptimConfig(), total_steps=1000)
        self.input_ids = torch.randint(0, fields["vocab_size"], (1, num_tokens), device="cuda")
        self.store.update()

    def check(self) -> None:
        for name in find_experts(self.model):
            masters, weights = self.model.get_parameter(name).detach(), self.store.compute_weight(name)
            scales = self.store.global_scale[self.store.slots(name)]
            for expert in range(0, len(masters), max(1, len(masters) // CHECKED_EXPERTS)):
                amax = masters[expert].abs().amax()
                assert scales[expert] == reference.global_scale(amax), (name, expert)
                expected = reference.fake_quant(masters[expert], scales[expert], torch.bfloat16)
                assert torch.equal(weights[expert], expected), (name, expert)
        for side in SIDES:
            with self.serving(side):
                compared = check_served(self.model, self.input_ids[:, :64], inputs=self.inputs)
            print(f"{side}: {compared} modules compute what the plain class computes", flush=True)

    def serving(self, side: str):
        if side == "off":
            return self.store.masters_only()
        self.inputs.enable(side == "W4A4")
        return nullcontext()

    def step(self, side: str) -> None:
        with self.serving(side):
            next_token_loss(compute_logits(self.model, self.input_ids), self.input_ids).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if side != "off":
                self.store.update()

    def timed_step(self, side: str) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.step(side)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_30b_a3b", help="a file of configs/model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the device time of a W4A16 step goes")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    run = Run(arguments.model, arguments.layers, arguments.tokens, compiled=arguments.compile)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    quantized = sum(run.model.get_parameter(name).numel() for name in run.store.names)
    print(
        f"{arguments.model} with {arguments.layers} layers: {parameters:,} parameters, {quantized / parameters:.1%} quantized"
    )
    run.check()
    for side in SIDES:
        for _ in range(3):
            run.step(side)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.steps):
        for side in SIDES:
            # The first step after a switch starts with other weights in the caches.
            times[side].append(run.timed_step(side))
    if arguments.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            run.timed_step("W4A16")
        print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60))
    medians = {side: statistics.median(of_side) for side, of_side in times.items()}
    mode = "compiled" if arguments.compile else "eager"
    for side, ms in medians.items():
        print(f"{mode:<10}{arguments.tokens:>6} tokens {side:>8}{ms:>10.2f} ms{ms / medians['off']:>8.3f}")
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, all sides in one")


if __name__ == "__main__":
    main()
