"""Thresholds and their exit codes, and what is refused in one line before anything is measured."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged_models import save_model
from running import ROOT

from nvfp4_train.data.tokenizer import byte_tokenizer
from nvfp4_train.judge.results import Limits, Row, verdicts
from nvfp4_train.judge.subjects import find_subject
from nvfp4_train.run.evaluation_options import read_options
from nvfp4_train.sequence_metrics import SequenceMetrics

Evaluate = Callable[..., tuple[int, dict[str, Any]]]


def test_a_threshold_fails_by_the_mean_with_a_code_of_its_own(
    original: Path, data: list[str], evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"model={original}", f"model=ptq@ptq:{original}", *data]
    code, results = evaluate(*models, "fail_if.kl=0", "fail_if.loss=100", "fail_if.top1=0", "fail_if.ppl_ratio=0")
    assert code == 2
    judged = {(found["serving"], found["limit"]): found["exceeded"] for found in results["fail_if"]["verdicts"]}
    expected = {"kl": True, "loss": False, "ppl_ratio": True, "top1": False}
    assert judged == {(serving, name): failed for serving in ("w4a16", "w4a4") for name, failed in expected.items()}
    assert results["fail_if"]["failed"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("failed: kl of ptq W4A16 is 0.") for line in lines) == 1
    assert sum(line.startswith("passed: top1 of ptq W4A4 is ") for line in lines) == 1
    # Of equal models each share is 1, and not next to it.
    code, _ = evaluate(f"model=a@ptq:{original}", f"model=b@ptq:{original}", *data, "servings=[w4a16]", "fail_if.top1=1")
    assert code == 0
    code, results = evaluate(*models, "fail_if.kl=100", "fail_if.ppl_ratio=100")
    assert code == 0
    assert not results["fail_if"]["failed"]


@pytest.mark.parametrize(
    ("limit", "threshold", "value", "exceeded", "relation"),
    [
        ("kl", 0.05, [0.02, 0.12], True, "includes that"),
        ("kl", 0.05, [0.08, 0.082], True, "does not include that"),
        ("kl", 0.05, [0.02, 0.021], False, "does not include that"),
        ("kl", 0.05, [0.05, 0.05], False, "includes that"),
        ("kl", 0.05, [float("nan"), 0.01], True, "it has no interval"),
        ("top1", 0.9, [0.95, 0.8], True, "includes that"),
        ("top1", 0.9, [0.95, 0.948], False, "does not include that"),
        ("loss", 2.0, [1.0, 2.5], False, "includes that"),
        ("ppl_ratio", 1.5, [1.0, 2.5], True, "includes that"),
    ],
)
def test_a_verdict_says_whether_the_interval_includes_the_threshold(
    limit: str, threshold: float, value: list[float], exceeded: bool, relation: str
) -> None:
    names = {"kl": "kl", "top1": "top1_agreement", "loss": "loss", "ppl_ratio": "loss"}
    values = {name: np.array(value if name == names[limit] else [1.0, 1.0]) for name in names.values()}
    positions = np.array([8.0, 8.0])
    reference = SequenceMetrics(positions, {"loss": np.array([1.0, 1.0])})
    rows = [
        Row(label="first", serving="bf16", texts={"all": reference}, tasks={}),
        Row(label="other", serving="bf16", texts={"all": SequenceMetrics(positions, values)}, tasks={}),
        Row(label="quantized", serving="w4a16", texts={"all": SequenceMetrics(positions, values)}, tasks={}),
    ]
    (found,) = verdicts(rows, Limits(**{limit: threshold}))
    assert found.row is rows[2]
    assert found.is_exceeded == exceeded
    assert str(found).endswith(f" {relation}"), str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model={original}", "fail_if.kl=0.1"], "fail_if is about quantized models beside the first one, got none"),
        (["model={original}", "model=ptq:{original}", "fail_if.kl=-1"], "fail_if.kl must be at least 0, or null, got -1"),
        (["model={original}", "fail_if.kls=1"], "fail_if.kls: no such option; did you mean kl?"),
        (["model={original}", "+seqlen=1"], "evaluate.seqlen: no such option; did you mean seed?"),
        (["model={original}", "seed=x"], "evaluate.seed must be int, got 'x'"),
        (["model={original}", "servings=[w4a8]"], "servings must be some of w4a16, w4a4, got ['w4a8']"),
        (["model={original}", "model={original}"], "models must have different names, got original twice"),
        (["model=/nowhere"], "model='/nowhere' does not exist"),
        (["model={empty}"], "must be a folder with a config.json, a checkpoint, or the folder of a run"),
        (["model={original} quant.rule=mse"], "options of one model are those of quant.* of a ptq: model, got quant.rule=mse"),
        (["model=ptq:{original} data.seq_len=8"], "options of one model are those of quant.* of a ptq: model"),
        (["model=ptq:{original} quant.rule=best"], "quant.rule must be one of max, four_over_six, mse, hessian, got 'best'"),
        (["model={original}", "model=ptq:{run}/export"], "ptq: takes a model in bf16, got one that is quantized (export)"),
        (["model={original}", "model={wider}"], "one vocabulary to be compared, got 260 tokens of original and 272 of wider"),
        (["model={original}", "model={other}"], "one tokenizer to be compared, but other has other tokens than original"),
        (["model={original}", "data.seq_len=512"], "the model has 256 positions; got data.seq_len=512"),
        (["model={original}", "domains.all=x"], "domains must not have the name all"),
        (["model={original}", "domains.x.paths=y"], "domains.x takes a path, or options of the group data, got paths"),
        (
            ["model={original}", "domains.x.seq_len=32"],
            "domains.x must say where its text is: domains.x=PATH, got seq_len alone",
        ),
        (["model=ptq:{original}", "data.val_fraction=1"], "nothing is left to train on, or to calibrate with"),
        (["model={original}", "model={cut}"], "was cut short"),
        (["model={original}", "model={junk}"], "is no checkpoint"),
        (["model=alone@{alone}"], "alone has no tokenizer/ beside its checkpoint"),
        (["model={original}", "model={foreign}"], "config: format must be 'nvfp4-pack-quantized', got 'int-quantized'"),
        (["model={original}", "tasks=[no_such_task]", "tasks_path={empty}"], "got no_such_task"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_judged_is_refused_in_a_line(
    arguments: list[str],
    message: str,
    original: Path,
    run: Path,
    data: list[str],
    evaluate: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"original": original, "run": run, "empty": tmp_path / "empty"}
    places |= {name: tmp_path / name for name in ("wider", "other", "cut", "junk", "alone", "foreign")}
    places["empty"].mkdir()
    if "model={wider}" in arguments:
        save_model(places["wider"], vocab_size=272)
    if "model={other}" in arguments:
        save_model(places["other"])
        byte_tokenizer().save_pretrained(places["other"])
    checkpoint = (run / "checkpoints" / "last.ckpt").read_bytes()
    places["cut"].write_bytes(checkpoint[: len(checkpoint) // 2])
    places["junk"].write_bytes(b"no checkpoint at all")
    places["alone"].write_bytes(checkpoint)
    shutil.copytree(run / "export", places["foreign"])
    settings = (run / "export" / "config.json").read_text()
    (places["foreign"] / "config.json").write_text(settings.replace("nvfp4-pack-quantized", "int-quantized"))
    if "tasks=[no_such_task]" in arguments:
        pytest.importorskip("lm_eval.tasks")
        monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", _own_tasks_alone)
    code, results = evaluate(*data, *(argument.format_map(places) for argument in arguments))
    assert (code, results) == (1, {})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output must be a file, got the folder"):
        read_options(ROOT, [f"output={tmp_path}"])


def _own_tasks_alone(self: Any, include_path: str | None = None, **_: Any) -> None:
    """A manager of a folder without tasks, in no time."""
    self._all_tasks, self._all_subtasks = [], []


@pytest.mark.parametrize(
    ("given", "label", "path", "options"),
    [
        ("a/b", "b", "a/b", ()),
        ("ours@a/b", "ours", "a/b", ()),
        ("ptq:a/b quant.rule=max", "ptq:b rule=max", "a/b", ("quant.rule=max",)),
        ("max@ptq:a/b  quant.rule=max quant.exclude=[*x*,y]", "max", "a/b", ("quant.rule=max", "quant.exclude=[*x*,y]")),
    ],
)
def test_a_model_on_the_command_line(given: str, label: str, path: str, options: tuple[str, ...]) -> None:
    found = find_subject(given)
    assert (found.label, found.path, found.options) == (label, path, options)


def test_paths_may_hold_spaces_and_at_signs(original: Path, tmp_path: Path) -> None:
    (tmp_path / "a model@home").symlink_to(original)
    found = find_subject(f"{tmp_path / 'a model@home'}")
    assert (found.label, found.path, found.kind) == ("a model@home", f"{tmp_path / 'a model@home'}", "bf16")


@pytest.mark.parametrize("arguments", [[], ["data.seq_len=8"], ["--unknown"]], ids=str)
def test_the_launcher_without_a_model_ends_with_1(arguments: list[str]) -> None:
    """2 is the code of a threshold, and would be that of argparse."""
    command = [sys.executable, ROOT / "launch" / "evaluate.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
