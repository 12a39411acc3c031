"""How close to the bf16 model a quantized one comes: KL on held-out text after PTQ and after QAD, against Model Optimizer.

    python benchmarks/accuracy.py --model FOLDER --results FILE [--arms NAME ...] [--rates LR ...] [--seeds 0 1 2] [--minutes M]

FOLDER holds SmolLM2-135M-Instruct, or another causal language model. The text is the documentation of the installed packages
(`installed_text.py`). Every arm distils the bf16 model by the same loss over the same batches with the same optimizer and schedule;
embeddings and the tied output embedding are neither quantized nor trained. An arm takes every rate with the first seed, and the best
of them, by the KL of the serving that it trains for, with the others. A seed is an order of the training sequences.

Each result is a line of FILE, and is not measured again: start the command anew to continue after --minutes are over, or on
another device with other arms. The table of all lines comes last.
"""

import argparse
import contextlib
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import installed_text
import peers
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvfp4_train.losses.distillation import DistillationLoss
from nvfp4_train.models.build import ModelBuilder, freeze
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig, build_optimizer
from nvfp4_train.quant.policy import SERVINGS, CalibrationConfig, QuantConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FROZEN = ("*embed_tokens*",)
WARMUP_STEPS = 10
RATES = (6e-5, 1.5e-4, 3e-4)


class Arm(Protocol):
    """A model in QAD."""

    model: nn.Module

    def loss(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The KL to minimize and, without gradients, metrics."""

    def follow(self, step: int) -> None:
        """Called after every optimizer step."""

    def serving(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Compute inside the context as one of `SERVINGS`."""


class Ours:
    def __init__(self, folder: str, calibration: Tensor, **options: Any) -> None:
        self.quant = QuantConfig(calibration=CalibrationConfig(sequences=len(calibration)), **options)
        self.module = QATModule(
            model=ModelConfig(path=folder), quant=self.quant, optim=OptimConfig(frozen=FROZEN), loss=DistillationLoss()
        ).to(DEVICE)
        self.module.configure_model()
        assert self.module.model is not None
        self.model = self.module.to(DEVICE).model
        self.module.prepare([({"input_ids": row[None]}, True) for row in calibration])
        self.module.update(refit=True)

    def loss(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module.loss(self.model, {"input_ids": input_ids})

    def follow(self, step: int) -> None:
        self.module.update(refit=step % self.quant.refit_every == 0)

    def serving(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.module.serving(name)


class ModelOptimizer:
    """A plain model under bf16 autocast, its masters in fp32 as ours are.

    Without its input quantizers NVFP4_DEFAULT_CFG is W4A16_NVFP4_CFG, so both servings come from the one, calibrated once.
    """

    def __init__(self, folder: str, calibration: Tensor, *, activations: str, config: str = "NVFP4_DEFAULT_CFG") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
        freeze(self.model, FROZEN)
        self.distillation = DistillationLoss()
        self.distillation.prepare(ModelBuilder(student=self.model, config=ModelConfig(path=folder), device=DEVICE))

        @torch.no_grad()
        def run(model: nn.Module) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                for row in calibration:
                    model(input_ids=row[None])

        peers.quantize_with_model_optimizer(self.model, config, run)
        self.activations = activations
        self._quantize_inputs(activations)

    def loss(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return self.distillation(self.model, {"input_ids": input_ids})

    def follow(self, step: int) -> None:
        """Its weights are quantized anew in every forward."""

    @contextlib.contextmanager
    def serving(self, name: str) -> Iterator[None]:
        self._quantize_inputs(SERVINGS[name])
        yield
        self._quantize_inputs(self.activations)

    def _quantize_inputs(self, activations: str) -> None:
        import modelopt.torch.quantization as mtq

        switch = mtq.enable_quantizer if activations == "nvfp4" else mtq.disable_quantizer
        # Those of the output embedding stay off, as the config has them.
        switch(self.model, lambda name: name.endswith("input_quantizer") and "lm_head" not in name)


TRAINED: dict[str, tuple[str, Callable[..., Arm]]] = {
    "ours w4a4": ("w4a4", partial(Ours, rule="hessian", activations="nvfp4")),
    "ours w4a16": ("w4a16", partial(Ours, rule="hessian", activations="none")),
    "modelopt w4a4": ("w4a4", partial(ModelOptimizer, activations="nvfp4")),
    "modelopt w4a16": ("w4a16", partial(ModelOptimizer, activations="none")),
}
"""Arms by name, each with the serving that it trains for. Before their first step they are PTQ."""

UNTRAINED: dict[str, Callable[..., Arm]] = {
    "ours, max": partial(Ours, rule="max", equalize=None, activations="nvfp4"),
    "ours, hessian alone": partial(Ours, rule="hessian", equalize=None, activations="nvfp4"),
    "ours, equalization alone": partial(Ours, rule="max", activations="nvfp4"),
    "ours": partial(Ours, rule="hessian", activations="nvfp4"),
    "modelopt": partial(ModelOptimizer, activations="nvfp4"),
    "modelopt, local hessian": partial(ModelOptimizer, activations="nvfp4", config="NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"),
}
"""PTQ rows."""


class Text:
    """Token ids on the device: calibration, training and held-out sequences, none of which shares a paragraph with another."""

    def __init__(self, options: argparse.Namespace) -> None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        num_trained = options.steps * options.batch
        wanted = options.calibration + num_trained, options.held_out
        training, held_out = (
            installed_text.sequences(part, tokenizer, options.length, num)
            for part, num in zip(installed_text.documents(installed_text.installed_folders()), wanted, strict=True)
        )
        self.calibration = training[: options.calibration].to(DEVICE)
        self.training = training[options.calibration :].to(DEVICE)
        self.held_out = held_out.to(DEVICE)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        return (self.training[rows] for rows in order.split(size))


def train(arm: Arm, batches: Iterator[Tensor], rate: float, steps: int) -> None:
    config = OptimConfig(lr=rate, warmup_steps=WARMUP_STEPS, min_lr_ratio=0.0)
    optimizer, schedule = build_optimizer(arm.model, config, steps)
    arm.model.train()
    for step, input_ids in enumerate(batches, start=1):
        loss, _ = arm.loss(input_ids)
        loss.backward()
        nn.utils.clip_grad_norm_(arm.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        arm.follow(step)


@torch.no_grad()
def evaluate(arm: Arm, held_out: Tensor, batch: int) -> dict[str, float]:
    """KL to the bf16 model and share of positions with its most likely token, under every serving."""
    arm.model.eval()
    found: dict[str, float] = {}
    for serving in SERVINGS:
        totals = {"kl": torch.zeros((), device=DEVICE), "top1_agreement": torch.zeros((), device=DEVICE)}
        with arm.serving(serving):
            for rows in held_out.split(batch):
                _, metrics = arm.loss(rows)
                for name, total in totals.items():
                    total += metrics[name] * len(rows) / len(held_out)
        found |= {f"{name} {serving}": total.item() for name, total in totals.items()}
    return found


class Results:
    """Lines of a file: an arm's name, its rate (None: not trained) and seed, and what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.results
        self.setup = {name: getattr(options, name) for name in ("steps", "batch", "length", "held_out", "calibration")}

    def rows(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [row for row in map(json.loads, lines) if row["setup"] == self.setup]

    def of(self, arm: str, rate: float | None = None, seed: int = 0) -> dict[str, Any] | None:
        return next((row for row in self.rows() if (row["arm"], row["rate"], row["seed"]) == (arm, rate, seed)), None)

    def best_rate(self, arm: str, rates: list[float], seed: int) -> float:
        serving, _ = TRAINED[arm]
        rows = [row for row in self.rows() if row["arm"] == arm and row["rate"] in rates and row["seed"] == seed]
        return min(rows, key=lambda row: row[f"kl {serving}"])["rate"]

    def add(self, **row: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"setup": self.setup, "host": host()}) + "\n")


def host() -> str:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    return ", ".join([device, *(f"{name} {version(name)}" for name in ("torch", "transformers"))])


def measure(options: argparse.Namespace, text: Text, results: Results) -> None:
    deadline = time.monotonic() + 60 * options.minutes

    def once(name: str, make: Callable[..., Arm], rate: float | None = None, seed: int = options.seeds[0]) -> None:
        if results.of(name, rate, seed) or time.monotonic() > deadline:
            return
        start = time.monotonic()
        arm = make(options.model, text.calibration)
        if rate is not None:
            train(arm, text.batches(options.batch, seed), rate, options.steps)
        found = evaluate(arm, text.held_out, options.batch)
        del arm
        gc.collect()
        torch.cuda.empty_cache()
        results.add(arm=name, rate=rate, seed=seed, **found, seconds=round(time.monotonic() - start, 1))
        print(f"{name:<26} rate {rate} seed {seed}: {found}", flush=True)

    for name in (name for name in UNTRAINED if name in options.arms):
        once(name, UNTRAINED[name])
    for name in (name for name in TRAINED if name in options.arms):
        _, make = TRAINED[name]
        first, *others = options.seeds
        for rate in options.rates:
            once(name, make, rate, first)
        if all(results.of(name, rate, first) for rate in options.rates):
            for seed in others:
                once(name, make, results.best_rate(name, options.rates, first), seed)


def table(options: argparse.Namespace, results: Results) -> Iterator[str]:
    columns = [f"{metric} {serving}" for serving in SERVINGS for metric in ("kl", "top1_agreement")]
    yield f"| {' | '.join(['arm', 'rate', 'seeds', *columns])} |"
    yield "| --- " * (3 + len(columns)) + "|"
    for name in (*UNTRAINED, *TRAINED):
        rows = [row for row in results.rows() if row["arm"] == name]
        for rate in sorted({row["rate"] for row in rows}, key=lambda rate: rate or 0):
            of_rate = [row for row in rows if row["rate"] == rate]
            cells = [spread([row[column] for row in of_rate]) for column in columns]
            yield f"| {' | '.join([name, 'PTQ' if rate is None else f'{rate:g}', str(len(of_rate)), *cells])} |"


def spread(values: list[float]) -> str:
    """The mean and, of several, half the range."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--results", required=True, type=Path, help="a file of JSON lines that results are added to")
    parser.add_argument("--arms", nargs="+", choices=[*UNTRAINED, *TRAINED], help="default: all that can run here")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after this time")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--calibration", type=int, default=64, help="sequences")
    parser.add_argument("--held-out", type=int, default=96, help="sequences")
    options = parser.parse_args()
    has_peer = peers.has_model_optimizer() and DEVICE.type == "cuda"
    options.arms = options.arms or [name for name in (*UNTRAINED, *TRAINED) if has_peer or not name.startswith("modelopt")]
    torch.set_float32_matmul_precision("high")
    results = Results(options)
    measure(options, Text(options), results)
    print(f"\n{host()}; {' '.join(sys.argv)}\n")
    print("\n".join(table(options, results)))


if __name__ == "__main__":
    main()
