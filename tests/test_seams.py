"""A scale rule, a loss, a format and a statistic are each one file of the package beside a config line.

The test adds a toy of each to a copy of the package, with not a line changed elsewhere, and runs the launcher once with all four.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, metrics, train_command, train_environment

from nvfp4_train.layer_table import read_rows

SCALE_RULE = """
# Scales a sixth of a power of two apart from 6, 5 and 4.
BLOCK_SCALE_RULES["toy"] = BlockScaleRule(factors=(1.5, 1.2, 1.0), largest=256.0)
"""
LOSS = '''
"""Cross-entropy, pulled towards a frozen copy of the original model."""

from nvfp4_train.losses.next_token import next_token_loss
from nvfp4_train.models.causal_lm import compute_logits


class ToyLoss:
    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def prepare(self, build):
        self.teacher = build(None)

    def __call__(self, model, batch):
        logits = compute_logits(model, batch["input_ids"])
        pull = (logits.float() - compute_logits(self.teacher, batch["input_ids"]).float()).square().mean()
        return next_token_loss(logits, batch["input_ids"]) + self.weight * pull, {"pull": pull.detach()}
'''
FORMAT = '''
"""compressed-tensors with the rule of the block scales in a file of its own."""

from nvfp4_train.export.formats.compressed_tensors import CompressedTensors


class Toy(CompressedTensors):
    reader = "compressed_tensors"

    def configs(self, layout, quantized, manifest):
        return super().configs(layout, quantized, manifest) | {"toy.json": {"rule": manifest.rule.block_scale}}


FORMAT = Toy()
'''
STATISTIC = '''
"""The share of weights with code 0."""

import torch

from nvfp4_train.quant.statistics import Statistic


class ZeroShare(Statistic):
    names = ("zero_code_share",)

    def local(self, weight):
        low, high = weight.codes & 7, (weight.codes >> 4) & 7
        zeros = (low == 0).sum() + (high == 0).sum()
        return torch.stack((zeros.double(), zeros.new_tensor(weight.master.numel()).double()))

    def finish(self, sums):
        return {"zero_code_share": (sums[0] / sums[1]).item()}
'''
FILES = {
    "kernels/scale_rules.py": SCALE_RULE,
    "losses/toy.py": LOSS,
    "export/formats/toy.py": FORMAT,
    "quant/zero_share.py": STATISTIC,
}
OPTIONS = (
    "quant.rule=toy",
    "loss._target_=nvfp4_train.losses.toy.ToyLoss",
    "+loss.weight=0.25",
    "callbacks.export.format=toy",
    "+callbacks.scale_stats.statistics={zero_share: {_target_: nvfp4_train.quant.zero_share.ZeroShare}}",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the launcher over a copy of the package with the four files."""
    folder = tmp_path_factory.mktemp("seams")
    shutil.copytree(ROOT / "nvfp4_train", folder / "nvfp4_train", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        with (folder / "nvfp4_train" / name).open("a") as file:
            file.write(text)
    environment = train_environment() | {"PYTHONPATH": str(folder)}
    where = subprocess.run(
        [sys.executable, "-c", "import nvfp4_train; print(nvfp4_train.__file__)"],
        env=environment, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(os.fspath(folder))
    command = train_command(
        folder / "run", "trainer.max_steps=3", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", *OPTIONS
    )
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder / "run"


def test_the_scale_rule_is_that_of_the_run_and_of_its_export(run: Path) -> None:
    assert json.loads((run / "export" / "toy.json").read_text()) == {"rule": "toy"}


def test_the_loss_trains_and_logs(run: Path) -> None:
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/pull", "val/pull"} <= set(header.split(","))


def test_the_format_is_verified_and_loads(run: Path) -> None:
    assert {"config.json", "model.safetensors", "toy.json"} <= {path.name for path in (run / "export").iterdir()}


def test_the_statistic_is_logged_for_every_layer_and_in_aggregate(run: Path) -> None:
    assert 0 < metrics(run)["quant/zero_code_share"] < 0.5
    rows = [row for row in read_rows(run / "layers.csv") if row.layer.endswith("mlp.down_proj")]
    assert len(rows) == 2
    assert all(0 < row.values["zero_code_share"] < 0.5 for row in rows)
