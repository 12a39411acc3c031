"""What a user types: overrides that work, and slips that are refused before training."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import train
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from running import ROOT, SMALL, launch, load_checkpoint, metrics
from torch.distributed import TCPStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def test_help_lists_the_recipes(tmp_path: Path) -> None:
    text = launch(tmp_path / "run", "--help", small=False).stdout
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"{recipe.stem} " in text
    assert "trainer: cpu, ddp" in text


def build(tmp_path: Path, *overrides: str) -> None:
    """What launch/train.py does before it trains."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=[*SMALL, "trainer.max_steps=1", f"run_dir={tmp_path}", *overrides])
    train.build(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stepz=3", "max_stepz"),
        ("quannt.enabled=false", "quannt"),
        ("+trainer.max_stepz=3", r"trainer.max_stepz: no such option; did you mean max_steps\?"),
        ("+quant.blok_size=3", "quant.blok_size: no such option"),
        ("+callbacks.export.foldr=x", r"callbacks.export.foldr: no such option; did you mean folder\?"),
        ("+recipe=quickstartt", "quickstartt"),
        ("trainer=tpuu", "tpuu"),
        ("trainer.max_steps=1o0", "trainer.max_steps must be int, got '1o0'"),
        ("trainer.max_steps=0", "trainer.max_steps must be at least 1, got 0"),
        ("trainer.enable_progress_bar=flase", "trainer.enable_progress_bar must be bool or null, got 'flase'"),
        ("quant.global_scale=pow3", "quant.global_scale must be 'pow2' or 'exact', got 'pow3'"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be at least 1, got 0"),
        ("trainer.accelerator=cpuu", "trainer: .*cpuu"),
        ("callbacks.export.max_shard_bytes=0", "callbacks.export.max_shard_bytes must be at least 1, got 0"),
        ("+callbacks.foo=3", "callbacks.foo must be null or have a _target_, got 3"),
        ("callbacks.fake_quant=null", "callbacks.fake_quant .* must not be null; .* quant=none"),
        ("callbacks.export._target_=nvfp4_train.callbacks.export.Exprt", "callbacks.export._target_: .*Exprt"),
        ("model.config.num_attention_heads=7", "model.config: "),
        ("optim.lr=-1", "optim.lr must be above 0"),
        ("optim.betas=[a,b]", "optim.betas must be a list of float, got"),
        ("+model.config.hiden_size=8", "model.config: a llama config has no field hiden_size"),
        ("model.path=/nonexistent", "model.path must be a folder with a config.json or a hub name, got '/nonexistent'"),
        ("data.seq_len=4096", "seq_len"),
        ("model.config.vocab_size=100", "vocab"),
        ("ckpt_path=/nonexistent.ckpt", "ckpt_path must be a checkpoint, or auto, got .*does not exist"),
        ("ckpt_path=/etc/passwd", "ckpt_path must be a checkpoint, or auto, got '/etc/passwd', which is none"),
    ],
)
def test_a_slip_is_refused_with_its_location(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, HydraException, InstantiationException), match=message):
        build(tmp_path, override)


def test_what_build_accepts_is_built(tmp_path: Path) -> None:
    build(tmp_path, "+recipe=quickstart", "logger=none", "+model.config.rope_theta=5000.0")
    timeout = "+trainer.strategy.timeout={_target_: datetime.timedelta, hours: 2}"
    build(tmp_path, "trainer=ddp", "trainer.accelerator=cpu", timeout)


@pytest.mark.parametrize("devices", [1, 3])
def test_devices_are_the_ranks_that_torchrun_started(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.check_trainer({"devices": 2, "num_nodes": 1})
    with pytest.raises(ValueError, match=f"must be the 2 ranks that this run was started with, got {devices} times 1"):
        train.check_trainer({"devices": devices, "num_nodes": 1})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.max_stepz=3", "error: trainer.max_stepz: no such option"),
        ("data.path=/nonexistent.txt", "/nonexistent.txt"),
        ("quant.include=[nothing]", "pattern 'nothing' matches no nn.Linear"),
        ("trainer.precision=bf16-true", "error: trainer.precision must be 32-true or bf16-mixed, got bf16-true"),
        ("model.attn_implementation=flsh", "flsh"),
        ("quant.start_step=9", "quant.start_step must be at most trainer.max_steps"),
    ],
)
def test_the_launcher_refuses_before_training(override: str, message: str, tmp_path: Path) -> None:
    result = launch(tmp_path / "run", "trainer.max_steps=1", override, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt"))


def test_an_option_of_wandb_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logger.wandb.entitty: no such option; did you mean entity\?"):
        build(tmp_path, "logger=wandb", "+logger.wandb.entitty=me")


def test_ranks_without_a_shared_id_agree_on_a_folder_and_need_a_trainer_for_all(tmp_path: Path) -> None:
    """torchrun gives all runs the id `none` where a port is named; and a trainer of one device would train once per rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), ROOT / "launch" / "train.py"]
    environment = {name: value for name, value in os.environ.items() if name != "RUN_ID"}
    result = subprocess.run(
        [sys.executable, *command, "trainer=cpu", "logger=csv"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert "must be the 2 ranks that this run was started with, got 1 times 1; see trainer=ddp" in result.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name != "none"


def test_an_unknown_name_at_the_top_of_a_recipe_is_refused(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "misspelt_for_a_test.yaml"
    recipe.write_text("# A recipe with a slip.\nquannt: {enabled: false}\n")
    try:
        result = launch(tmp_path / "run", "+recipe=misspelt_for_a_test", check=False)
    finally:
        recipe.unlink()
    assert result.returncode != 0
    assert "quannt" in result.stderr
    assert "misspelt_for_a_test" in result.stderr


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


def test_all_ranks_continue_from_the_checkpoint_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On storage of its own a rank may find none, or another one, and would wait for the others forever."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setattr(train, "IS_RANK_ZERO", False)
    for name, value in (
        ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "0"),
        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port)),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    for chosen in ("", str(tmp_path)):
        store.set("nvfp4_train/checkpoint/0", chosen)
        assert train.choose_checkpoint("auto", tmp_path / "checkpoints") == (chosen or None)
    store.set("nvfp4_train/checkpoint/0", str(tmp_path / "elsewhere.ckpt"))
    with pytest.raises(ValueError, match="storage that all ranks share"):
        train.choose_checkpoint("auto", tmp_path / "checkpoints")
