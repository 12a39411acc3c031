"""What a run that continues does is what its command line says, or it is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from running import launch, load_checkpoint, metrics

from nvfp4_train.optim import lr_factor
from nvfp4_train.run.lock import lock_folder

SHORT = ("trainer.val_check_interval=100", "callbacks.served_check=null", "callbacks.scale_stats=null", "callbacks.export=null")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, the last two of them quantized."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    launch(run_dir, *SHORT, "trainer.max_steps=3", "quant.start_step=1", "optim.lr=1e-5", "optim.warmup_steps=2")
    return run_dir


def refusal(run_dir: Path, *overrides: str) -> str:
    result = launch(run_dir, *SHORT, "trainer.max_steps=5", *overrides, check=False)
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    *_, last = result.stderr.splitlines()
    return last


@pytest.mark.parametrize("trainer", ["cpu", "fsdp2"])
def test_options_of_the_optimizer_are_those_of_the_command_line(trainer: str, first: Path, tmp_path: Path) -> None:
    """Under FSDP2 the first of two ranks says so; the schedule is that of the new number of steps from its first step on."""
    options = {"lr": 1e-3, "weight_decay": 0.5, "betas": [0.8, 0.9], "eps": 1e-7, "warmup_steps": 0}
    resumed = launch(
        tmp_path / "run", *SHORT, f"ckpt_path={first}/checkpoints/last.ckpt", "trainer.max_steps=5", "quant.start_step=1",
        *(f"optim.{name}={value}" for name, value in options.items()), "trainer.log_every_n_steps=1",
        *(("trainer=fsdp2", "trainer.accelerator=cpu", "+trainer.strategy.save_distributed_checkpoint=false",
           "trainer.strategy.async_checkpoint=false") if trainer == "fsdp2" else ()),
        ranks=2 if trainer == "fsdp2" else 0,
    )  # fmt: skip
    assert resumed.stdout.count("optim.lr was 1e-05, is 0.001 from here on") == 1
    assert "optim.weight_decay was 0.0, is 0.5 from here on" in resumed.stdout
    assert "optim.betas was (0.9, 0.95), is (0.8, 0.9) from here on" in resumed.stdout
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (optimizer,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    rates = [1e-3 * lr_factor(step, warmup_steps=0, total_steps=5, min_lr_ratio=0.1) for step in range(6)]
    assert [group["lr"] for group in optimizer["param_groups"]] == [rates[5]] * 2
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.5, 0.0]
    assert all(tuple(group["betas"]) == (0.8, 0.9) and group["eps"] == 1e-7 for group in optimizer["param_groups"])
    assert schedule["base_lrs"] == [1e-3, 1e-3]
    header, *rows = (line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines())
    logged = [float(row[header.index("train/lr")]) for row in rows if row[header.index("train/lr")]]
    assert logged == pytest.approx(rates[3:5], rel=1e-6), "from the first step on"
    saved = yaml.safe_load((tmp_path / "run" / ".hydra" / "config.yaml").read_text())
    assert {name: saved["optim"][name] for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "optim.frozen=[lm_head*]",
            "last.ckpt (step 3), [], which has acted on it, got ['lm_head*']; set optim.frozen=[], or start from an earlier",
        ),
        ("quant.start_step=1 quant.equalize=none", "error: quant.equalize must be as in the run that saved"),
        ("quant.start_step=2", "error: quant.start_step must be as in the run that saved"),
        (
            "quant.start_step=1 +model.config.rope_theta=5000.0",
            "rope_parameters.rope_theta of its config is 10000.0 there and 5000.0 here; set model.*",
        ),
        ("quant.start_step=1 +model.config.hidden_act=gelu", "hidden_act of its config is silu there and gelu here"),
    ],
)
def test_what_a_checkpoint_has_acted_on_cannot_change(options: str, message: str, first: Path, tmp_path: Path) -> None:
    line = refusal(tmp_path / "run", f"ckpt_path={first}/checkpoints/last.ckpt", *options.split())
    assert message in line
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_folder_with_checkpoints_is_continued_or_left_alone(first: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    line = refusal(first)
    assert line.startswith("error: run_dir must hold no checkpoints that a run from the first step would replace, got ")
    assert line.endswith(
        "last.ckpt of step 3; continue from it with ckpt_path=auto, set another run_dir, or move the folder away"
    )
    other = tmp_path / "other.ckpt"
    other.write_bytes((first / "checkpoints" / "last.ckpt").read_bytes())
    assert f"that a run from {other} would replace" in refusal(first, f"ckpt_path={other}")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before


def test_a_run_in_a_folder_that_another_run_holds_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run", ["train.py"]):
        assert refusal(tmp_path / "run").startswith(
            f"error: run_dir must be a folder that no other run is in, got {tmp_path}/run, "
        )
    assert not list((tmp_path / "run").iterdir())


def test_a_sweep_goes_on_behind_a_job_that_fails(tmp_path: Path) -> None:
    result = launch(tmp_path, "hydra.mode=MULTIRUN", *SHORT, "trainer.max_steps=1", "optim.lr=-1,1e-3", check=False)
    assert result.returncode == 1
    assert "error: optim.lr must be above 0" in result.stderr.replace("optim: ", "")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "0" / "metrics.json").exists()
    assert (tmp_path / "1" / "metrics.json").exists()


def test_relative_paths_are_of_the_folder_of_the_command(tmp_path: Path) -> None:
    """Whether or not Hydra changes to the run folder."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("All work and no play makes a dull test. " * 100)
    options = (
        f"data.path={text.relative_to(tmp_path)}",
        "data.max_documents=null",
        "trainer.max_steps=1",
        "hydra.job.chdir=true",
    )
    launch(tmp_path / "run", *SHORT, *options, folder=tmp_path)
    saved = yaml.safe_load((tmp_path / "run" / ".hydra" / "config.yaml").read_text())
    assert saved["data"]["path"] == str(text)


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal(tmp_path / "file" / "run")
    assert line.startswith("error: run_dir cannot be made: ")


def test_a_run_continues_from_what_it_began_with_until_it_has_a_checkpoint_of_its_own(first: Path, tmp_path: Path) -> None:
    """It is killed before its first one; and a folder is not written to by a run that finds no checkpoint in it to continue from."""
    run_dir, origin = tmp_path / "run", first / "checkpoints" / "last.ckpt"
    options = (*SHORT, "trainer.max_steps=5", "quant.start_step=1", "trainer.log_every_n_steps=1")
    stop = (
        "+callbacks.stop._target_=stop_at_step.StopAtStep", "+callbacks.stop.number=9", "+callbacks.stop.batch_idx=3",
    )  # fmt: skip
    assert launch(run_dir, *options, f"ckpt_path={origin}", *stop, check=False).returncode == -9
    assert not list(run_dir.glob("checkpoints/*.ckpt"))
    assert f"ckpt_path=auto: {origin}" in launch(run_dir, *options, "ckpt_path=auto").stdout
    assert yaml.safe_load((run_dir / ".hydra" / "config.yaml").read_text())["ckpt_path"] == str(origin)
    assert load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_checkpoints_without_the_state_of_an_optimizer_are_kept(first: Path, tmp_path: Path) -> None:
    run_dir, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    content = load_checkpoint(first / "checkpoints" / "last.ckpt")
    torch.save({name: content[name] for name in content if name not in ("optimizer_states", "lr_schedulers")}, checkpoint)
    weights = checkpoint.read_bytes()
    fault = "holds weights only, no state of the optimizer"
    assert f"from the first step would replace, got {checkpoint} which {fault}" in refusal(run_dir)
    given = tmp_path / "given.ckpt"
    given.write_bytes(weights)
    assert refusal(tmp_path / "other", f"ckpt_path={given}").endswith(f"which {fault}")
    output = launch(run_dir, *SHORT, "trainer.max_steps=1", "ckpt_path=auto").stdout
    kept = checkpoint.parent / "set-aside" / "last.ckpt"
    assert f"ckpt_path=auto: it is kept as {kept}" in output
    assert kept.read_bytes() == weights
    assert load_checkpoint(checkpoint)["global_step"] == 1


def test_numbers_of_another_quantization_are_not_put_beside_each_other(first: Path, tmp_path: Path) -> None:
    resumed = launch(
        tmp_path / "run", *SHORT, f"ckpt_path={first}/checkpoints/last.ckpt", "trainer.max_steps=4", "quant.start_step=1",
        "optim.lr=1e-5", "optim.warmup_steps=2", "quant.activations=nvfp4",
    )  # fmt: skip
    assert "what was measured at the switch is left out: the quantization changed since" in resumed.stdout
    found = metrics(tmp_path / "run")
    assert "val/loss_quantized" in found
    assert "val/loss_ptq" not in found


def test_nor_are_those_of_other_held_out_text_where_no_step_is_left(first: Path, tmp_path: Path) -> None:
    """Then training does not start, and the end alone is measured."""
    options = ("trainer.max_steps=3", "quant.start_step=1", "optim.warmup_steps=2", "data.val_sequences=3")
    resumed = launch(tmp_path / "run", *SHORT, f"ckpt_path={first}/checkpoints/last.ckpt", *options)
    assert "what was measured at the switch is left out: the held-out text changed since" in resumed.stdout
    found = metrics(tmp_path / "run")
    assert found["step"] == 3
    assert "val/loss_quantized" in found
    assert "val/loss_ptq" not in found


def test_a_run_that_has_done_its_steps_gets_a_last_checkpoint_that_is_whole(first: Path, tmp_path: Path) -> None:
    run_dir, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    shutil.copytree(first / "checkpoints", checkpoints)
    whole = (checkpoints / "last.ckpt").read_bytes()
    (checkpoints / "step-0000003.ckpt").write_bytes(whole)
    (checkpoints / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    options = ("trainer.max_steps=3", "quant.start_step=1", "optim.warmup_steps=2", "ckpt_path=auto")
    output = launch(run_dir, *SHORT, *options).stdout
    assert "last.ckpt was cut short and is not used: its end is missing, or damaged" in output
    assert (checkpoints / "last.ckpt").read_bytes() == whole
