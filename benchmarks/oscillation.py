"""Whether resetting or freezing weights that oscillate helps: KL on held-out text after QAD with and without, by seed.

    python benchmarks/oscillation.py --model FOLDER --results FILE [--text FILE] [--arms NAME ...] [--seeds 0 1 2] [--minutes M]

Model, text, batches, schedule and evaluation are those of `accuracy.py`, W4A16 and W4A4 each at the best rate found there. An arm is
what `callbacks.oscillation` does in the last 30 % of the steps: none, reset or freeze. Until then runs of one seed differ by the order
of floating-point sums on a GPU alone.

Runs are shared out to all GPUs. Each result is a line of FILE and is not measured again, so the same command continues where an
earlier one, or its --minutes, ended. The tables of all lines come last.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import accuracy
from accuracy import Run, Setting
from torch import Tensor

from nvfp4_train.quant.oscillation import Oscillation, OscillationRule, OscillationShares
from nvfp4_train.quant.policy import SERVINGS

ACTIONS = {"none": None, "reset": "reset", "freeze": "freeze"}


class Trained(NamedTuple):
    """What a model is trained for."""

    activations: str
    setting: Setting


TRAINED = {"w4a16": Trained("none", Setting(1.5e-4, 1.0)), "w4a4": Trained("nvfp4", Setting(2.5e-4, 1.0))}
ARMS = [f"{trained} {action}" for trained in TRAINED for action in ACTIONS]


class Controlled(accuracy.Ours):
    """An arm whose oscillation is watched from one window before the control begins, and controlled from there on."""

    def __init__(self, options: argparse.Namespace, calibration: Tensor, trained: Trained) -> None:
        super().__init__(options.model, calibration, rule="hessian", activations=trained.activations)
        assert self.module.store is not None
        self.store = self.module.store
        self.module.keep_history()
        # With the history in it.
        self._start = accuracy.copied(self.module)
        self.options = options
        self.first_step = first_step(options)
        self.begin(None)

    def begin(self, action: str | None) -> None:
        """A run, whose control does `action`."""
        self.action = action
        # The windows before the control are counted and left alone.
        self._oscillation = self._rule_of(None)
        self.before: OscillationShares | None = None
        self.windows: list[OscillationShares] = []

    def _rule_of(self, action: str | None) -> Oscillation:
        rule = OscillationRule(
            action=action, every_n_steps=self.options.every_n_steps, min_reversals=self.options.min_reversals
        )
        return Oscillation(self.store, rule)

    def follow(self, step: int) -> None:
        # As the callback does, with the codes of the step before.
        if step - 1 >= self.first_step - self.options.every_n_steps:
            found = self._oscillation.follow(step - 1)
            if step - 1 == self.first_step:
                self.before, self._oscillation = found, self._rule_of(self.action)
                self._oscillation.follow(step - 1)
            elif found is not None:
                self.windows.append(found)
        super().follow(step)

    def found(self) -> dict[str, Any]:
        """Flips a step, as shares of all weights, before the control and after its last action; and the shares that it acted on."""
        assert self.before is not None
        num_left = self.options.steps - 1 - self.first_step - len(self.windows) * self.options.every_n_steps
        rest = self._oscillation.shares()
        return {
            "flips before": self.before.flips / self.options.every_n_steps,
            "flips after": rest.flips / max(1, num_left),
            "acted on": [window.acted_on for window in self.windows],
            "frozen": max((window.frozen for window in self.windows), default=0.0),
        }


class Worker(accuracy.Worker):
    """Keeps the model of a serving for all that is done to it."""

    def _make(self, trained: str) -> Controlled:
        return Controlled(self.options, self.text.calibration.to(accuracy.DEVICE), TRAINED[trained])

    def __call__(self, run: Run) -> dict[str, Any]:
        trained, action = run.kind.split()
        arm = self.arm_of(trained)
        assert isinstance(arm, Controlled)
        arm.begin(ACTIONS[action])
        return self.measure(arm, run) | arm.found()


class Results(accuracy.Results):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.setup |= {name: getattr(options, name) for name in ("from_share", "every_n_steps", "min_reversals")}

    def missing(self, kind: str, seeds: list[int]) -> list[Run]:
        rows = self.rows()
        runs = [Run(kind, seed, TRAINED[kind.split()[0]].setting) for seed in seeds]
        return [run for run in runs if run not in rows]


def tables(results: Results) -> Iterator[str]:
    """Means and half ranges over seeds; and the KL of the serving that is trained less that without control, seed by seed."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in ARMS}
    for run, row in results.rows().items():
        by_arm[run.kind][run.seed] = row
    columns = [f"{metric} {serving}" for serving in SERVINGS for metric in ("kl", "top1_agreement")]
    percent = ["flips before", "flips after"]
    yield from header("trained, control", "seeds", *columns, *(f"{name}, % a step" for name in percent), "acted on, %")
    for arm, rows in by_arm.items():
        if rows:
            shown = [accuracy.spread([row[column] for row in rows.values()]) for column in columns]
            shown += [accuracy.spread([100 * row[column] for row in rows.values()]) for column in percent]
            shown.append(accuracy.spread([100 * sum(row["acted on"]) for row in rows.values()]))
            yield f"| {' | '.join([arm, str(len(rows)), *shown])} |"
    yield ""
    yield from header("trained, control", "seed", "KL less that without", "relative", "same token less that without")
    for arm, rows in by_arm.items():
        trained, action = arm.split()
        for seed in sorted(rows.keys() & by_arm[f"{trained} none"].keys()) if action != "none" else ():
            ours, none = rows[seed], by_arm[f"{trained} none"][seed]
            kl, plain = ours[f"kl {trained}"], none[f"kl {trained}"]
            token = ours[f"top1_agreement {trained}"] - none[f"top1_agreement {trained}"]
            yield f"| {arm} | {seed} | {kl - plain:+.5f} | {100 * (kl / plain - 1):+.2f} % | {100 * token:+.2f} % |"


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = accuracy.parser_of(__doc__, ARMS)
    parser.add_argument("--from-share", type=float, default=0.7, help="of the steps, before the control begins")
    parser.add_argument("--every-n-steps", type=int, default=25, help="between two actions")
    parser.add_argument("--min-reversals", type=int, default=2, help="of a weight in between, to be acted on")
    options = parser.parse_args(arguments)
    options.arms = options.arms or ARMS
    if first_step(options) < options.every_n_steps:
        parser.error(
            f"--from-share must leave {options.every_n_steps} steps (--every-n-steps) to compare with, got {options.from_share}"
        )
    try:
        OscillationRule(action="reset", every_n_steps=options.every_n_steps, min_reversals=options.min_reversals)
    except ValueError as error:
        parser.error(str(error))
    return options


def first_step(options: argparse.Namespace) -> int:
    """The step whose codes are the first that the control sees, as `callbacks.oscillation` has it."""
    return math.ceil(options.from_share * options.steps)


def main() -> None:
    options = parse()
    results = Results(options)
    failed = accuracy.measure(options, results, Worker)
    print(f"\n{accuracy.host()}; {' '.join(sys.argv)}\n")
    print("\n".join(tables(results)))
    if failed:
        sys.exit(f"failed: {'; '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
