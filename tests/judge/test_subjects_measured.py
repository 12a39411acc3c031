"""launch/evaluate.py in one process: its numbers are those of runs, and of what they leave on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, metrics

from nvfp4_train.export.convert import convert_folder
from nvfp4_train.metrics import evaluation_metric
from nvfp4_train.run.evaluation import run_evaluation
from nvfp4_train.sequence_metrics import SequenceMetrics

METRICS = {"loss": "cross_entropy", "kl": "kl", "top1_agreement": "top1_agreement"}
"""Names here, and in metrics.json of a run that distills."""


@pytest.fixture(scope="module")
def evaluated(
    original: Path, run: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """All kinds of models side by side: the results, and what was printed of them."""
    folder = tmp_path_factory.mktemp("evaluated")
    decoded = folder / "decoded"
    convert_folder(run / "export", decoded, to="bf16")
    models = [
        original,
        f"ptq@ptq:{original}",
        f"last@{run / 'checkpoints' / 'last.ckpt'}",
        f"run@{run}",
        f"export@{run / 'export'}",
        f"modelopt@{run / 'export_modelopt'}",
        decoded,
    ]
    output = folder / "deep" / "evaluation.json"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(map(str, texts))))
        code = run_evaluation(ROOT, [*(f"model={model}" for model in models), *data, f"output={output}", "keep_sequences=true"])
    assert code == 0, printed
    assert [file.name for file in output.parent.iterdir()] == ["evaluation.json"]
    return json.loads(output.read_text()), "\n".join(printed)


def row(results: dict[str, Any], model: str, serving: str) -> dict[str, Any]:
    (found,) = [row for row in results["results"] if (row["model"], row["serving"]) == (model, serving)]
    return found


@pytest.mark.parametrize("serving", ["w4a16", "w4a4"])
@pytest.mark.parametrize(("model", "state"), [("last", "quantized"), ("export", "quantized"), ("ptq", "ptq")])
def test_the_numbers_are_those_that_the_run_reported(
    model: str, state: str, serving: str, evaluated: tuple[dict[str, Any], str], run: Path
) -> None:
    """Of its last weights, and of those that the switch made of the original, calibrated on the same text."""
    reported, found = metrics(run), row(evaluated[0], model, serving)["texts"]["all"]
    for name, of_run in METRICS.items():
        expected = reported[evaluation_metric(of_run, state, serving)]
        assert found[name]["mean"] == pytest.approx(expected, rel=1e-6), name
        assert found[name]["low"] < expected < found[name]["high"]


@pytest.mark.parametrize("serving", ["w4a16", "w4a4"])
def test_a_checkpoint_and_its_exports_give_the_same_bits(serving: str, evaluated: tuple[dict[str, Any], str]) -> None:
    checkpoint = row(evaluated[0], "last", serving)["sequences"]["all"]
    assert min(checkpoint["values"]["kl"]) > 0
    for other in ("run", "export", "modelopt"):
        assert row(evaluated[0], other, serving)["sequences"]["all"] == checkpoint, other
    assert row(evaluated[0], "ptq", serving)["sequences"]["all"] != checkpoint


def test_a_decoded_folder_computes_as_w4a16_does(evaluated: tuple[dict[str, Any], str]) -> None:
    decoded = row(evaluated[0], "decoded", "bf16")
    assert decoded["sequences"] == row(evaluated[0], "last", "w4a16")["sequences"]


def test_what_was_found_is_told(evaluated: tuple[dict[str, Any], str]) -> None:
    results, printed = evaluated
    assert [(model["label"], model["kind"]) for model in results["models"]] == [
        ("original", "bf16"),
        ("ptq", "ptq"),
        ("last", "checkpoint"),
        ("run", "checkpoint"),
        ("export", "export"),
        ("modelopt", "export"),
        ("decoded", "bf16"),
    ]
    for line in ("last: checkpoint of step 3, ", "modelopt: exported folder (modelopt), ", "original: bf16 folder, "):
        assert line in printed
    assert results["schema"] == 1
    assert results["data"]["texts"]["all"]["sequences"] == len(results["results"][0]["sequences"]["all"]["positions"])
    assert results["results"][0]["texts"]["all"].keys() == {"loss", "perplexity"}


def test_only_what_the_assistant_writes_counts(evaluated: tuple[dict[str, Any], str]) -> None:
    positions = row(evaluated[0], "last", "w4a16")["sequences"]["all"]["positions"]
    assert 0 < max(positions) < 127
    assert evaluated[0]["data"]["texts"]["all"]["positions"] == sum(positions)


def test_differences_are_paired_and_those_that_are_none_are_marked(evaluated: tuple[dict[str, Any], str]) -> None:
    results, printed = evaluated

    def difference(model: str, serving: str, base: str) -> dict[str, Any]:
        (found,) = [
            found
            for found in results["differences"]
            if (found["model"], found["serving"], found["base"]) == (model, serving, base)
        ]
        return found["metrics"]

    last, ptq = (SequenceMetrics.from_dict(row(results, model, "w4a4")["sequences"]["all"]) for model in ("last", "ptq"))
    for name, found in difference("last", "w4a4", "ptq").items():
        expected = last.difference(ptq, name)
        assert (found["mean"], found["low"], found["high"]) == tuple(expected)
        assert found["significant"] == expected.excludes_zero
    to_original = difference("decoded", "bf16", "original")["loss"]
    assert to_original == difference("last", "w4a16", "original")["loss"]
    lines = [line for line in printed.splitlines() if line.startswith(("export W4A4 - ptq W4A4", "run W4A4 - ptq W4A4"))]
    assert len(lines) == 2
    assert lines[0].count("not significant") == lines[1].count("not significant")


def test_a_model_beside_itself_differs_in_nothing(
    original: Path, data: list[str], evaluate: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = evaluate(f"model=a@{original}", f"model=b@{original}", *data)
    assert code == 0
    found = row(results, "b", "bf16")["texts"]["all"]
    assert found["kl"] == {"mean": 0, "low": 0, "high": 0}
    assert found["top1_agreement"]["mean"] == pytest.approx(1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("b bf16 - a bf16")]
    assert "+0.0000 ±0.0000 (not significant)" in line


def test_texts_of_their_own_and_all_of_them(
    original: Path, run: Path, evaluate: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    """A domain is a path, or any options of the data. One is held out whole, the other by the usual share."""
    for name, line in (("words", "a word is a word {}\n"), ("numbers", "{} plus {} is more\n")):
        text = "".join(line.format(i, i * i) for i in range(400))
        (tmp_path / f"{name}.txt").write_text(text)
    code, results = evaluate(
        f"model={original}",
        f"model=export@{run / 'export'}",
        f"domains.words={tmp_path / 'words.txt'}",
        f"domains.numbers={tmp_path / 'numbers.txt'}",
        "domains.numbers.val_fraction=1",
        "domains.numbers.val_sequences=null",
        "data.seq_len=64",
        "data.val_fraction=0.25",
        "data.val_sequences=4",
        "servings=[w4a16]",
        "keep_sequences=true",
    )
    assert code == 0
    assert [list(row["texts"]) for row in results["results"]] == 2 * [["all", "words", "numbers"]]
    assert {row["serving"] for row in results["results"]} == {"bf16", "w4a16"}
    found = row(results, "export", "w4a16")["sequences"]
    assert found["all"]["positions"] == found["words"]["positions"] + found["numbers"]["positions"]
    assert found["all"]["values"]["kl"] == found["words"]["values"]["kl"] + found["numbers"]["values"]["kl"]
    assert len(found["numbers"]["positions"]) > 2 * len(found["words"]["positions"])
    texts = results["data"]["texts"]
    assert texts["words"]["fingerprint"] != texts["numbers"]["fingerprint"]


def test_options_of_one_model_and_labels(
    original: Path, data: list[str], evaluate: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    rules = [f"model=ptq:{original}", f"model=ptq:{original} quant.rule=mse quant.equalize=none"]
    code, results = evaluate(f"model={original}", *rules, *data, "servings=[w4a16]")
    assert code == 0
    found = {row["model"]: row["texts"]["all"] for row in results["results"]}
    assert list(found) == ["original", "ptq:original", "ptq:original rule=mse equalize=none"]
    assert found["ptq:original"]["kl"] != found["ptq:original rule=mse equalize=none"]["kl"]


def test_a_quantized_model_may_be_the_reference(
    original: Path, run: Path, data: list[str], evaluate: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    code, results = evaluate(f"model=export@{run / 'export'}", f"model=last@{run}", *data, "servings=[w4a4,w4a16]")
    assert code == 0
    assert [(row["model"], row["serving"]) for row in results["results"]] == [
        ("export", "w4a16"),
        ("last", "w4a16"),
        ("last", "w4a4"),
    ]
    assert row(results, "last", "w4a16")["texts"]["all"]["kl"]["mean"] == 0
    assert row(results, "last", "w4a4")["texts"]["all"]["kl"]["mean"] > 0
    assert "measured as W4A16 alone" in results["models"][0]["notes"][0]


def test_without_a_calibration_there_is_w4a16_alone(
    original: Path, data: list[str], evaluate: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["quant.calibration.sequences=0", "quant.equalize=none"]
    code, results = evaluate(f"model={original}", f"model=ptq@ptq:{original}", *data, *options)
    assert code == 0
    assert [row["serving"] for row in results["results"]] == ["bf16", "w4a16"]
    assert "ptq: measured as W4A16 alone: quant.calibration.sequences=0" in capsys.readouterr().out
    code, results = evaluate(f"model={original}", f"model=ptq@ptq:{original}", *data, *options, "servings=[w4a4]")
    assert (code, results) == (1, {})
    assert "must be measured as one of servings=['w4a4']" in capsys.readouterr().err
