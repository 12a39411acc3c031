"""Multimodal folders on two ranks: towers take no part in training, and are checkpointed and exported all the same."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from export.export_models import read_tensors
from multimodal_models import save_multimodal
from running import ROOT, forked_python, launch, train_environment

from nvfp4_train.models.architecture import parameters_outside
from nvfp4_train.models.layout import HubLayout

STEPS = ("trainer.max_steps=2", "quant.start_step=1", "optim.lr=1e-3", "optim.weight_decay=0.1", "trainer.accelerator=cpu")
QAD = (
    "loss=distillation",
    "loss.hidden=0.5",
    "quant.rule=hessian",
    "quant.activations=nvfp4",
    "model.gradient_checkpointing=true",
)
WAYS = {
    "ddp": ("gemma3", "ddp", STEPS),
    "fsdp2": ("gemma3", "fsdp2", STEPS),
    "fsdp2, W4A4, distilled": ("qwen3_vl", "fsdp2", (*STEPS, *QAD)),
}


@pytest.mark.parametrize("way", WAYS)
def test_towers_keep_their_bytes_and_the_rest_trains(way: str, tmp_path: Path) -> None:
    model_type, trainer, options = WAYS[way]
    original, run = tmp_path / "original", tmp_path / "run"
    model = save_multimodal(original, model_type)
    output = launch(run, f"model.path={original}", f"trainer={trainer}", *options, ranks=2).stdout
    assert f"the training forward is that of the plain {type(model).__name__}" in output
    assert "in bf16: not part of the language model" in output
    before, after = read_tensors(original), read_tensors(run / "export")
    key_of, outside = HubLayout(model.config).hub_names(), parameters_outside(model)
    for name in outside:
        assert torch.equal(after[key_of[name]], before[key_of[name]]), name
    embedding = next(name for name in key_of if name.endswith("embed_tokens.weight"))
    assert not torch.equal(after[key_of[embedding]], before[key_of[embedding]])
    assert json.loads((run / "export" / "config.json").read_text())["architectures"] == [type(model).__name__]
    for file in ("preprocessor_config.json", "chat_template.jinja"):
        assert (run / "export" / file).read_bytes() == (original / file).read_bytes()
    python, server = forked_python()
    command = [python, str(ROOT / "launch" / "export.py"), str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "again")]
    subprocess.run(command, env=train_environment() | server, cwd=ROOT, check=True)
    # The card of a run tells of the run.
    for path in (path for path in (run / "export").iterdir() if path.name != "README.md"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
