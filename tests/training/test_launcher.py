"""What a user types into a shell: overrides that work, and slips that end in one line before training."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
from running import ROOT, forked_python, launch, load_checkpoint, metrics, train_environment
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def test_help_lists_the_recipes(tmp_path: Path) -> None:
    text = launch(tmp_path / "run", "--help", small=False).stdout
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"{recipe.stem} " in text
    assert "trainer: cpu, ddp" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.max_stepz=3", "error: trainer.max_stepz: no such option"),
        ("data.path=/nonexistent.txt", "/nonexistent.txt"),
        ("quant.include=[nothing]", "pattern 'nothing' matches no nn.Linear"),
        ("trainer.precision=bf16-true", "error: trainer.precision must be 32-true or bf16-mixed, got bf16-true"),
        ("model.attn_implementation=flsh", "flsh"),
        ("quant.start_step=9", "quant.start_step must be at most trainer.max_steps"),
        ("+loss.temperature=2", "error: loss.temperature: no such option"),
    ],
)
def test_the_launcher_refuses_before_training(override: str, message: str, tmp_path: Path) -> None:
    result = launch(tmp_path / "run", "trainer.max_steps=1", override, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperature=0", "error: loss: loss.temperature must be above 0 and finite, got 0"),
        ("loss.divergence=kl", "error: loss.divergence must be 'forward_kl' or 'reverse_kl' or 'jsd', got 'kl'"),
        ("loss.teacher_path=/nonexistent", "error: loss.teacher_path='/nonexistent': "),
    ],
)
def test_the_launcher_refuses_options_of_distillation(override: str, message: str, tmp_path: Path) -> None:
    result = launch(tmp_path / "run", "loss=distillation", "trainer.max_steps=1", override, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_of_distillation_reports_how_far_it_is_from_its_teacher(tmp_path: Path) -> None:
    options = ("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "quant.start_step=1")
    launch(tmp_path / "run", "loss=distillation", "loss.cross_entropy=0.1", *options)
    found = metrics(tmp_path / "run")
    assert found["val/kl_master_at_switch"] == pytest.approx(0, abs=1e-3), "cross-entropy has moved it a little"
    assert found["val/kl_ptq"] > 0
    assert 0 <= found["val/top1_agreement_quantized"] <= 1
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/divergence", "train/cross_entropy", "val/loss", "val/kl", "val/top1_agreement"} <= set(header)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(name.startswith(("model.", "quant_state.")) and "teacher" not in name for name in checkpoint["state_dict"])


def test_ranks_without_a_shared_id_agree_on_a_folder_and_need_a_trainer_for_all(tmp_path: Path) -> None:
    """torchrun gives all runs the id `none` where a port is named; and a trainer of one device would train once per rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), ROOT / "launch" / "train.py"]
    python, server = forked_python()
    result = subprocess.run(
        [python, *command, "trainer=cpu", "logger=csv"],
        capture_output=True, text=True, cwd=tmp_path, env=train_environment() | server,
    )  # fmt: skip
    assert "must be the 2 ranks that this run was started with, got 1 times 1; see trainer=ddp" in result.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name != "none"


def test_a_run_on_local_text_from_a_local_model_without_quantization_or_logger(tmp_path: Path) -> None:
    """Also: the export of a run is refused a second time, and replaced when told so."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"Document {number}. " + "All work and no play makes a dull test. " * 20)
    first = tmp_path / "first"
    common = (f"data.path={text}", "trainer.max_steps=2", "data.max_documents=null", "trainer.val_check_interval=1")
    launch(first, *common, "logger=none", "seed=3")
    assert not (first / "metrics.csv").exists()
    dense = tmp_path / "dense"
    save_dense_model(first, dense)

    second = tmp_path / "second"
    launch(second, *common, f"model.path={dense}", "quant=none", "logger=csv")
    assert json.loads((second / "export" / "config.json").read_text())["hidden_size"] == 64
    assert metrics(second)["val/loss_ptq"] == metrics(second)["val/loss_quantized"]

    # Training on from an unquantized run has a switch, and a loss at it, of its own.
    onwards = tmp_path / "onwards"
    resume = (f"ckpt_path={second}/checkpoints/last.ckpt", f"model.path={dense}")
    launch(onwards, *common, *resume, "trainer.max_steps=4", "quant.start_step=3")
    assert metrics(onwards)["val/loss_ptq"] != metrics(second)["val/loss_ptq"]

    config = (second / ".hydra" / "config.yaml").read_text()
    again = launch(second, *common, f"model.path={dense}", "quant=none", "seed=77", check=False)
    assert again.returncode != 0
    assert (second / ".hydra" / "config.yaml").read_text() == config, "that of the run whose results are there"
    assert "callbacks.export.overwrite=true" in again.stderr
    # A run that was killed behind its export is continued by the same command.
    weights = (second / "export" / "model.safetensors").read_bytes()
    launch(second, *common, f"model.path={dense}", "quant=none", "logger=csv", "ckpt_path=auto")
    assert (second / "export" / "model.safetensors").read_bytes() == weights
    launch(second, *common, f"model.path={dense}", "callbacks.export.overwrite=true")
    assert (second / "metrics.1.csv").exists(), "the metrics of the earlier run are kept"


def save_dense_model(run_dir: Path, folder: Path) -> None:
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    config = AutoConfig.for_model(**checkpoint["hyper_parameters"]["export"]["config"])
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name.removeprefix("model."): p for name, p in checkpoint["state_dict"].items()}, strict=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(run_dir / "checkpoints" / "tokenizer").save_pretrained(folder)
