"""launch/plan.py: recipes that are planned, and what it would have to guess."""

import re
import subprocess
from pathlib import Path

import pytest
from running import ROOT, forked_python, train_environment
from transformers import AutoConfig

from nvfp4_train.run.planning import plan_recipe


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setenv("RUN_ID", "plan")


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    python, server = forked_python()
    command = [python, ROOT / "launch" / "plan.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=train_environment() | server)


def test_the_script_plans_a_recipe() -> None:
    result = plan("+recipe=llama3_8b_qat", "world_size=64", "data.seq_len=1024")
    assert result.returncode == 0, result.stderr
    assert "8,030,261,248 parameters" in result.stdout
    assert "W = 64" in result.stdout
    assert "T = 1,024" in result.stdout
    # Every 17th row of a shard.
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("last look of statistics")]
    # q and o have 64 rows of 4096, k and v 16, gate and up 224, down 64 of 14336, in each of 32 layers.
    sampled = 32 * (2 * 4 * 4096 + 2 * 1 * 4096 + 2 * 14 * 4096 + 4 * 14336)
    assert float(row.split()[5]) == round(5.0625 * sampled / 2**30, 3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trainer=fsdp2"], "world_size=N"),
        (["trainer=ddp", "world_size=64"], "trainer=fsdp2"),
    ],
)
def test_the_script_ends_with_a_line_of_error(arguments: list[str], named: str) -> None:
    result = plan(*arguments)
    assert result.returncode == 1
    assert not result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert named in result.stderr.splitlines()[-1]


def test_the_script_plans_teacher_hessians_and_quantized_inputs() -> None:
    result = plan("+recipe=llama3_8b_qad_w4a4", "world_size=8")
    assert result.returncode == 0, result.stderr
    # The columns of both states, which follow the name.
    table = re.findall(r"^(\S.*?) {2,}([\d.]+) +([\d.]+) ", result.stdout, re.MULTILINE)
    rows = {name: (float(bf16), float(quantized)) for name, bf16, quantized in table}
    # Padding aside, a shard of the teacher is an eighth of the model in bf16.
    assert rows["teacher"] == (round(2 * 8_030_261_248 / 8 / 2**30, 3),) * 2
    assert rows["teacher"][0] < rows["masters"][0]
    assert rows["Hessians and steps"][0] == 0
    # Inputs of q/k/v, o and gate/up are 4096 wide, those of down 14336.
    held = 32 * 64 * (3 * 4096 + 14336) + 6_979_321_856 / 16 / 8
    assert rows["Hessians and steps"][1] == round(held / 2**30, 3)
    assert rows["activations"][1] < 0.9 * rows["activations"][0]
    # A chunk has 768 positions; embedding and head are frozen.
    assert "10 V C + 6 h T\n" in result.stdout
    assert rows["logits"][0] == round((10 * 128256 * 768 + 6 * 4096 * 2048) / 2**30, 3)
    trained = 8_030_261_248 - 2 * 128256 * 4096
    assert rows["gradients"][0] == round(4 * trained / 2**30, 3), "of two micro-batches"
    assert rows["optimizer (AdamW)"][0] == round(8 * trained / 8 / 2**30, 3)


def test_options_of_the_loss_and_of_a_callback_change_the_plan() -> None:
    def row(name: str, *overrides: str) -> str:
        planned = plan_recipe(ROOT, ["trainer=fsdp2", *overrides], 2).splitlines()
        return next((line for line in planned if line.startswith(name)), "")

    assert not row("teacher")
    assert row("teacher", "loss=distillation")
    assert row("logits ", "loss=distillation", "loss.chunk_tokens=8") != row("logits ", "loss=distillation")
    assert not row("hidden states", "loss=distillation")
    assert row("hidden states", "loss=distillation", "loss.hidden=0.5")
    assert not row("history of codes")
    assert row("history of codes", "callbacks.oscillation.action=reset")


def test_a_teacher_of_a_folder_is_planned_or_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, vocab_size in (("fits", 272), ("differs", 300)):
        AutoConfig.for_model("llama", vocab_size=vocab_size, **shape).save_pretrained(tmp_path / name)
    options = ["trainer=fsdp2", "loss=distillation"]
    own, other = (plan_recipe(ROOT, [*options, *path], 2) for path in ([], [f"loss.teacher_path={tmp_path / 'fits'}"]))
    assert own != other
    for path, message in (
        (tmp_path / "differs", "vocabulary of 272 tokens, got one of 300"),
        ("/nonexistent", "must be a folder"),
    ):
        with pytest.raises(ValueError, match=rf"^loss\.teacher_path='{path}'.*{message}"):
            plan_recipe(ROOT, [*options, f"loss.teacher_path={path}"], 2)


def test_more_recipes_are_planned() -> None:
    assert "70,553,706,496 parameters" in plan_recipe(ROOT, ["+recipe=llama3_70b_qat"], 64)
    replicas = plan_recipe(ROOT, ["trainer=hsdp", "trainer.strategy.replicate_size=8"], 64)
    assert "W = 8 share a copy of the model, R = 8 copies" in replicas


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["trainer=hsdp"], 64, r"trainer\.strategy\.replicate_size=R"),
        (["+recipe=quickstart"], 64, "trainer=fsdp2"),
        (["trainer=gpu", "+trainer.strategy=ddp"], 64, "trainer=fsdp2 .*got trainer.strategy 'ddp'"),
        (["trainer=fsdp2", "trainer.num_nodes=8", "trainer.devices=8"], 2, "8 times 8, got 2"),
        (["trainer=fsdp2", "trainer.accumulate_grad_batches=0"], 2, "^trainer.accumulate_grad_batches must"),
        (["trainer=fsdp2", "trainer.strategy.replicate_size=0"], 2, "^trainer.strategy.replicate_size must"),
        (["trainer=fsdp2", "quant.gather=pakced"], 2, "^quant: quant.gather must"),
        (["trainer=fsdp2", "quannt.gather=packed"], 2, "quannt"),
        (["trainer=fsdp2", "optim.frozen=[nothing*]"], 2, r"^optim.frozen: pattern 'nothing\*' matches no parameter"),
        (["trainer=fsdp2", "loss=distillation", "loss.hidden=-1"], 2, "^loss: loss.hidden must"),
        (["+recipe=llama3_8b_qat", "data.seq_len=100000"], 2, "8192 positions; got data.seq_len=100000"),
    ],
)
def test_what_a_plan_would_have_to_guess_is_refused(overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_recipe(ROOT, overrides, world_size)
