"""Time and peak memory of distillation: the loss alone against peers, and a training step against one of cross-entropy.

    python benchmarks/distillation.py [--steps 12] [--compiled]

First the gradients of every divergence are compared with those of whole logits in float32, the kernel's in chunks and Liger's as
well, where it is installed. Then the loss is timed from hidden states to their gradient and that of the output embedding, at the
vocabulary and width of Llama 3.2 1B: ours, Liger's fused linear JSD, and PyTorch on whole logits. Memory is the peak above inputs and
teacher. Then whole steps of `llama_1b` with quantized weights run in turns, with cross-entropy and with distillation from a teacher
of its size, which is part of its memory; random weights and tokens, device-synchronised medians, and the peak of each side alone.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import random_models
import step
import torch
import triton
from torch import Tensor, nn

from nvfp4_train.losses.chunked import Logits, ProjectedLogits, WholeLogits, mean_losses, with_gradients
from nvfp4_train.losses.distillation import DistillationLoss
from nvfp4_train.losses.divergence import DIVERGENCES, Objective, Positions
from nvfp4_train.models.causal_lm import ModelConfig, decoder_layers, load_frozen
from nvfp4_train.models.logits import LogitMap, hidden_states
from nvfp4_train.models.quirks import parameters_on_meta

TOKENS, VOCABULARY, WIDTH = 8192, 128256, 2048
TARGET = 1.36
"""Largest ratio of a step of distillation to one of cross-entropy."""
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""What Liger calls the divergences."""


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


class Problem:
    """Hidden states and output embeddings of a student and of a teacher, bf16."""

    def __init__(self, tokens: int, vocabulary: int, width: int, *, trains_head: bool = True, masked: bool = False) -> None:
        torch.manual_seed(0)
        # Logits have a standard deviation of 3; the teacher's differ by a tenth of that.
        self.hidden = torch.randn(tokens, width, device="cuda").bfloat16()
        self.weight = (torch.randn(vocabulary, width, device="cuda") * 3 / width**0.5).bfloat16()
        self.teacher_hidden = (self.hidden + 0.1 * torch.randn_like(self.hidden)).detach()
        self.teacher_weight = self.weight.clone()
        self.hidden.requires_grad_()
        self.weight.requires_grad_(trains_head)
        batch = {"input_ids": torch.randint(0, vocabulary, (2, tokens // 2), device="cuda")}
        if masked:
            batch["loss_mask"] = torch.rand(2, tokens // 2, device="cuda") < 0.5
        self.positions = Positions.of(batch)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [x for x in (self.hidden, self.weight) if x.requires_grad]))


def ours(problem: Problem, objective: Objective, *, whole: bool = False, num_rows: int | None = None) -> Tensor:
    """Loss by the kernel; with `whole`, from bf16 logits of all positions."""
    student: Logits = ProjectedLogits(problem.hidden, problem.weight, None)
    teacher: Logits = ProjectedLogits(problem.teacher_hidden, problem.teacher_weight, None)
    if whole:
        student = WholeLogits(problem.hidden @ problem.weight.T)
        teacher = WholeLogits(problem.teacher_hidden @ problem.teacher_weight.T)
    found = mean_losses(student, teacher, problem.positions, objective, num_rows=num_rows)
    return with_gradients(objective.mix(found["divergence"], found["cross_entropy"]), student)


def liger(problem: Problem, objective: Objective) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    loss = LigerFusedLinearJSDFunction.apply(
        problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, None, BETA[objective.divergence], -100,
        objective.temperature, torch.float32,
    )  # fmt: skip
    return objective.temperature**2 * loss


def in_pytorch(problem: Problem, objective: Objective, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """On logits of all positions, products in `dtype`."""
    temperature, positions = objective.temperature, problem.positions
    x = objective.student_map((problem.hidden.to(dtype) @ problem.weight.to(dtype).T).float())
    with torch.no_grad():
        y = objective.teacher_map((problem.teacher_hidden.to(dtype) @ problem.teacher_weight.to(dtype).T).float())
        log_p = torch.log_softmax(y / temperature, -1)
        del y
    log_q = torch.log_softmax(x / temperature, -1)
    if objective.divergence == "forward_kl":
        values = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif objective.divergence == "reverse_kl":
        values = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log().item()
        values = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
    divergence = temperature**2 * (positions.weights * values).sum()
    if not objective.cross_entropy:
        return divergence
    losses = nn.functional.cross_entropy(x, positions.targets, reduction="none")
    return objective.mix(divergence, (positions.target_weights * losses).sum())


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def check() -> None:
    """Gradients against whole logits in float32. What is left is the rounding of the gradient by logits, and of results, to bf16."""
    torch.set_float32_matmul_precision("highest")
    objectives = [
        Objective(divergence=divergence, temperature=temperature, cross_entropy=cross_entropy)
        for divergence, temperature, cross_entropy in itertools.product(DIVERGENCES, (1.0, 2.0), (0.0, 0.25))
    ]
    objectives.append(Objective(cross_entropy=0.25, student_map=LogitMap(0.5, 6.0), teacher_map=LogitMap(1.0, 30.0)))
    largest: dict[str, float] = {}
    for objective, (vocabulary, masked) in itertools.product(objectives, ((32000, False), (32000, True), (50257, True))):
        problem = Problem(1024, vocabulary, 512, masked=masked)
        exact = in_pytorch(problem, objective, dtype=torch.float32)
        expected = problem.gradients(exact)
        sides: dict[str, Callable[[], Tensor]] = {
            "ours": partial(ours, problem, objective, num_rows=384),
            "ours, of whole bf16 logits": partial(ours, problem, objective, whole=True),
        }
        if has_liger() and not masked and not objective.cross_entropy:
            sides["Liger"] = partial(liger, problem, objective)
        for side, make in sides.items():
            loss = make()
            # The loss itself is a sum over the vocabulary of products that nearly cancel.
            found = [abs(loss.item() / exact.item() - 1), *map(distance, problem.gradients(loss), expected)]
            largest[side] = max(largest.get(side, 0.0), *found)
    print("largest relative error of a loss or gradient:", ", ".join(f"{side} {error:.1e}" for side, error in largest.items()))
    assert largest["ours"] < 1e-2, largest
    # Logits of 8 to 16 have a rounding of 1/32.
    assert largest["ours, of whole bf16 logits"] < 0.25, largest


def losses(trains_head: bool) -> Iterator[tuple[str, float, float]]:
    """Side, milliseconds and peak GiB."""
    torch.set_float32_matmul_precision("high")
    problem = Problem(TOKENS, VOCABULARY, WIDTH, trains_head=trains_head)
    sides: dict[str, Callable[[], Tensor]] = {
        f"ours, {name}": partial(ours, problem, Objective(divergence=name)) for name in BETA
    }
    sides["ours, forward_kl and cross-entropy"] = partial(ours, problem, Objective(temperature=2.0, cross_entropy=0.25))
    for num_rows in (384, 1024):
        sides[f"ours, forward_kl, chunks of {num_rows}"] = partial(ours, problem, Objective(), num_rows=num_rows)
    if has_liger():
        sides |= {f"Liger, {name}": partial(liger, problem, Objective(divergence=name)) for name in BETA}
    sides["PyTorch, forward_kl of whole logits"] = partial(in_pytorch, problem, Objective())
    for side, make in sides.items():
        try:
            problem.gradients(make())
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            problem.gradients(make())
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            yield side, statistics.median(timed(lambda m=make: problem.gradients(m())) for _ in range(8)), peak
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield side, float("nan"), float("nan")


def timed(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Distillation(step.Run):
    """A step with a teacher of the student's size, of other random weights."""

    def start(self, model: nn.Module, config: dict[str, Any], batch: tuple[int, int]) -> None:
        super().start(model, config, batch)
        with parameters_on_meta():
            teacher = load_frozen(ModelConfig(config=config))
        random_models.fill(teacher, "cuda", seed=1)
        for layer in decoder_layers(teacher) if self.module.model_config.compile else ():
            layer.compile()
        self.distillation = DistillationLoss()
        self.distillation.teacher = teacher

    def loss(self) -> Tensor:
        return self.distillation(self.model, {"input_ids": self.input_ids})[0]

    @torch.no_grad()
    def timed_teacher(self) -> float:
        assert self.distillation.teacher is not None
        return timed(lambda: hidden_states(self.distillation.teacher, self.input_ids))


def steps(num_steps: int, *, compiled: bool) -> None:
    name = "llama_1b"
    classes = {"cross-entropy": step.Run, "distillation": Distillation}
    sides = {side: partial(cls, name, quantized=True, compiled=compiled) for side, cls in classes.items()}
    memory = {side: step.peak_memory(make) for side, make in sides.items()}
    runs = {side: make() for side, make in sides.items()}
    for run in runs.values():
        for _ in range(4):
            run.step()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(num_steps):
        for side, run in runs.items():
            times[side].append(run.timed_step())
    teacher = statistics.median(runs["distillation"].timed_teacher() for _ in range(num_steps))
    medians = {side: statistics.median(found) for side, found in times.items()}
    mode = "compiled" if compiled else "eager"
    for side in sides:
        ratio = medians[side] / medians["cross-entropy"]
        print(f"{name + ', ' + mode:<20}{side:<24}{medians[side]:>10.2f} ms{ratio:>8.3f}{memory[side]:>10.3f} GiB", flush=True)
    print(f"{name + ', ' + mode:<20}{'body of the teacher':<24}{teacher:>10.2f} ms")
    is_met = medians["distillation"] / medians["cross-entropy"] <= TARGET
    print(f"target: at most {TARGET} times a step of cross-entropy: {'met' if is_met else 'missed'}")
    runs.clear()
    step.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compiled", action="store_true", help="time compiled steps, too; to compile takes a minute")
    arguments = parser.parse_args()
    version = importlib.metadata.version("liger-kernel") if has_liger() else "not installed"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, Liger {version}")
    check()
    for trains_head in (False, True):
        print(
            f"loss of {TOKENS} tokens, {VOCABULARY} logits, width {WIDTH}; the head is {'trained' if trains_head else 'frozen'}"
        )
        for side, ms, gib in losses(trains_head):
            print(f"    {side:<44}{ms:>10.2f} ms{gib:>10.3f} GiB", flush=True)
        torch.cuda.empty_cache()
    for compiled in (False, True) if arguments.compiled else (False,):
        steps(arguments.steps, compiled=compiled)


if __name__ == "__main__":
    main()
