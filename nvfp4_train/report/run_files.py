"""The files of a run folder, as far as they are there."""

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nvfp4_train.layer_table import read_rows
from nvfp4_train.sequence_metrics import SequenceMetrics

History = Mapping[str, list[tuple[int, float]]]
"""Points (step, value) of a metric by its name, in the order of the steps."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What is missing is empty."""

    run_dir: Path
    metrics: Mapping[str, Any]
    """metrics.json: final numbers."""
    history: History
    """metrics.csv, without the statistics of single layers, and the validations of metrics.json."""
    sequences: Mapping[str, SequenceMetrics]
    """sequences.json, by `metrics.evaluated_state`."""
    layers: Mapping[str, Mapping[str, float]]
    """Statistics by layer and name at the last look of layers.csv."""
    layers_step: int
    """The step of that look."""
    config: Mapping[str, Any]
    """.hydra/config.yaml: the options."""
    record: Mapping[str, Any]
    """run.json, see `callbacks.run_record`."""

    @staticmethod
    def read(run_dir: Path) -> "RunFiles":
        """Raises ValueError where the folder is not that of a run."""
        options = run_dir / ".hydra" / "config.yaml"
        config = yaml.safe_load(options.read_text()) if options.exists() else {}
        metrics = _json(run_dir / "metrics.json")
        if not config and not metrics:
            raise ValueError(
                f"RUN_DIR must be the folder of a run, with metrics.json or {options.relative_to(run_dir)}, got {run_dir}"
            )
        table = run_dir / "layers.csv"
        rows = read_rows(table) if table.exists() else []
        last = max((row.step for row in rows), default=0)
        return RunFiles(
            run_dir=run_dir,
            metrics=metrics,
            history=read_history(run_dir) | _validations(metrics),
            sequences={state: SequenceMetrics.from_dict(saved) for state, saved in _json(run_dir / "sequences.json").items()},
            layers={row.layer: row.values for row in rows if row.step == last},
            layers_step=last,
            config=config,
            record=_json(run_dir / "run.json"),
        )

    def option(self, name: str, default: Any = None) -> Any:
        """An option by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def step(self) -> int:
        return int(self.metrics.get("step", self.record.get("last_step", 0)))

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
        with path.open(newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if "step" not in header:
                continue
            at_step = header.index("step")
            wanted = {at: name for at, name in enumerate(header) if name.count("/") == 1}
            for row in reader:
                # The last line of a process that was killed may be cut.
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
    """Those that metrics.json lists, by the number of steps done; metrics.csv has the number of the last step, from 0."""
    points: dict[str, list[tuple[int, float]]] = {}
    for found in metrics.get("validations", []):
        for name in found.keys() - {"step"}:
            if not math.isfinite(found[name]):
                continue
            points.setdefault(name, []).append((int(found["step"]), found[name]))
    return points


def _number(path: Path) -> float:
    found = re.fullmatch(r"metrics\.(\d+)\.csv", path.name)
    return int(found[1]) if found else math.inf


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
