"""How close to the bf16 model a quantized one comes: KL on held-out text after PTQ and after QAD, against Model Optimizer.

    python benchmarks/accuracy.py --model FOLDER --results FILE [--arms NAME ...] [--seeds 0 1 2] [--minutes M]

FOLDER holds SmolLM2-135M-Instruct, or another causal language model. The text is the documentation of the installed packages
(`installed_text.py`). All arms distil the bf16 model over the same batches with the same optimizer and schedule; embeddings, and the
output embedding tied to them, are neither quantized nor trained. An arm takes all of its settings with the first seed, and the best of
them, by the KL of the serving that it trains for, with the others. A seed is an order of the training sequences.

Runs are shared out to all GPUs. Each result is a line of FILE and is not measured again, so the same command continues where an
earlier one, or its --minutes, ended. The table of all lines comes last.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


class Arm(Protocol):
    """A model for QAD, calibrated and quantized."""

    model: nn.Module
    distillation: DistillationLoss

    def reset(self) -> None:
        """Back to before the first step."""

    def loss(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimized and, where gradients are off, metrics."""

    def follow(self, step: int) -> None:
        """Called after every optimizer step."""

    def serving(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Compute inside the context as one of `SERVINGS`."""


class Ours:
    def __init__(self, folder: str, calibration: Tensor, **options: Any) -> None:
        calibrated = CalibrationConfig(sequences=len(calibration))
        self.quant = QuantConfig(calibration=calibrated, refit_every=1, **options)
        # It has to know before the model is built that hidden states are compared.
        self.distillation = DistillationLoss(hidden=1.0)
        self.module = QATModule(
            model=ModelConfig(path=folder), quant=self.quant, optim=OptimConfig(frozen=FROZEN), loss=self.distillation
        ).to(DEVICE)
        self.module.configure_model()
        assert self.module.model is not None
        self.model = self.module.to(DEVICE).model
        self.module.prepare([({"input_ids": row[None]}, True) for row in calibration])
        self._start = copied(self.module)
        self.reset()

    def reset(self) -> None:
        self.module.load_state_dict(self._start)
        self.module.update(refit=True)

    def loss(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.distillation(self.model, {"input_ids": input_ids})

    def follow(self, step: int) -> None:
        self.module.update(refit=step % self.quant.refit_every == 0)

    def serving(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.module.serving(name)


class ModelOptimizer:
    """A plain model under bf16 autocast, its masters in fp32 as ours are.

    Without its input quantizers NVFP4_DEFAULT_CFG is W4A16_NVFP4_CFG, so that one model, calibrated once, has both servings.
    """

    def __init__(self, folder: str, calibration: Tensor, *, activations: str, config: str = "NVFP4_DEFAULT_CFG") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
        freeze(self.model, FROZEN)
        self.distillation = DistillationLoss()
        self.distillation.prepare(ModelBuilder(student=self.model, config=ModelConfig(path=folder), device=DEVICE))

        @torch.no_grad()
        def run(model: nn.Module) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                for rows in calibration.split(8):
                    model(input_ids=rows)

        peers.quantize_with_model_optimizer(self.model, config, run)
        self.activations = activations
        self._quantize_inputs(activations)
        self._start = copied(self.model)

    def reset(self) -> None:
        self.model.load_state_dict(self._start)

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


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Setting(NamedTuple):
    """Hyper-parameters of a QAD."""

    rate: float
    hidden: float = 0.0
    """Weight of the loss on hidden states, `loss.hidden`."""


class Kind(NamedTuple):
    """A kind of arm. Without settings it is not trained: PTQ."""

    make: Callable[..., Arm]
    settings: tuple[Setting, ...] = ()


KINDS = {
    "modelopt w4a4": Kind(partial(ModelOptimizer, activations="nvfp4"), tuple(map(Setting, (3e-4, 1.5e-4, 6e-4)))),
    "ours w4a4": Kind(
        partial(Ours, rule="hessian", activations="nvfp4"),
        tuple(Setting(rate, 1.0) for rate in (1.5e-4, 1e-4, 2.5e-4)),
    ),
    "modelopt w4a16": Kind(partial(ModelOptimizer, activations="none"), tuple(map(Setting, (1.5e-4, 6e-5, 3e-4)))),
    "ours w4a16": Kind(
        partial(Ours, rule="hessian", activations="none"),
        tuple(Setting(rate, 1.0) for rate in (1e-4, 6e-5, 1.5e-4)),
    ),
    "ours ptq": Kind(partial(Ours, rule="hessian", activations="nvfp4")),
    "ours ptq, powers of two": Kind(partial(Ours, rule="hessian", equalize_pow2=True, activations="nvfp4")),
    "ours ptq, max": Kind(partial(Ours, rule="max", equalize=None, activations="nvfp4")),
    "ours ptq, max, equalized": Kind(partial(Ours, rule="max", activations="nvfp4")),
    "ours ptq, not equalized": Kind(partial(Ours, rule="hessian", equalize=None, activations="nvfp4")),
    "modelopt ptq": Kind(partial(ModelOptimizer, activations="nvfp4")),
    "modelopt ptq, local hessian": Kind(
        partial(ModelOptimizer, activations="nvfp4", config="NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG")
    ),
}


class Text(NamedTuple):
    """Token ids, int64 [sequences, length]. No paragraph is in two of them."""

    calibration: Tensor
    training: Tensor
    held_out: Tensor

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed))
        return (self.training[rows].to(DEVICE, non_blocking=True) for rows in order.split(size))


def read_text(options: argparse.Namespace) -> Text:
    """The text of --text, or of the packages, which is kept there."""
    if options.text is not None and options.text.exists():
        return Text(*torch.load(options.text, weights_only=True))
    text = read_installed_text(options)
    if options.text is not None:
        torch.save(tuple(text), options.text)
    return text


def read_installed_text(options: argparse.Namespace) -> Text:
    training, held_out = installed_text.documents(installed_text.installed_folders())
    sequences = partial(installed_text.sequences, tokenizer=AutoTokenizer.from_pretrained(options.model), length=options.length)
    shown = sequences(training, count=options.calibration + options.steps * options.batch)
    return Text(shown[: options.calibration], shown[options.calibration :], sequences(held_out, count=options.held_out))


class Run(NamedTuple):
    """One line of the results."""

    kind: str
    seed: int
    setting: Setting | None = None
    """None: PTQ."""

    def __str__(self) -> str:
        return f"{self.kind}, {'PTQ' if self.setting is None else self.setting}, seed {self.seed}"


class Worker:
    """Makes runs on one device. It keeps the last arm that it made, for another run of that kind."""

    def __init__(self, options: argparse.Namespace, text: Text) -> None:
        self.options, self.text = options, text
        self.arm_of = functools.lru_cache(maxsize=1)(self._make)

    def _make(self, kind: str) -> Arm:
        return KINDS[kind].make(self.options.model, self.text.calibration.to(DEVICE))

    def __call__(self, run: Run) -> dict[str, Any]:
        return self.measure(self.arm_of(run.kind), run)

    def measure(self, arm: Arm, run: Run) -> dict[str, Any]:
        start = time.monotonic()
        if run.setting is not None:
            arm.reset()
            self.train(arm, run.setting, run.seed)
        found = self.evaluate(arm)
        return found | {"seconds": round(time.monotonic() - start, 1)}

    def train(self, arm: Arm, setting: Setting, seed: int) -> None:
        config = OptimConfig(lr=setting.rate, warmup_steps=WARMUP_STEPS, min_lr_ratio=0.0)
        optimizer, schedule = build_optimizer(arm.model, config, self.options.steps)
        arm.distillation.hidden = setting.hidden
        arm.model.train()
        for step, input_ids in enumerate(self.text.batches(self.options.batch, seed), start=1):
            loss, _ = arm.loss(input_ids)
            loss.backward()
            nn.utils.clip_grad_norm_(arm.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            arm.follow(step)

    @torch.no_grad()
    def evaluate(self, arm: Arm) -> dict[str, float]:
        """KL to the bf16 model, and the share of positions with its most likely token, under every serving."""
        arm.model.eval()
        found: dict[str, float] = {}
        for serving in SERVINGS:
            totals = dict.fromkeys(("kl", "top1_agreement"), 0.0)
            with arm.serving(serving):
                for rows in self.text.held_out.split(self.options.batch):
                    _, metrics = arm.loss(rows.to(DEVICE))
                    for name in totals:
                        totals[name] += metrics[name].item() * len(rows) / len(self.text.held_out)
            found |= {f"{name} {serving}": total for name, total in totals.items()}
        return found


class Results:
    """Lines of a file: a run, what was measured, and where."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.results
        self.setup = {name: getattr(options, name) for name in ("steps", "batch", "length", "held_out", "calibration")}

    def rows(self) -> dict[Run, dict[str, Any]]:
        lines = map(json.loads, self.path.read_text().splitlines() if self.path.exists() else [])
        return {self._run(row): row for row in lines if row["setup"] == self.setup}

    def add(self, run: Run, **found: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(run._asdict() | found | {"setup": self.setup}) + "\n")

    @staticmethod
    def _run(row: dict[str, Any]) -> Run:
        return Run(row["kind"], row["seed"], None if row["setting"] is None else Setting(*row["setting"]))

    def missing(self, kind: str, seeds: list[int]) -> list[Run]:
        """The runs of a kind that can be made now."""
        rows, (first, *others) = self.rows(), seeds
        settings = KINDS[kind].settings
        runs = [Run(kind, first, setting) for setting in settings] or [Run(kind, first)]
        if settings and all(run in rows for run in runs):
            column = f"kl {kind.split()[-1]}"
            best = min(runs, key=lambda run: rows[run][column])
            runs = [best._replace(seed=seed) for seed in others]
        return [run for run in runs if run not in rows]


def measure(options: argparse.Namespace, results: Results, worker: type[Worker] = Worker) -> list[Run]:
    """Make what is missing. A device that is free takes another run of the kind that it has made, if there is one.

    `worker` makes the runs. Returns the runs that failed.
    """
    deadline = time.monotonic() + 60 * options.minutes
    text = read_text(options)
    context = multiprocessing.get_context("spawn")
    devices = range(max(1, torch.cuda.device_count()))
    pools = {device: ProcessPoolExecutor(1, context, start_worker, (device, options, text, worker)) for device in devices}
    made: dict[int, str] = {}
    failed: list[Run] = []
    running: dict[Future[dict[str, Any]], tuple[int, Run]] = {}
    while True:
        for device in devices:
            busy = dict(running.values())
            begun = [*busy.values(), *failed]
            runs = [run for kind in options.arms for run in results.missing(kind, options.seeds) if run not in begun]
            if device in busy or not runs or time.monotonic() > deadline:
                continue
            taken = {kind for other, kind in made.items() if other != device}
            run = min(runs, key=lambda run: (run.kind != made.get(device), run.kind in taken))
            made[device] = run.kind
            running[pools[device].submit(make_run, run)] = device, run
        if not running:
            break
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            _, run = running.pop(done)
            if error := done.exception():
                failed.append(run)
                traceback.print_exception(error)
            else:
                results.add(run, **done.result())
            print(f"{run}: {error or done.result()}", flush=True)
    for pool in pools.values():
        pool.shutdown()
    return failed


_worker: Worker


def start_worker(device: int, options: argparse.Namespace, text: Text, worker: type[Worker]) -> None:
    global _worker
    if DEVICE.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    _worker = worker(options, text)


def make_run(run: Run) -> dict[str, Any]:
    return _worker(run) | {"host": host()}


def host() -> str:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    packages = ["torch", "transformers", *(["nvidia-modelopt"] if peers.has_model_optimizer() else [])]
    return ", ".join([device, *(f"{name} {version(name)}" for name in packages)])


def table(results: Results) -> Iterator[str]:
    columns = [f"{metric} {serving}" for serving in SERVINGS for metric in ("kl", "top1_agreement")]
    yield f"| {' | '.join(['arm', 'rate', 'hidden', 'seeds', *columns])} |"
    yield "| --- " * (4 + len(columns)) + "|"
    rows = results.rows()
    for kind, setting in sorted({(run.kind, run.setting or Setting(0.0)) for run in rows}):
        same = [row for run, row in rows.items() if run.kind == kind and (run.setting or Setting(0.0)) == setting]
        cells = [spread([row[column] for row in same]) for column in columns]
        yield f"| {' | '.join([kind, *(f'{value:g}' for value in setting), str(len(same)), *cells])} |"


def spread(values: list[float]) -> str:
    """The mean and, of several, half the range."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"


def parser_of(description: str | None, kinds: Collection[str]) -> argparse.ArgumentParser:
    """What a measurement of such kinds of arms is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--results", required=True, type=Path, help="a file of JSON lines that results are added to")
    parser.add_argument("--text", type=Path, help="a file to keep the token ids in; reading all packages takes a minute")
    parser.add_argument("--arms", nargs="+", choices=kinds, help="default: all that can run here")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after this time")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--calibration", type=int, default=64, help="sequences")
    parser.add_argument("--held-out", type=int, default=96, help="sequences")
    return parser


def main() -> None:
    options = parser_of(__doc__, KINDS).parse_args()
    has_peer = peers.has_model_optimizer() and DEVICE.type == "cuda"
    options.arms = options.arms or [name for name in KINDS if has_peer or not name.startswith("modelopt")]
    results = Results(options)
    failed = measure(options, results)
    print(f"\n{host()}; {' '.join(sys.argv)}\n")
    print("\n".join(table(results)))
    if failed:
        sys.exit(f"failed: {'; '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
