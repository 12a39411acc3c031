"""The files of a run folder, as far as they are there."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nvfp4_train.layer_table import LayerRow, read_rows
from nvfp4_train.metrics import MASTER, PTQ, QUANTIZED
from nvfp4_train.sequence_metrics import SequenceMetrics

History = Mapping[str, list[tuple[int, float]]]
"""Points (step, value) of a metric by its name, in the order of the steps."""

EVALUATION = re.compile(rf"_({MASTER}|{PTQ}|{QUANTIZED})(_|$)")
"""In the name of a metric of weights in a state, which is no validation on the way."""

NEEDED = {
    "architecture", "devices", "ended", "exports", "first_step", "last_step", "parameters", "peak_device_bytes", "peak_host_bytes",
    "quantized_parameters", "ranks", "started", "steps_s", "strategy",
}  # fmt: skip
"""What a report reads of run.json without asking whether it is there."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What is missing is empty."""

    run_dir: Path
    metrics: Mapping[str, Any]
    """metrics.json: final numbers."""
    history: History
    """metrics.csv, without the statistics of single layers; validations are by the number of steps done."""
    sequences: Mapping[str, SequenceMetrics]
    """sequences.json, by `metrics.evaluated_state`."""
    layers: Mapping[str, Mapping[str, float]]
    """Statistics by layer and name: of the layers at the last look of layers.csv, the last known value of each."""
    looks: Mapping[int, frozenset[str]]
    """Which statistics layers.csv has, by the step of the look."""
    saved_step: int
    """The highest step of a checkpoint's name; 0 where there is none."""
    config: Mapping[str, Any]
    """.hydra/config.yaml: the options."""
    record: Mapping[str, Any]
    """run.json, see `callbacks.run_record`."""

    @staticmethod
    def read(run_dir: Path) -> "RunFiles":
        """Raises ValueError where the folder is not that of a run, and where a file of it is damaged."""
        options = run_dir / ".hydra" / "config.yaml"
        with _reading(options):
            config = yaml.safe_load(options.read_text()) if options.exists() else {}
        metrics = _json(run_dir / "metrics.json")
        with _reading(run_dir / "metrics.json"):
            _check_numbers({name: value for name, value in metrics.items() if name != "validations"})
            validations = _validations(metrics)
        if not config and not metrics:
            raise ValueError(
                f"RUN_DIR must be the folder of a run, with metrics.json or {options.relative_to(run_dir)}, got {run_dir}"
            )
        table = run_dir / "layers.csv"
        with _reading(table):
            rows = read_rows(table) if table.exists() else []
        saved = _json(run_dir / "sequences.json")
        with _reading(run_dir / "sequences.json"):
            sequences = {state: SequenceMetrics.from_dict(of_state) for state, of_state in saved.items()}
        record = _json(run_dir / "run.json")
        with _reading(run_dir / "run.json"):
            if record and (missing := sorted(NEEDED - record.keys())):
                raise ValueError(f"must have {', '.join(missing)}")
        return RunFiles(
            run_dir=run_dir,
            metrics=metrics,
            history=_with_validations(read_history(run_dir), validations),
            sequences=sequences,
            layers=_latest(rows),
            looks=_looks(rows),
            saved_step=max(
                (int(step) for path in _checkpoints(run_dir) for step in re.findall(r"step[-=](\d+)", path.name)), default=0
            ),
            config=config,
            record=record,
        )

    def option(self, name: str, default: Any = None) -> Any:
        """An option by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def finished_step(self) -> int | None:
        """The step at which the run has ended; None where it has not."""
        step = self.metrics.get("step", self.record.get("last_step"))
        return None if step is None else int(step)

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as any file tells."""
        # That of a training loss is the number of steps before it.
        losses = [step + 1 for step, _ in self.history.get("train/loss", [])]
        return max(self.finished_step or 0, self.saved_step, *self.looks, *losses, 0)

    @property
    def is_finished(self) -> bool:
        return self.finished_step == self.step

    @property
    def layers_step(self) -> int:
        """The step of the last look at the layers."""
        return max(self.looks, default=0)

    def look_of(self, statistic: str) -> int:
        """The step of the last look that measured a statistic: some are not measured at each."""
        return max((step for step, names in self.looks.items() if statistic in names), default=0)

    @property
    def start_step(self) -> int | None:
        """From which step on the weights were quantized; None where they were not before the end."""
        start = int(self.option("quant.start_step", 0))
        return start if self.option("quant.enabled", True) and self.step > start else None


def read_history(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.csv and the numbered ones of earlier processes of the run have, without statistics of single layers.

    A process that continues from an earlier step takes the place of what was logged after that step.
    """
    points: dict[str, dict[int, float]] = {}
    for path in sorted(run_dir.glob("metrics*.csv"), key=_number):
        of_file: dict[str, dict[int, float]] = {}
        with _reading(path):
            # The last line of a process that was killed may be cut.
            text = path.read_text()
            reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
            header = next(reader, [])
            if "step" not in header:
                continue
            at_step = header.index("step")
            wanted = {at: name for at, name in enumerate(header) if name.count("/") == 1}
            for row in reader:
                if len(row) < len(header):
                    continue
                for at, name in wanted.items():
                    if row[at] and math.isfinite(value := float(row[at])):
                        of_file.setdefault(name, {})[int(float(row[at_step]))] = value
        first = min((step for of_name in of_file.values() for step in of_name), default=0)
        for of_name in points.values():
            for step in [step for step in of_name if step > first]:
                del of_name[step]
        for name, found in of_file.items():
            points.setdefault(name, {}).update(found)
    return {name: sorted(found.items()) for name, found in points.items() if found}


def _validations(metrics: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Those that metrics.json lists, by the number of steps done."""
    points: dict[str, list[tuple[int, float]]] = {}
    for found in metrics.get("validations", []):
        _check_numbers(found)
        for name in found.keys() - {"step"}:
            if math.isfinite(found[name]):
                points.setdefault(name, []).append((int(found["step"]), found[name]))
    return points


def _with_validations(history: History, validations: History) -> History:
    """The history with the validations of metrics.json, and those of metrics.csv after them, which a run has that was stopped."""
    last = max((points[-1][0] for points in validations.values()), default=0)
    merged = dict(history)
    for name, points in history.items():
        if name.startswith("val/") and not EVALUATION.search(name):
            # metrics.csv has the number of the last step, from 0.
            of_csv = [(step + 1, value) for step, value in points if step + 1 > last]
            merged[name] = [*validations.get(name, []), *of_csv]
    return {name: points for name, points in (dict(validations) | merged).items() if points}


def _latest(rows: list[LayerRow]) -> dict[str, dict[str, float]]:
    last = max((row.step for row in rows), default=0)
    found: dict[str, dict[str, float]] = {row.layer: {} for row in rows if row.step == last}
    for row in rows:
        if row.layer in found:
            found[row.layer] |= row.values
    return found


def _looks(rows: list[LayerRow]) -> dict[int, frozenset[str]]:
    found: dict[int, frozenset[str]] = {}
    for row in rows:
        found[row.step] = found.get(row.step, frozenset()) | row.values.keys()
    return found


def _checkpoints(run_dir: Path) -> Iterator[Path]:
    return (run_dir / "checkpoints").glob("*.ckpt")


def _number(path: Path) -> float:
    found = re.fullmatch(r"metrics\.(\d+)\.csv", path.name)
    return int(found[1]) if found else math.inf


def _json(path: Path) -> dict[str, Any]:
    with _reading(path):
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError(f"must be an object, got {found!r:.80}")
        return found


def _check_numbers(found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r:.80}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with what a file holds becomes a ValueError that names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
