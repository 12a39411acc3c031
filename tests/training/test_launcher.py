"""What a user types into a shell: overrides that work, and slips that end in one line before training."""

import json
import math
import shutil
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


def refusal(run_dir: Path, *overrides: str, script: str = "train.py") -> str:
    """The line with which the launcher ends before training."""
    result = launch(run_dir, "trainer.max_steps=2", *overrides, check=False, script=script)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    *rest, last = result.stderr.splitlines()
    assert not any(line.startswith("error: ") for line in rest)
    assert not list(run_dir.glob("checkpoints/*.ckpt"))
    return last


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperature=0", "error: loss: loss.temperature must be above 0 and finite, got 0"),
        ("loss.hidden=-1", "error: loss: loss.hidden must be at least 0 and finite, got -1"),
        ("loss.divergence=kl", "error: loss.divergence must be 'forward_kl' or 'reverse_kl' or 'jsd', got 'kl'"),
        ("loss.teacher_path=/nonexistent", "error: loss.teacher_path='/nonexistent': "),
    ],
)
def test_the_launcher_refuses_options_of_distillation(override: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, "loss=distillation", override).startswith(message)


@pytest.mark.parametrize(
    ("fields", "hidden", "message"),
    [
        ({"vocab_size": 300}, 0, "must name a model with the student's vocabulary of 272 tokens, got one of 300"),
        ({"num_hidden_layers": 3}, 0.5, "needs a teacher with as many layers as the student, 2, got 3 of loss.teacher_path="),
    ],
    ids=["vocabulary", "layers"],
)
def test_the_launcher_refuses_a_teacher_that_does_not_fit(
    fields: dict[str, int], hidden: float, message: str, tmp_path: Path
) -> None:
    shape = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **shape | fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    options = (f"loss.teacher_path={tmp_path / 'teacher'}", f"loss.hidden={hidden}")
    line = refusal(tmp_path / "run", "loss=distillation", *options)
    assert line.startswith("error: loss.")
    assert message in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("quant.equalize=1.5", "quant: quant.equalize must be none, or an exponent from 0 to 1, got 1.5"),
        ("quant.equalize=foo", "quant: quant.equalize must be none, or an exponent from 0 to 1, got 'foo'"),
        (
            "quant.rule=hessian quant.calibration.sequences=0",
            "quant: quant.calibration.sequences must be at least 1 with quant.rule=hessian, got 0",
        ),
        ("quant.activations=int8", "quant: quant.activations must be 'none' or 'nvfp4', got 'int8'"),
        ("quant.refit_every=0", "quant: quant.refit_every must be at least 1, got 0"),
        (
            "optim.frozen=[nothing*]",
            "optim.frozen: pattern 'nothing*' matches no parameter; names look like model.embed_tokens",
        ),
    ],
)
def test_the_launcher_refuses_what_no_model_can_go_through(overrides: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, *overrides.split()).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("script", "option"),
    [("train.py", "quant.start_step=0"), ("train.py", "quant.start_step=1"), ("train.py", "quant=none"), ("ptq.py", "seed=0")],
)
def test_too_few_tokens_to_calibrate_with_are_found_before_training(script: str, option: str, tmp_path: Path) -> None:
    line = refusal(tmp_path, "data.seq_len=16", "quant.calibration.sequences=15", option, script=script)
    wanted = "error: calibration must see at least 256 tokens, got 240; raise quant.calibration.sequences or data.seq_len"
    assert line == wanted


def test_a_run_that_was_never_calibrated_is_not_served_with_quantized_inputs(tmp_path: Path) -> None:
    """It continues as W4A16, whose metrics then have no W4A4 beside them."""
    first, onwards = tmp_path / "first", tmp_path / "onwards"
    uncalibrated = ("quant.calibration.sequences=0", "quant.equalize=none")
    launch(first, "trainer.max_steps=1", *uncalibrated)
    resume = f"ckpt_path={first}/checkpoints/last.ckpt"
    for option in ("quant.activations=nvfp4", "quant.serve=w4a4"):
        line = refusal(tmp_path / "refused", resume, *uncalibrated, option)
        assert line == f"error: quant: quant.calibration.sequences must be at least 1 with {option}, got 0"
    line = refusal(tmp_path / "refused", resume, uncalibrated[1])
    assert line.startswith("error: quant.calibration.sequences must be as in the run that saved ")
    launch(onwards, "trainer.max_steps=2", resume, *uncalibrated)
    found = metrics(onwards)
    assert found["step"] == 2
    assert all(math.isfinite(value) for value in found.values())
    assert not any("w4a4" in name for name in found)


def test_a_run_of_distillation_reports_how_far_it_is_from_its_teacher(tmp_path: Path) -> None:
    options = ("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "quant.start_step=1")
    launch(tmp_path / "run", "loss=distillation", "loss.cross_entropy=0.1", *options)
    found = metrics(tmp_path / "run")
    assert found["val/kl_master_at_switch"] == pytest.approx(0, abs=1e-3), "cross-entropy has moved it a little"
    assert found["val/kl_ptq"] > 0
    assert 0 <= found["val/top1_agreement_quantized"] <= 1
    assert [validation["step"] for validation in found["validations"]] == [2, 4]
    for validation in found["validations"]:
        assert validation["val/kl"] > 0
        assert validation["val/loss"] > validation["val/kl"], "it adds cross-entropy"
        assert 0 <= validation["val/top1_agreement"] <= 1
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| method | QAD" in card
    assert "| training | 4 optimizer steps, 1,024 tokens, quantized from step 1 on |" in card
    assert "`python launch/train.py " in card
    assert str(tmp_path) not in card
    for label, state in (("masters in bf16, at the switch", "master_at_switch"), ("masters in bf16, at the end", "master")):
        numbers = " | ".join(f"{found[f'val/{name}_{state}']:.5g}" for name in ("loss", "kl", "top1_agreement"))
        assert f"| {label} | {numbers} |" in card
    for label, state in (("PTQ, at the switch", "ptq"), ("trained, at the end", "quantized")):
        for serving in ("w4a16", "w4a4"):
            numbers = " | ".join(f"{found[f'val/{name}_{state}_{serving}']:.5g}" for name in ("loss", "kl", "top1_agreement"))
            assert f"| {label}, {serving.upper()} | {numbers} |" in card
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
    (second / "checkpoints").rename(tmp_path / "checkpoints")
    again = launch(second, *common, f"model.path={dense}", "quant=none", "seed=77", check=False)
    (tmp_path / "checkpoints").rename(second / "checkpoints")
    assert again.returncode != 0
    assert (second / ".hydra" / "config.yaml").read_text() == config, "that of the run whose results are there"
    assert "callbacks.export.overwrite=true" in again.stderr
    # A run that was killed behind its export is continued by the same command.
    weights = (second / "export" / "model.safetensors").read_bytes()
    launch(second, *common, f"model.path={dense}", "quant=none", "logger=csv", "ckpt_path=auto")
    assert (second / "export" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(second / "checkpoints")
    launch(second, *common, f"model.path={dense}", "callbacks.export.overwrite=true")
    assert (second / "metrics.1.csv").exists(), "the metrics of the earlier run are kept"


def save_dense_model(run_dir: Path, folder: Path) -> None:
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    config = AutoConfig.for_model(**checkpoint["hyper_parameters"]["export"]["config"])
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name.removeprefix("model."): p for name, p in checkpoint["state_dict"].items()}, strict=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(run_dir / "checkpoints" / "tokenizer").save_pretrained(folder)
