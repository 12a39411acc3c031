"""The launcher in processes of its own: two ranks give the numbers of one, and lm-evaluation-harness gets its models."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, forked_python, train_environment

from nvfp4_train.judge.tasks import MISSING

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks of questions with two answers. The right ones differ."""
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate(("first_task", "second_task")):
        rows = [
            {"question": f"what is {i}?", "choices": [" it is", " no"], "answer": int(number == 1 or i % 3 == 0)}
            for i in range(12)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{name}.jsonl"))
    return folder


def test_two_ranks_give_the_numbers_of_one(
    original: Path,
    run: Path,
    data: list[str],
    tasks: Path,
    evaluate: Callable[..., tuple[int, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Of models of all kinds, of which one is calibrated on five sequences, and of tasks, of which each rank takes one."""
    models = [f"model={original}", f"model=ptq:{original}", f"model=export@{run / 'export'}"]
    options = ["quant.rule=hessian", "quant.calibration.sequences=5", f"tasks_path={tasks}", "keep_sequences=true"]
    arguments = [*models, *data, *options, "+tasks=[first_task,second_task]", "fail_if.kl=1e-9"]
    code, one = evaluate(*arguments)
    assert code == 2
    printed = capsys.readouterr().out
    python, server = forked_python()
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "launch" / "evaluate.py", *arguments, "device=cpu", f"output={tmp_path / 'two.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=train_environment() | server)
    assert done.returncode == 1, done.stderr
    assert "failed: kl of export W4A16" in done.stdout, "no rank ends before the first one has written"
    two = json.loads((tmp_path / "two.json").read_text())
    assert (one.pop("computed")["ranks"], two.pop("computed")["ranks"]) == (1, 2)
    for found in (one, two):
        del found["time"], found["command"]
    assert one == two
    assert [line for line in done.stdout.splitlines() if " W4A" in line] == [
        line for line in printed.splitlines() if " W4A" in line
    ]
    assert len(one["results"]) == 5
    for row in one["results"]:
        assert row["tasks"].keys() == {"first_task", "second_task"}
        assert row["tasks"]["first_task"]["acc,none"] != row["tasks"]["second_task"]["acc,none"]
    assert "first_task   acc     " in printed


def test_without_the_package_tasks_are_refused_in_a_line(
    original: Path,
    data: list[str],
    evaluate: Callable[..., tuple[int, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find_spec(name, *a))
    assert evaluate(f"model={original}", *data, "+tasks=arc_easy") == (1, {})
    assert capsys.readouterr().err == f"error: {MISSING}\n"
