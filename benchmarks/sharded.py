"""Time, peak memory and traffic of FSDP2 training steps: weights gathered packed, gathered as bf16, and without quantization.

    torchrun --nproc-per-node 2 benchmarks/sharded.py [--cases 8b_1x2048 ...] [--steps 10] [--rounds 2] [--profile]

A step is two micro-batches of forward, loss and backward, gradients reduced once, clipping, fused AdamW and, with quantization on,
the weight store's update. Weights and tokens are random. One model serves all sides, which take turns, each round in another
order. Times are medians of device-synchronised steps of the slowest rank; `host` is when the host had issued the step. Memory is
the peak that the allocator reached on one rank, of the first turn for `off`, before anything was quantized. Bytes are those that a
rank receives by all-gather in one step, as the profiler counts them, and those of decoder layers alone.

Without GPUs `--cases tiny` runs the same code over gloo.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import random_models
import torch
import triton
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from nvfp4_train.losses.next_token import next_token_loss
from nvfp4_train.models.build import make_trainable
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, load_model
from nvfp4_train.models.quirks import parameters_on_meta
from nvfp4_train.optim import OptimConfig, build_optimizer
from nvfp4_train.quant import fsdp2_internals, sharded
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import QuantConfig
from nvfp4_train.quant.sharded import ShardedWeightStore

CASES = {
    # Model, its layers, sequences and tokens of a micro-batch, gradient checkpointing.
    "1b_1x2048": ("llama_1b", 16, 1, 2048, False),
    "8b_1x2048": ("llama3_8b", 32, 1, 2048, False),
    "8b_4x2048_checkpointed": ("llama3_8b", 32, 4, 2048, True),
    "30b_a3b_6_layers_1x4096": ("qwen3_30b_a3b", 6, 1, 4096, False),
    "tiny": ("tiny", 4, 1, 128, False),
}
MICRO_BATCHES = 2
SIDES = ("off", "packed", "documented", "bf16")
"""`documented` is packed through FSDP2's documented all-gather, as in a version of PyTorch whose internals are not known."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_model(name: str, num_layers: int) -> tuple[PreTrainedModel, QuantManifest]:
    """A sharded model with random weights; no rank ever holds all of it."""
    with parameters_on_meta():
        model = load_model(ModelConfig(config=random_models.config_of(name) | {"num_hidden_layers": num_layers}))
    mesh = init_device_mesh(DEVICE, (distributed.get_world_size(),))

    def fill() -> None:
        random_models.fill(model, DEVICE, seed=distributed.get_rank())

    made = make_trainable(model, QuantConfig(), compute_dtype=torch.bfloat16, mesh=mesh, fill=fill)
    return model, made.store.manifest


class Side:
    """One way to compute with the weights of a model that all sides share."""

    def __init__(self, name: str, model: PreTrainedModel, manifest: QuantManifest) -> None:
        self.name = name
        self.store: ShardedWeightStore | None = None
        self._groups = [fsdp2_internals.param_group(module) for module in model.modules() if isinstance(module, FSDPModule)]
        self._make = lambda: ShardedWeightStore(model, manifest, gather="bf16" if name == "bf16" else "packed")

    @contextlib.contextmanager
    def turn(self):
        """The store exists, and its hooks are set, inside the context."""
        if self.name == "off":
            yield
            return
        comms = [group._all_gather_comm for group in self._groups if group is not None]
        knows_internals = sharded.knows_internals
        sharded.knows_internals = lambda: self.name != "documented"
        try:
            self.store = self._make()
        finally:
            sharded.knows_internals = knows_internals
        self.store.update()
        yield
        self.store._use(False)
        self.store = None
        for group, comm in zip((group for group in self._groups if group is not None), comms, strict=True):
            group._all_gather_comm = comm


def step(model: nn.Module, optimizer: torch.optim.Optimizer, side: Side, input_ids: torch.Tensor) -> None:
    for index in range(MICRO_BATCHES):
        model.set_requires_gradient_sync(index + 1 == MICRO_BATCHES)  # type: ignore[operator]
        loss = next_token_loss(compute_logits(model, input_ids), input_ids)
        (loss / MICRO_BATCHES).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if side.store is not None:
        side.store.update()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(run: Any) -> tuple[float, float]:
    """Milliseconds until the device, and until the host, was done."""
    distributed.barrier()
    synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    synchronize()
    return (time.perf_counter() - start) * 1e3, host * 1e3


def gathered_bytes(run: Any) -> Counter[int]:
    """How often this rank received how many bytes by all-gather in one run, itself included."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as trace:
        run()
        synchronize()
    # Every rank writes a file of its own.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: Counter[int] = Counter()
    sizes = {"unsigned char": 1, "c10::BFloat16": 2, "float": 4}
    for event in events:
        if event.get("name", "").startswith("c10d::_allgather_base"):
            (num_elements,), dtype = event["args"]["Input Dims"][0], event["args"]["Input type"][0]
            found[num_elements * sizes[dtype]] += 1
    return found


def slowest(values: list[float]) -> list[float]:
    """The largest over ranks, value by value."""
    tensor = torch.tensor(values, device=DEVICE)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor.tolist()


def measure(case: str, sides: list[str], steps: int, rounds: int, show_profile: bool) -> None:
    name, num_layers, batch, tokens, checkpointed = CASES[case]
    model, manifest = build_model(name, num_layers)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, _ = build_optimizer(model, OptimConfig(), total_steps=10_000)
    input_ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=DEVICE)
    times: dict[str, list[float]] = {side: [] for side in sides}
    hosts: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, float] = {}
    traffic: dict[str, Counter[int]] = {}
    tables: dict[str, str] = {}
    for round_number in range(rounds):
        first = round_number % len(sides)
        for side in (Side(side_name, model, manifest) for side_name in sides[first:] + sides[:first]):
            with side.turn():
                run = lambda side=side: step(model, optimizer, side, input_ids)  # noqa: E731
                for _ in range(4 if round_number == 0 else 2):
                    run()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(-(-steps // rounds)):
                    total, host = timed(run)
                    times[side.name].append(total)
                    hosts[side.name].append(host)
                if round_number == 0:
                    memory[side.name] = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
                    traffic[side.name] = gathered_bytes(run)
                    if show_profile:
                        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
                            run()
                            synchronize()
                        averages = trace.key_averages()
                        tables[side.name] = "\n".join(
                            averages.table(sort_by=key, row_limit=22, max_name_column_width=70)
                            for key in ("self_cuda_time_total", "self_cpu_time_total")
                        )
    report(case, manifest, times, hosts, memory, traffic, tables)


def report(
    case: str,
    manifest: QuantManifest,
    times: dict[str, list[float]],
    hosts: dict[str, list[float]],
    memory: dict[str, float],
    traffic: dict[str, Counter[int]],
    tables: dict[str, str],
) -> None:
    rows = {}
    for side in times:
        step_ms = statistics.median(slowest(times[side]))
        host_ms = statistics.median(slowest(hosts[side]))
        (peak,) = slowest([memory[side]])
        # Layers are gathered more often than anything else.
        layer = max(traffic[side], key=lambda size: traffic[side][size], default=0)
        rows[side] = (step_ms, host_ms, peak, sum(size * count for size, count in traffic[side].items()), layer)
    if distributed.get_rank() != 0:
        return
    print(f"\n{case}, {len(manifest.names)} quantized linears")
    print(
        f"{'side':<12}{'ms':>9}{'/off':>7}{'host ms':>9}{'GiB':>8}{'gathered MB':>13}{'/off':>7}{'a layer MB':>12}{'/off':>7}"
    )
    off = rows["off"]
    for side, (ms, host, peak, total, layer) in rows.items():
        print(
            f"{side:<12}{ms:>9.1f}{ms / off[0]:>7.3f}{host:>9.1f}{peak:>8.2f}{total / 1e6:>13.1f}{total / (off[3] or 1):>7.3f}"
            f"{layer / 1e6:>12.2f}{layer / (off[4] or 1):>7.3f}",
            flush=True,
        )
    for side, table in tables.items():
        print(f"\nprofile of {case}, {side}\n{table}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=[case for case in CASES if case != "tiny"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side, over which its steps are spread")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="off among them")
    parser.add_argument("--profile", action="store_true", help="print where device and host time of a step goes")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    if distributed.get_rank() == 0:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
        print(f"{distributed.get_world_size()} x {device}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    for case in arguments.cases:
        measure(case, arguments.sides, arguments.steps, arguments.rounds, arguments.profile)
        # FSDP2's states and modules refer to each other.
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
