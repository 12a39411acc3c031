"""NaN and Inf end a run soon after they appear, with the step and the tensor, and never replace a finite checkpoint."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from break_step import BreakStep
from running import launch, load_checkpoint
from test_module import Tokens, fit, make

from nvfp4_train.callbacks.checkpoint import Checkpoint
from nvfp4_train.callbacks.divergence import Divergence
from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.finite import Diverged
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig

NAN, INF = math.nan, math.inf
UP = "model.layers.0.mlp.up_proj.weight"


def train(module: QATModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[Divergence(), Requantize(), *callbacks],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **({"max_steps": 20, "log_every_n_steps": 4, "limit_val_batches": 0} | options),
    )  # fmt: skip
    trainer.fit(module, Tokens(60))
    return trainer


def finite(path: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_checkpoint(path)["state_dict"].values() if tensor.is_floating_point())


BREAKS: dict[str, tuple[str, float, dict[str, Any], str]] = {
    "gradient": ("gradient", NAN, {}, rf"^step 6: the gradient of {UP} is not finite \(NaN\); "),
    "clipped by norm": ("gradient", INF, {"gradient_clip_val": 1.0}, rf"^step 6: the gradient of {UP} is not finite \(Inf\); "),
    # Clipped to a number, it would be finite.
    "clipped by value": (
        "gradient", INF, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, r"^step 6: the gradient of .*\(Inf\); "
    ),
    "loss": ("loss", INF, {}, r"^step 6: the loss is not finite \(Inf\); "),
    "micro-batch": ("loss", NAN, {"accumulate_grad_batches": 2}, r"^step 6: the loss of micro-batch 2 of 2 is not finite \(NaN\); "),
}  # fmt: skip
STATES: dict[str, dict[str, Any]] = {
    "quantized": {"start_step": 0}, "before the switch": {"start_step": 20}, "not quantized": {"enabled": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "state"), [*((kind, "quantized") for kind in BREAKS), ("gradient", "before the switch"), ("loss", "not quantized")]
)
def test_a_run_ends_within_one_log_interval(kind: str, state: str) -> None:
    what, value, options, message = BREAKS[kind]
    with pytest.raises(Diverged, match=message) as raised:
        train(make(**STATES[state]), steps := Steps(), BreakStep(step=6, what=what, value=value, name=UP), **options)
    assert "\n" not in str(raised.value)
    assert steps.last == 7, "the callbacks behind it saw no further step"


class Steps(L.Callback):
    """The last step that reached the callbacks."""

    last = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.last = trainer.global_step


def test_a_weight_that_breaks_where_no_loss_sees_it_is_named() -> None:
    """The last row of the table is of a token that is not in the text."""
    module = make(config={"vocab_size": 65})
    with pytest.raises(Diverged, match=r"^step 8: the weight model.embed_tokens.weight is not finite \(Inf\); "):
        train(module, BreakRow(6), log_every_n_steps=8)


class BreakRow(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: QATModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.step:
            pl_module.model.get_parameter("model.embed_tokens.weight").data[-1] = INF  # type: ignore[union-attr]


def test_what_a_bad_loss_does_to_all_gradients_is_named_by_the_loss_and_the_first_step() -> None:
    module = make()
    module.optim_config = OptimConfig(lr=1e30)
    with pytest.raises(Diverged, match=r"^step 2: the loss is not finite \(NaN\); there is no checkpoint yet"):
        train(module)


def test_the_gradient_nearest_to_the_loss_is_named() -> None:
    """A NaN of a layer goes to all that the backward comes to later."""
    module = make()
    module.model.model.layers[1].register_full_backward_hook(  # type: ignore[union-attr]
        lambda layer, into, out: tuple(None if gradient is None else gradient * NAN for gradient in into)
    )
    names = [name for name, _ in module.model.named_parameters()]  # type: ignore[union-attr]
    last = names.index("model.layers.0.post_attention_layernorm.weight")
    with pytest.raises(Diverged, match=rf"^step 1: the gradient of {names[last]} .*, nor are those of {last} other parameters"):
        train(module)


@pytest.mark.parametrize("options", [{}, {"save_weights_only": True}, {"save_last": True, "save_on_exception": True}], ids=str)
def test_no_checkpoint_is_replaced(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, **options)
    with pytest.raises(Diverged, match=r"^step (5: the gradient .* continue from .*(step=4|last).ckpt |6: the weight)"):
        train(make(), BreakStep(step=5, what="gradient", value=NAN, name=UP), checkpoint, log_every_n_steps=100)
    assert {path.name for path in tmp_path.iterdir()} == {"step=4.ckpt"} | ({"last.ckpt"} if "save_last" in options else set())
    assert all(finite(path) for path in tmp_path.iterdir())


def test_without_the_callback_no_checkpoint_is_replaced_either(tmp_path: Path) -> None:
    checkpoint = Checkpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    with pytest.raises(Diverged, match=r"^step 4: the weight .* is not finite \(NaN\).*; no checkpoint of it is written"):
        fit(make(), callbacks=[Requantize(), BreakStep(step=3, what="gradient", value=NAN, name=UP), checkpoint],
            enable_checkpointing=True)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]
    assert finite(tmp_path / "step=2.ckpt")


def test_the_end_of_training_is_looked_at_before_it_is_evaluated() -> None:
    module = make()
    with pytest.raises(Diverged, match="^step 10: the gradient"):
        train(module, BreakStep(step=10, what="gradient", value=NAN, name=UP), max_steps=10, log_every_n_steps=100)
    assert "val/loss_quantized" not in module.results


def test_the_switch_is_not_made_with_weights_that_are_not_finite() -> None:
    module = make(start_step=7)
    with pytest.raises(Diverged, match="^step 7: the gradient"):
        train(module, BreakStep(step=7, what="gradient", value=NAN, name=UP), log_every_n_steps=100)
    assert not module.results


def test_steps_are_looked_at_in_time_where_nothing_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp4_train.callbacks.divergence._MOST_STEPS", 5)
    module = make()
    with pytest.raises(Diverged, match="^step 3: the gradient"):
        train(
            module,
            steps := Steps(),
            BreakStep(step=3, what="gradient", value=NAN, name=UP),
            max_steps=200,
            log_every_n_steps=1000,
        )
    assert steps.last == 4


@pytest.mark.parametrize("options", [{}, {"max_steps": 0}], ids=["training", "no steps"])
def test_a_model_that_is_not_finite_is_named_before_the_first_step(options: dict[str, Any]) -> None:
    module = make()
    module.model.get_parameter("lm_head.weight").data[3, 3] = NAN  # type: ignore[union-attr]
    with pytest.raises(
        Diverged, match=r"^the weight lm_head.weight is not finite \(NaN\) before training begins; see model.path"
    ):
        train(module, **options)
    assert not module.has_started


def test_a_bad_validation_alone_is_said_and_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    module = make()
    validation_step = module.validation_step

    def broken(batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        validation_step(batch, batch_idx)
        module.log("val/other", torch.tensor(NAN))

    module.validation_step = broken  # type: ignore[method-assign]
    train(module, max_steps=2, limit_val_batches=1.0, val_check_interval=2)
    assert "step 2: val/other of the held-out text: not finite" in capsys.readouterr().out


def test_frozen_weights_and_finite_runs_pass(tmp_path: Path) -> None:
    module = make()
    module.optim_config = OptimConfig(lr=1e-2, frozen=("*embed_tokens*", "model.layers.0.*"))
    for name, parameter in module.model.named_parameters():  # type: ignore[union-attr]
        parameter.requires_grad = "embed_tokens" not in name and "layers.0." not in name
    train(module, Checkpoint(dirpath=tmp_path, every_n_train_steps=2), max_steps=4, log_every_n_steps=1)


def broken(step: int, what: str, value: str, rank: int = 0) -> list[str]:
    return [
        "+callbacks.broken._target_=break_step.BreakStep", f"+callbacks.broken.step={step}", f"+callbacks.broken.what={what}",
        f"+callbacks.broken.value={value}", f"+callbacks.broken.name={UP}", f"+callbacks.broken.rank={rank}",
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [0, 2], ids=["one process", "sharded over two ranks"])
def test_a_run_keeps_its_last_finite_checkpoint_and_continues_from_it(ranks: int, tmp_path: Path) -> None:
    """A NaN went on from step 15 to the switch at step 30, and the finite checkpoint of step 10 was deleted on the way."""
    options = [
        "+recipe=quickstart", "trainer.max_steps=22", "trainer.log_every_n_steps=10", "trainer.gradient_clip_val=null",
        "quant.start_step=30" if ranks == 0 else "quant.start_step=2", "callbacks.checkpoint.every_n_train_steps=10",
        "ckpt_path=auto", *(["trainer=fsdp2", "trainer.accelerator=cpu"] if ranks else []),
    ]  # fmt: skip
    if ranks == 0:
        options.append("trainer.max_steps=32")
    failed = launch(tmp_path, *options, *broken(15, "gradient", "nan", rank=max(ranks - 1, 0)), ranks=ranks, check=False)
    assert failed.returncode == 1
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt*")
    assert checkpoint.name == "step-0000010.ckpt"
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, "one rank speaks for all"
    assert lines[0].startswith(f"error: step 15: the gradient of {UP} is not finite (NaN); continue from {checkpoint} ")
    assert failed.stderr.count("Traceback") == (ranks > 0), "that of torchrun itself"
    assert "\n0,19,nan" in (tmp_path / "metrics.csv").read_text(), "the step that ended the run is logged"
    if ranks == 0:
        continued = launch(tmp_path, *options)
        assert f"ckpt_path=auto: {checkpoint}" in continued.stdout
        assert finite(tmp_path / "checkpoints" / "last.ckpt")
