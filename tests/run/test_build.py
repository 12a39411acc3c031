"""What a user sets: options that are built, and slips that are refused with their location."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from running import ROOT, SMALL
from transformers import AutoConfig

from nvfp4_train.callbacks.progress import TrainingProgress
from nvfp4_train.run import build as run
from nvfp4_train.run.compose import compose_options, groups


def build(tmp_path: Path, *overrides: str) -> None:
    """What launch/train.py does before it trains."""
    options, _ = compose_options(ROOT, [*SMALL, "trainer.max_steps=1", f"run_dir={tmp_path}", *overrides])
    run.build(options)


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
        ("callbacks.requantize=null", "callbacks.requantize .* must not be null; .* quant=none"),
        ("callbacks.export._target_=nvfp4_train.callbacks.export.Exprt", "callbacks.export._target_: .*Exprt"),
        ("model.config.num_attention_heads=7", "model.config: "),
        ("optim.lr=-1", "optim.lr must be above 0"),
        ("optim.betas=[a,b]", "optim.betas must be a list of float, got"),
        ("+model.config.hiden_size=8", "model.config: a llama config has no field hiden_size"),
        ("model.path=/nonexistent", "model.path must be a folder with a config.json or a hub name, got '/nonexistent'"),
        ("data.seq_len=4096", "seq_len"),
        ("model.config.vocab_size=100", "vocab"),
        ("ckpt_path=/nonexistent.ckpt", "ckpt_path must be a checkpoint, or auto, got .*does not exist"),
        ("ckpt_path=/etc/passwd", "ckpt_path must be a checkpoint, or auto, got '/etc/passwd', which is no checkpoint"),
    ],
)
def test_a_slip_is_refused_with_its_location(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, override)


def test_what_build_accepts_is_built(tmp_path: Path) -> None:
    build(tmp_path, "+recipe=quickstart", "logger=none", "+model.config.rope_theta=5000.0")
    timeout = "+trainer.strategy.timeout={_target_: datetime.timedelta, hours: 2}"
    build(tmp_path, "trainer=ddp", "trainer.accelerator=cpu", timeout)


def test_an_option_of_wandb_is_checked(tmp_path: Path) -> None:
    """Lightning's, and those that it hands on."""
    with pytest.raises(ValueError, match=r"logger.wandb.entitty: no such option; did you mean entity\?"):
        build(tmp_path, "logger=wandb", "+logger.wandb.entitty=me")
    with pytest.raises(ValueError, match=r"logger.wandb.offline must be bool, got 'flase'"):
        build(tmp_path, "logger=wandb", "+logger.wandb.offline=flase")


@pytest.mark.parametrize(
    ("override", "bars"),
    [
        ("trainer.enable_progress_bar=true", [TrainingProgress]),
        ("trainer.enable_progress_bar=null", [TrainingProgress]),
        ("trainer.enable_progress_bar=false", []),
        ("+callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar", [TQDMProgressBar]),
    ],
)
def test_a_run_has_one_bar_or_none(override: str, bars: list[type[ProgressBar]], tmp_path: Path) -> None:
    options, _ = compose_options(ROOT, [*SMALL, f"run_dir={tmp_path}", "logger=none", override])
    trainer, *_ = run.build(options)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    assert [type(callback) for callback in callbacks if isinstance(callback, ProgressBar)] == bars


def test_a_damaged_folder_is_refused_before_any_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    AutoConfig.for_model("llama").save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(run, "TextDataModule", None)
    for option, more in (("model.path", ()), ("loss.teacher_path", ("loss=distillation",))):
        with pytest.raises(
            ValueError, match=rf"^{option}='{folder}': .*model.safetensors is no safetensors file, or cut short"
        ):
            build(tmp_path, *more, f"{option}={folder}")


def test_a_group_is_an_argument_of_the_module_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new group takes a folder of configs/ and an argument, and no change of what builds; its nested options are plain data."""
    taken: dict[str, Any] = {}
    monkeypatch.setattr(run, "QATModule", lambda **arguments: taken.update(arguments))
    options, _ = compose_options(ROOT, [*SMALL, f"run_dir={tmp_path}", "logger=none"])
    run.build(options | {"new": {"_target_": "builtins.dict", "teacher": {"path": "x", "layers": [1, 2]}}})
    assert taken.keys() == {"seed", "options", "new", *groups(options)} - {"data", "trainer", "callbacks", "logger"}
    assert taken["new"] == {"teacher": {"path": "x", "layers": [1, 2]}}
