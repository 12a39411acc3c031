"""What a run knows of itself at its end that none of its other files say: where and how long it ran, what it took, what was checked."""

import json
import os
import platform
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from nvfp4_train.callbacks.export import Export
from nvfp4_train.callbacks.run_facts import run_facts
from nvfp4_train.callbacks.run_summary import peak_memory
from nvfp4_train.callbacks.served_check import ServedCheck
from nvfp4_train.export.card import installed_versions, serve_commands
from nvfp4_train.export.writer import ExportReport
from nvfp4_train.metrics import PEAK_GIB, TOKENS_PER_S
from nvfp4_train.models.served_dtype import class_of
from nvfp4_train.module import QATModule
from nvfp4_train.ranks import gather_from_ranks

FILE = "run.json"
OF_TRAINING = ("started", "ended", "first_step", "steps_s", "training")
"""What a run keeps that is continued with nothing left to train."""


def run_record(
    trainer: Trainer, pl_module: QATModule, *, command: Sequence[str], started: datetime, first_step: int, steps_s: float
) -> dict[str, Any]:
    """The content of run.json, plain data. A collective.

    Args:
        trainer: At the end of its fit, with the callbacks whose outcomes are recorded.
        pl_module: The module that was trained.
        command: What started the run, without torchrun.
        started: When the process began with it.
        first_step: The step that a resumed run continued from, else 0.
        steps_s: Seconds of training since then, without evaluations.
    """
    model, selection = pl_module.model, pl_module.selection
    assert model is not None and selection is not None
    host_bytes, device_bytes = peak_memory(pl_module.device)
    devices = gather_from_ranks((platform.node(), _name(pl_module.device)))
    facts = run_facts(trainer, pl_module)
    exports = [report for callback in trainer.callbacks if isinstance(callback, Export) for report in callback.reports]  # type: ignore[attr-defined]
    checks = [callback.outcome for callback in trainer.callbacks if isinstance(callback, ServedCheck) and callback.outcome]  # type: ignore[attr-defined]
    return {
        "command": started_by(command, ranks=len(devices), hosts=len({host for host, _ in devices})),
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": facts.base_model,
        "architecture": class_of(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "quantized_parameters": sum(model.get_parameter(name).numel() for name in selection.manifest.names),
        "method": facts.method,
        "loss": type(pl_module.loss).__name__,
        "equalization": facts.equalization,
        "start_step": facts.start_step,
        "first_step": first_step,
        "last_step": trainer.global_step,
        "tokens": facts.tokens,
        "steps_s": steps_s,
        "training": {name: pl_module.results[name] for name in (TOKENS_PER_S, PEAK_GIB) if name in pl_module.results},
        "compute_dtype": str(pl_module.compute_dtype).removeprefix("torch."),
        "trained_serving": pl_module.quant_config.trained_serving,
        "devices": dict(Counter(name for _, name in devices)),
        "ranks": len(devices),
        "strategy": type(trainer.strategy).__name__,
        "peak_host_bytes": host_bytes,
        "peak_device_bytes": device_bytes,
        "versions": {"python": platform.python_version()} | installed_versions(),
        "checks": checks,
        "exports": [_export(report) for report in exports],
    }


def earlier_times(path: Path, step: int) -> dict[str, Any]:
    """`OF_TRAINING` of an earlier run.json that ends at this step, 0 excepted. Empty where there is none, or it cannot be read."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: earlier[name] for name in OF_TRAINING if name in earlier} if step and earlier.get("last_step") == step else {}


def _export(report: ExportReport) -> dict[str, Any]:
    verified, folder = report.verified, str(report.folder)
    return {
        "folder": folder,
        "format": report.format,
        "bytes": verified.bytes,
        "matrices": report.quantized,
        "quantized_parameters": verified.quantized_parameters,
        "bits_per_quantized_weight": verified.bits_per_weight,
        "serving": "w4a4" if verified.quantizes_inputs else "w4a16",
        "checked": verified.readers(),
        "note": None if report.note is None else report.note.replace("FOLDER", shlex.quote(folder)),
        "write_s": report.write_s,
        "verify_s": report.verify_s,
        "serve": serve_commands(report.format, folder),
    }


def started_by(command: Sequence[str], *, ranks: int, hosts: int) -> str | None:
    """A line that starts the run again, under torchrun where that started it; None where nobody knows."""
    if not command:
        return None
    python, *rest = command
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([python, *rest])
    nodes = ["--nnodes", str(hosts)] if hosts > 1 else ["--standalone"]
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", str(ranks // hosts), *rest])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
