"""Reports of runs that were stopped, that went on, or whose files are damaged."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import REPORTED, ROOT, launch

from nvfp4_train.callbacks.run_record import OF_TRAINING, earlier_times
from nvfp4_train.layer_table import append_rows
from nvfp4_train.report import write_report
from nvfp4_train.report.run_files import RunFiles

OPTIONS = (
    "loss=distillation",
    "quant.activations=nvfp4",
    "quant.start_step=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "callbacks.scale_stats.every_n_steps=2",
    "callbacks.export=null",
    "callbacks.served_check=null",
)
STOPPED = "Not finished: stopped at step {}. The same command with ckpt\\_path=auto continues it."


def stop(batch_idx: int) -> tuple[str, ...]:
    return (
        "+callbacks.stop._target_=stop_at_step.StopAtStep",
        f"+callbacks.stop.number={int(signal.SIGTERM)}",
        f"+callbacks.stop.batch_idx={batch_idx}",
    )


def report(run_dir: Path) -> str:
    write_report(run_dir)
    return (run_dir / "report.md").read_text()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of one run as it is stopped, ended, continued with nothing left to train, and stopped with more steps."""
    folder = tmp_path_factory.mktemp("stages")
    run_dir = folder / "run"
    commands: dict[str, tuple[str, ...]] = {
        "stopped": ("trainer.max_steps=6", *stop(3)),
        "ended": ("trainer.max_steps=6", "ckpt_path=auto"),
        "same": ("trainer.max_steps=6", "ckpt_path=auto"),
        "more": ("trainer.max_steps=12", "ckpt_path=auto", *stop(9)),
    }
    kept = {}
    for name, options in commands.items():
        is_stopped = name in ("stopped", "more")
        result = launch(run_dir, *OPTIONS, *options, small=REPORTED, check=not is_stopped)
        assert (result.returncode != 0) == is_stopped, result.stderr[-2000:]
        kept[name] = Path(shutil.copytree(run_dir, folder / name))
    return kept


def test_a_stopped_run_has_a_report_of_what_there_is(stages: dict[str, Path]) -> None:
    run_dir = stages["stopped"]
    assert not (run_dir / "metrics.json").exists()
    text = report(run_dir)
    assert STOPPED.format(4) in text
    assert "it is measured at the end of the run" in text
    assert "| optimizer steps | 4, not finished |" in text
    assert "| quantized | from step 2 on |" in text
    assert "held-out text from " in text
    assert "| SQNR, dB | " in text
    assert "took no training steps" not in text


@pytest.mark.parametrize(
    "names", [("metrics.csv", "checkpoints"), ("layers.csv", "checkpoints"), ("metrics.csv", "layers.csv")]
)
def test_any_file_tells_where_a_run_was_stopped(names: tuple[str, str], stages: dict[str, Path], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(stages["stopped"], tmp_path / "run"))
    for name in names:
        shutil.rmtree(run_dir / name) if (run_dir / name).is_dir() else (run_dir / name).unlink()
    files = RunFiles.read(run_dir)
    assert (files.step, files.finished_step, files.is_finished) == (4, None, False)


def test_a_run_that_has_ended_is_not_called_stopped(stages: dict[str, Path]) -> None:
    for name in ("ended", "same"):
        assert "Not finished" not in report(stages[name])


def test_a_run_with_nothing_left_to_train_keeps_its_times(stages: dict[str, Path]) -> None:
    ended, same = (json.loads((stages[name] / "run.json").read_text()) for name in ("ended", "same"))
    assert {name: ended[name] for name in OF_TRAINING} == {name: same[name] for name in OF_TRAINING}
    assert (same["first_step"], same["last_step"]) == (4, 6)
    assert "train/tokens_per_s" not in json.loads((stages["same"] / "metrics.json").read_text())
    text = report(stages["same"])
    assert "| 2 training steps | " in text
    assert "| 2 training steps | 0 s" not in text
    assert "| tokens a second, all ranks |" in text


def test_only_times_of_the_same_step_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert earlier_times(path, 6) == {}
    path.write_text(json.dumps({"last_step": 6, "steps_s": 3.5, "checks": []}))
    assert earlier_times(path, 6) == {"steps_s": 3.5}
    assert earlier_times(path, 7) == {}
    path.write_text("{")
    assert earlier_times(path, 6) == {}


def test_a_run_that_ended_and_went_on_says_of_which_step_numbers_are(stages: dict[str, Path]) -> None:
    run_dir = stages["more"]
    text = report(run_dir)
    assert STOPPED.format(10) in text
    assert "exports and times are of step 6, where it had ended before" in text
    files = RunFiles.read(run_dir)
    assert [step for step, _ in files.history["val/loss"]] == [2, 4, 6, 8]
    assert [step for step, _ in RunFiles.read(stages["ended"]).history["val/loss"]] == [2, 4, 6]
    assert files.layers_step == 10


def test_each_statistic_is_the_last_known_one_with_its_step(stages: dict[str, Path], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(stages["ended"], tmp_path / "run"))
    (run_dir / "layers.csv").unlink()
    (run_dir / "metrics.csv").write_text("step,quant/sqnr_db,quant/input_clipped_share\n2,20,0.25\n4,21,\n6,22,\n")
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    for step in (2, 4, 6):
        clipped = {"input_clipped_share": 0.25} if step == 2 else {}
        append_rows(
            run_dir / "layers.csv",
            step,
            {name: {"sqnr_db": 20.0 + step + depth, **clipped} for depth, name in enumerate(names)},
            statistics=["sqnr_db", "input_clipped_share"],
        )
    files = RunFiles.read(run_dir)
    assert files.layers[names[1]] == {"sqnr_db": 27.0, "input_clipped_share": 0.25}
    assert (files.layers_step, files.look_of("input_clipped_share")) == (6, 2)
    text = report(run_dir)
    assert "inputs that are clipped, % (step 2): 25" in text
    assert "| inputs that are clipped, % (step 2) |" in text
    assert "| inputs that are clipped, % | - | 25 (step 2) |" in text
    assert "25.00% of its inputs are clipped" in text
    assert "inputs that are clipped" not in text.partition("Not measured in this run")[2].partition("\n")[0]


SPOILED: dict[str, tuple[str, str]] = {
    "layers.csv": ("", ""),
    "metrics.json": ('{"step": 6, "quant/sqnr_db": "high"}', "quant/sqnr_db must be a number, got 'high'"),
    "metrics.json ": ('"text"', "must be an object, got 'text'"),
    "metrics.json  ": ('{"validations": [3]}', "'int' object has no attribute"),
    "run.json": ('{"command": "pyth', "Unterminated string"),
    "run.json ": ('{"ranks": 1}', "must have architecture, devices, ended, exports, "),
    "sequences.json": ('{"ptq": {}}', "'values'"),
    "metrics.csv": ("step,train/loss\n0,much\n", "could not convert string to float"),
    ".hydra/config.yaml": ("a: [", "while parsing"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_damaged_files_are_named_in_a_line(name: str, stages: dict[str, Path], tmp_path: Path) -> None:
    content, why = SPOILED[name]
    run_dir = Path(shutil.copytree(stages["ended"], tmp_path / "run"))
    path = run_dir / name.strip()
    path.write_text(content)
    if not why:
        assert "No heat maps: layers.csv is not in this folder, or empty." in report(run_dir)
        return
    with pytest.raises(ValueError, match=why) as raised:
        write_report(run_dir)
    assert str(raised.value).startswith(f"{path} is damaged: ")


def test_the_launcher_has_no_traceback_and_quotes_folders(stages: dict[str, Path], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(stages["ended"], tmp_path / "my run"))

    def launched() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, ROOT / "launch" / "report.py", run_dir], capture_output=True, text=True)

    assert launched().returncode == 0
    text = (run_dir / "report.md").read_text()
    assert f"python launch/report.py {shlex.quote(str(run_dir))}\n" in text
    assert f"python launch/export.py '{run_dir}/checkpoints/last.ckpt' FOLDER" in text.replace("\\_", "_")
    (run_dir / "metrics.json").write_text('{"step": ')
    found: Any = launched()
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {run_dir / 'metrics.json'} is damaged: ")
    assert len(found.stderr.splitlines()) == 1
