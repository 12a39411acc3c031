"""A model, a corpus of conversations with masks, and a run that has distilled the model on it, made once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_data import conversation, write_jsonl
from judged_models import save_model
from running import ROOT

from nvfp4_train.run.build import build
from nvfp4_train.run.compose import compose_options
from nvfp4_train.run.evaluation import run_evaluation


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "original")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of conversations, of which only what the assistant writes counts, that do not see each other."""
    rows = [{"messages": conversation(i, turns=1, answer="it is " * (1 + i % 5))} for i in range(60)]
    file = write_jsonl(tmp_path_factory.mktemp("chat") / "chat.jsonl", rows)
    return [
        f"data.path={file}",
        "data.seq_len=128",
        "data.batch_size=2",
        "data.val_fraction=0.3",
        "data.isolate_documents=true",
        "quant.calibration.sequences=4",
    ]


@pytest.fixture(scope="session")
def run(original: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in W4A4, with exports in both formats."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    steps = ["loss=distillation", "quant.activations=nvfp4", "optim.lr=1e-3", "trainer.max_steps=3", "logger=none"]
    both = ["callbacks.export.format=both", "trainer.enable_progress_bar=false"]
    options, _ = compose_options(ROOT, [f"model.path={original}", *data, *steps, *both, f"run_dir={run_dir}"])
    trainer, module, text = build(options)
    trainer.fit(module, text)
    return run_dir


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The launcher in this process: exit code, and results, which are empty where it has written none."""

    def call(*arguments: str) -> tuple[int, dict[str, Any]]:
        output = tmp_path / "evaluation.json"
        output.unlink(missing_ok=True)
        code = run_evaluation(ROOT, [*arguments, f"output={output}", "device=cpu"])
        # It is of its process, which other tests share.
        torch.set_float32_matmul_precision("highest")
        return code, json.loads(output.read_text()) if output.exists() else {}

    return call
