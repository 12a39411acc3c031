"""launch/plan.py: recipes that are planned, and what it would have to guess."""

import subprocess

import pytest
from running import ROOT, forked_python, train_environment

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
        (["+recipe=llama3_8b_qat", "data.seq_len=100000"], 2, "8192 positions; got data.seq_len=100000"),
    ],
)
def test_what_a_plan_would_have_to_guess_is_refused(overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_recipe(ROOT, overrides, world_size)
