"""The README's commands do what it says. The quickstart runs whole, as a newcomer would run it, after the installation."""

import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import ROOT, launch, load_checkpoint, metrics
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig
from nvfp4_train.quant.policy import QuantConfig


def readme_commands() -> list[str]:
    return re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the README's first command, run in this environment instead of a new one."""
    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    *_, script = readme_commands()[0].split(" && ")
    interpreter, launcher, *arguments = shlex.split(script)
    assert (interpreter, launcher) == (".venv/bin/python", "launch/train.py")
    start = time.monotonic()
    # The other core has tests of its own, for which two threads would wait.
    launch(run_dir, *arguments, small=False, threads=1)
    assert time.monotonic() - start < 240, "under four minutes on one core, so on two as well"
    return run_dir


def test_readme_has_two_commands_of_one_line() -> None:
    commands = readme_commands()
    assert len(commands) == 2
    for command, packages in zip(commands, ("-e .", "-e '.[test]'"), strict=True):
        assert "\n" not in command
        assert command.startswith(f"python3 -m venv .venv && .venv/bin/pip install {packages} && .venv/bin/python ")


def test_ci_runs_the_readmes_test_command(tmp_path: Path) -> None:
    """The installations are replaced by a `python3` that only says how it was called, and an `apt-get` that does nothing."""
    (tmp_path / "python3").write_text('#!/bin/sh\necho "called: $*"\nexit 3\n')
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "apt-get").symlink_to("/bin/true")
    result = subprocess.run(
        ["bash", ROOT / ".ci" / "run"], capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    assert result.returncode == 3
    assert readme_commands()[1] in result.stdout
    assert "called: -m venv .venv" in result.stdout


def test_quickstart_regains_what_quantization_costs(quickstart: Path) -> None:
    found = metrics(quickstart)
    assert abs(found["val/loss_quantized"] - found["val/loss_master"]) <= 0.02
    assert found["val/loss_quantized"] <= found["val/loss_ptq"]
    assert found["val/loss_quantized"] < math.log(256) / 2, "the model has learnt"
    assert 18 < found["quant/sqnr_db"] < 23
    assert found["train/tokens_per_s"] > 0
    assert found["export/bits_per_quantized_weight"] == pytest.approx(4.5, abs=0.01)


def test_the_example_for_a_repl_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x = torch.randn(8, 16)
    before = model[0].weight.detach().clone()
    names = {
        "model": model,
        "x": x,
        "loss": lambda y: y.square().mean(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(example, names)
    assert not torch.equal(model[0].weight, before)
    assert names["store"].names == ["0.weight", "2.weight"]


def test_quickstart_leaves_the_files_that_the_readme_lists(quickstart: Path) -> None:
    _, _, table = (ROOT / "README.md").read_text().partition("A run writes")
    rows = re.findall(r"^\| (`.*?`) \|", table.partition("##")[0], re.M)
    listed = {name for row in rows for name in re.findall("`(.*?)/?`", row)}
    assert {"export", "checkpoints", "metrics.json", "metrics.csv", "wandb", ".hydra"} <= listed
    assert {path.name for path in quickstart.iterdir()} == listed
    assert load_checkpoint(quickstart / "checkpoints" / "last.ckpt")["global_step"] == metrics(quickstart)["step"]


def training_model(run_dir: Path) -> QATModule:
    """The module of a run as it was after its last step."""
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    config = checkpoint["hyper_parameters"]["export"]["config"]
    fields = AutoConfig.for_model(**config).to_diff_dict() | {"model_type": config["model_type"]}
    known = {name: value for name, value in fields.items() if name not in ("transformers_version", "architectures", "dtype")}
    # As the exported model computes; where bf16 is slow the run itself computed in float32, with the same weights.
    model = ModelConfig(config=known, compute_dtype="bfloat16")
    module = QATModule(model=model, quant=QuantConfig(), optim=OptimConfig())
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    module.store.update()
    return module.eval()


@torch.no_grad()
def test_exported_model_gives_the_training_models_logits(quickstart: Path) -> None:
    exported, info = AutoModelForCausalLM.from_pretrained(quickstart / "export", output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "export")
    ids = tokenizer("def main(argv: list[str]) -> int:\n    return 0\n", return_tensors="pt")["input_ids"]
    module = training_model(quickstart)
    difference = (exported(input_ids=ids).logits.float() - module(ids).float()).abs().max().item()
    assert difference == 0.0


def test_export_from_the_checkpoint_is_the_export_of_the_run(quickstart: Path, tmp_path: Path) -> None:
    checkpoint = quickstart / "checkpoints" / "last.ckpt"
    subprocess.run([sys.executable, ROOT / "launch" / "export.py", checkpoint, tmp_path / "again"], check=True)
    files = {path.name for path in (quickstart / "export").iterdir()}
    assert files == {path.name for path in (tmp_path / "again").iterdir()}
    # The card of a run tells of the run.
    for name in files - {"model.safetensors", "README.md"}:
        assert (quickstart / "export" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    with (
        safe_open(quickstart / "export" / "model.safetensors", "pt") as first,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as second,
    ):
        assert set(first.keys()) == set(second.keys())
        for key in first.keys():  # noqa: SIM118  (safe_open is no mapping)
            assert torch.equal(first.get_tensor(key).view(torch.uint8), second.get_tensor(key).view(torch.uint8)), key
