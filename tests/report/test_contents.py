"""What a report says: the numbers of the run's own files, and a sentence for what is missing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, metrics

from nvfp4_train.callbacks.run_record import started_by
from nvfp4_train.layer_table import append_rows
from nvfp4_train.report import write_report
from nvfp4_train.report.blocks import Block, Code, Contents, Picture, Section, Text
from nvfp4_train.report.comparison import comparison_blocks, comparisons, verdict
from nvfp4_train.report.contents import contents
from nvfp4_train.report.curves import curve_blocks
from nvfp4_train.report.html import page
from nvfp4_train.report.layers import heat_map_blocks
from nvfp4_train.report.markdown import document
from nvfp4_train.report.numbers import duration, number, statistic, with_interval
from nvfp4_train.report.run_files import RunFiles, read_history
from nvfp4_train.sequence_metrics import Interval, SequenceMetrics

STATES = ("master_at_switch", "ptq", "ptq_w4a16", "ptq_w4a4", "master", "quantized", "quantized_w4a16", "quantized_w4a4")
SECTIONS = (
    "What was run",
    "Curves",
    "PTQ, final and masters",
    "Layers",
    "The ten worst layers",
    "Quantizer health",
    "Memory and time",
    "Which readers were verified",
    "How to serve it",
    "How to run it again",
)


@pytest.fixture
def copy(run: tuple[Path, str], tmp_path: Path) -> Path:
    """The files of the run that a test may spoil."""
    return Path(shutil.copytree(run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "export")))


def test_sequences_have_the_means_that_the_run_reports(run: tuple[Path, str]) -> None:
    found = metrics(run[0])
    saved = json.loads((run[0] / "sequences.json").read_text())
    assert set(saved) == set(STATES)
    for state, of_state in saved.items():
        sequences = SequenceMetrics.from_dict(of_state)
        assert len(sequences.positions) == 4
        for name, mean in sequences.means().items():
            assert found[f"val/{name}_{state}"] == mean, (name, state)


def test_the_run_says_where_its_report_is(run: tuple[Path, str]) -> None:
    run_dir, output = run
    assert f"  report          {run_dir / 'report.html'}\n" in output
    assert "warning: no report" not in output


def test_the_report_has_every_part_with_the_numbers_of_the_run(run: tuple[Path, str]) -> None:
    run_dir, _ = run
    text = (run_dir / "report.md").read_text()
    assert tuple(re.findall("^## (.*)", text, re.M)) == SECTIONS
    html = (run_dir / "report.html").read_text()
    assert tuple(re.findall("<h2>(.*?)</h2>", html)) == SECTIONS
    found, record = RunFiles.read(run_dir), json.loads((run_dir / "run.json").read_text())
    (main,) = (one for one in comparisons(found) if (one.name, one.serving) == ("kl", "w4a4"))
    assert main.ptq is not None
    assert main.final is not None
    assert main.gained is not None
    assert main.ptq.mean == metrics(run_dir)["val/kl_ptq_w4a4"]
    assert main.final.mean == metrics(run_dir)["val/kl_quantized_w4a4"]
    assert main.gained.mean == pytest.approx(main.final.mean - main.ptq.mean)
    for cell in (main.cell(main.ptq), main.cell(main.final), main.cell(main.gained, sign=True)):
        assert cell in html
    assert ("not significant" in html.partition("</section>")[0]) == (
        not main.gained.excludes_zero or not main.cost.excludes_zero
    )
    # Means lie in their intervals.
    for one in comparisons(found):
        for interval in filter(None, (one.masters, one.ptq, one.final, one.gained, one.cost)):
            assert interval.low <= interval.mean + 1e-12
            assert interval.mean <= interval.high + 1e-12
    assert "NVFP4 on marked at step 3" in text
    assert text.count("Heat map of SQNR, dB") == 1
    assert len(found.layers) == 14
    worst = text.partition("## The ten worst layers")[2].partition("##")[0]
    assert worst.count("\n| model.layers") == 10
    assert record["command"].startswith("python launch/train.py run_dir=")
    assert f"```sh\n{record['command']}\n```" in text
    assert f"vllm serve {run_dir / 'export'}" in text
    assert "nvfp4\\_train's reader in NumPy" in text
    assert "LlamaForCausalLM: " in text
    assert 0 < record["steps_s"] < 600
    assert record["peak_host_bytes"] > 2**26
    assert (record["first_step"], record["last_step"], record["start_step"]) == (0, 9, 3)
    assert record["tokens"] == 9 * 4 * 64


MISSING = {
    "sequences.json": ("sequences.json is not in this folder", "callbacks.run_summary writes it"),
    "layers.csv": ("No heat maps: layers.csv is not in this folder", "callbacks.scale_stats writes it"),
    "metrics.csv": ("No curves: metrics.csv", "logger=csv writes it"),
    "run.json": ("Exports are not known: run.json is not in this folder", "callbacks.report writes it"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_with_the_option_that_gives_it(name: str, copy: Path) -> None:
    (copy / name).unlink()
    if name == "metrics.csv":
        results = metrics(copy)
        del results["validations"]
        (copy / "metrics.json").write_text(json.dumps(results))
    found = contents(RunFiles.read(copy))
    text = page(found)
    assert all(words in text for words in MISSING[name])
    assert all(section.blocks for section in found.sections)


def test_the_launcher_makes_the_same_report_anew(copy: Path) -> None:
    path = write_report(copy)
    texts = [file.read_bytes() for file in (path, copy / "report.md")]
    path.unlink()
    command = [sys.executable, ROOT / "launch" / "report.py", copy]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == f"{path}\n", result.stderr
    assert [file.read_bytes() for file in (path, copy / "report.md")] == texts
    assert not list(copy.glob("*.tmp"))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RUN_DIR must be the folder of a run, with metrics.json or .hydra/config.yaml, got "):
        write_report(tmp_path)


def test_text_of_the_run_is_no_markup(copy: Path) -> None:
    record = json.loads((copy / "run.json").read_text())
    evil = "<b>&\"'`|*_[x](y)"
    record |= {"model": evil, "command": f"python launch/train.py +name='{evil}'"}
    (copy / "run.json").write_text(json.dumps(record))
    html = write_report(copy).read_text()
    assert "<b>" not in html
    assert html.count("&lt;b&gt;&amp;&quot;&#x27;`|*_[x](y)") >= 2
    text = (copy / "report.md").read_text()
    assert "| model | \\<b>&\"'\\`\\|\\*\\_\\[x\\](y) (LlamaForCausalLM) |" in text


def test_a_report_of_48_layers_is_below_two_megabytes(copy: Path) -> None:
    kinds = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = ("sqnr_db", "underflow_share", "scale_at_floor_share", "flip_rate", "oscillation_rate", "edge_share")
    rows = {
        f"model.layers.{depth}.{kind}": {name: 20 + depth / 7 + place + len(kind) / 10 for place, name in enumerate(names)}
        for depth in range(48)
        for kind in kinds
    }
    (copy / "layers.csv").unlink()
    append_rows(copy / "layers.csv", 9, rows)
    long = ["epoch,step,train/loss", *(f"0,{step},{2 + 1 / (step + 1)}" for step in range(20_000))]
    (copy / "metrics.csv").write_text("\n".join(long) + "\n")
    path = write_report(copy)
    assert path.read_text().count("Heat map of ") == len(names)
    assert 2e4 < path.stat().st_size < 2e6


def test_a_resumed_run_has_one_history(tmp_path: Path) -> None:
    """Its first process logged steps 0 to 3 and was killed, the second went on from step 2."""
    (tmp_path / "metrics.1.csv").write_text("step,train/loss,quant/a.b/x\n0,5,1\n1,4,1\n2,3,1\n3,9,1\n4,1e-,1")
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n2,3.5,\n3,,7\n4,2,\n")
    history = read_history(tmp_path)
    assert history == {"train/loss": [(0, 5), (1, 4), (2, 3.5), (4, 2)], "val/loss": [(3, 7)]}


def test_a_run_without_quantized_training_is_compared_as_ptq(copy: Path) -> None:
    config = (copy / ".hydra" / "config.yaml").read_text()
    (copy / ".hydra" / "config.yaml").write_text(config.replace("  enabled: true\n", "  enabled: false\n", 1))
    files = RunFiles.read(copy)
    assert files.start_step is None
    found = comparisons(files)
    assert {one.final for one in found} == {one.gained for one in found} == {None}
    (sentence, cost, few) = verdict(files, found[1])
    assert few == "That is of 4 held-out sequences, too few to be sure of it."
    assert "without training in NVFP4" in sentence
    assert "quantization costs +" in cost


def test_advice_is_not_to_do_what_is_done(copy: Path) -> None:
    """Of a run without quantization in training, and of one that was not validated before its end."""
    config = (copy / ".hydra" / "config.yaml").read_text()
    (copy / ".hydra" / "config.yaml").write_text(config.replace("  enabled: true\n", "  enabled: false\n", 1))
    (said,) = [block.text for block in comparison_blocks_of(copy) if isinstance(block, Text) and "no column" in block.text]
    assert said.endswith("nothing was trained in NVFP4. quant.enabled=true does; this run had quant.enabled=false.")
    results = metrics(copy)
    del results["validations"]
    (copy / "metrics.json").write_text(json.dumps(results))
    header, *rows = (copy / "metrics.csv").read_text().splitlines()
    at = header.split(",").index("val/kl")
    (copy / "metrics.csv").write_text("\n".join([header, *(row for row in rows if not row.split(",")[at])]) + "\n")
    curve, said = curve_blocks(RunFiles.read(copy))
    assert isinstance(curve, Picture)
    assert curve.says.startswith("KL to the original (the loss) over steps")
    assert isinstance(said, Text)
    assert said.text.startswith("There is no curve of the KL on held-out text: there was no validation.")


def comparison_blocks_of(run_dir: Path) -> list[Block]:
    files = RunFiles.read(run_dir)
    return list(comparison_blocks(files, comparisons(files)))


def test_what_was_not_measured_has_its_reason(copy: Path) -> None:
    (copy / "layers.csv").unlink()
    append_rows(copy / "layers.csv", 9, {f"model.layers.{depth}.mlp.up_proj": {"sqnr_db": 20.0 + depth} for depth in range(2)})
    config = (copy / ".hydra" / "config.yaml").read_text()
    (copy / ".hydra" / "config.yaml").write_text(config.replace("activations: nvfp4", "activations: none", 1))
    *_, said = heat_map_blocks(RunFiles.read(copy))
    assert isinstance(said, Text)
    assert "inputs that are clipped: only W4A4 has them (quant.activations=nvfp4)." in said.text
    two = "codes that changed since the last look, weights that oscillate: they need two looks without a stop between them; a lower"
    assert f"{two} callbacks.scale_stats.every_n_steps gives more looks." in said.text
    assert "underflow to 0" in said.text.partition(": callbacks.scale_stats.statistics adds statistics.")[0]


def test_a_loss_is_drawn_as_dots_on_an_axis_of_its_own(copy: Path) -> None:
    saved = json.loads((copy / "sequences.json").read_text())
    for state in saved.values():
        for name in ("kl", "top1_agreement", "loss"):
            del state["values"][name]
        state["values"]["loss"] = state["values"].pop("cross_entropy")
    of_kl = next(block for block in comparison_blocks_of(copy) if isinstance(block, Picture))
    (copy / "sequences.json").write_text(json.dumps(saved))
    of_loss = next(block for block in comparison_blocks_of(copy) if isinstance(block, Picture))
    assert (len(of_kl.figure.axes[0].patches), len(of_loss.figure.axes[0].patches)) == (4, 0)
    assert of_kl.figure.axes[0].get_xlim()[0] <= 0
    low, high = of_loss.figure.axes[0].get_xlim()
    assert 5 < low < high < 6


def test_a_reader_that_was_not_run_is_named_first(copy: Path) -> None:
    write_report(copy)
    assert "| transformers and serving engines | not run |" in (copy / "report.md").read_text()


def test_backticks_do_not_end_a_block_of_code() -> None:
    contents = Contents(title="", subtitle="", verdict=[], tiles=[], sections=[Section("", [Code("a ``` b"), Code("c")])])
    assert "````sh\na ``` b\n````\n\n```sh\nc\n```\n" in document(contents)


def test_shares_of_oscillating_weights_have_names_of_their_own() -> None:
    for name in ("oscillating_share", "frozen_share"):
        assert statistic(name).full_label not in (name, f"{name}, %")


def test_metrics_of_other_text_are_no_pair(copy: Path) -> None:
    saved = json.loads((copy / "sequences.json").read_text())
    for state in ("ptq", "ptq_w4a16", "ptq_w4a4"):
        saved[state]["positions"][0] += 1
    (copy / "sequences.json").write_text(json.dumps(saved))
    files = RunFiles.read(copy)
    found = comparisons(files)
    assert {one.gained for one in found} == {None}
    assert "There is no PTQ to compare it with" in verdict(files, found[0])[0]


@pytest.mark.parametrize("state", ["of one sequence", "with a NaN"])
def test_a_mean_without_an_interval_is_shown_and_never_significant(state: str, copy: Path) -> None:
    saved = json.loads((copy / "sequences.json").read_text())
    for of_state in saved.values():
        if state == "with a NaN":
            of_state["values"] = {name: [float("nan"), *values[1:]] for name, values in of_state["values"].items()}
        else:
            of_state["positions"] = of_state["positions"][:1]
            of_state["values"] = {name: values[:1] for name, values in of_state["values"].items()}
    (copy / "sequences.json").write_text(json.dumps(saved))
    text = write_report(copy).read_text()
    assert "(no interval)" in text
    assert "not significant at 95%" in text
    assert "significant at 95%" not in text.replace("not significant at 95%", "")
    assert f"That is of {len(saved['ptq']['positions'])} held-out sequence" in text


def test_the_kl_is_that_of_the_teacher_and_other_divergences_stand_apart(copy: Path) -> None:
    (copy / "metrics.csv").write_text(
        "step,train/loss,train/divergence,val/loss,val/kl\n0,3,0.5,,\n1,2,0.4,3,0.6\n2,2,0.4,3,0.5\n"
    )
    (copy / "sequences.json").unlink()
    (copy / "metrics.json").write_text(json.dumps(metrics(copy) | {"validations": []}))

    def curves(**loss: object) -> str:
        (copy / ".hydra" / "config.yaml").write_text(json.dumps({"quant": {"start_step": 0}, "loss": loss}))
        return document(contents(RunFiles.read(copy)))

    assert "KL to the original over steps, in nats a token: training from 0.5000" in curves()
    assert "KL to the original over steps, in nats a token: held-out text from" in curves(divergence="jsd")
    assert "KL to the original over steps, in nats a token: held-out text from" in curves(temperature=2.0)


def test_statistics_and_metrics_of_others_are_shown_under_their_names(copy: Path) -> None:
    (copy / "layers.csv").unlink()
    append_rows(
        copy / "layers.csv", 9, {f"model.layers.{at}.mlp.up_proj": {"sqnr_db": 20.0, "kurtosis": 3.0 + at} for at in (0, 1)}
    )
    saved = json.loads((copy / "sequences.json").read_text())
    for of_state in saved.values():
        of_state["values"]["plain"] = of_state["values"]["kl"]
    (copy / "sequences.json").write_text(json.dumps(saved))
    config = (copy / ".hydra" / "config.yaml").read_text()
    (copy / ".hydra" / "config.yaml").write_text(config.replace("teacher_path: null", "teacher_path: /models/large"))
    text = document(contents(RunFiles.read(copy)))
    assert "Heat map of kurtosis by kind and depth" in text
    assert "Plain\n" in text
    assert "plain, " not in text
    assert "is the teacher: loss.teacher_path=/models/large" in text.replace("\\", "")


def test_numbers_are_short_and_say_on_which_side_of_zero_they_are() -> None:
    assert [number(value) for value in (0, 448, 20.4, 0.05, 1234.5, -0.5, 3e-5, float("nan"), None)] == [
        "0", "448", "20.40", "0.05000", "1,234", "-0.5000", "3.00e-05", "-", "-",
    ]  # fmt: skip
    assert with_interval(Interval(0.00066, 0.000007, 0.0018), sign=True) == "+0.000660 [+0.000007, +0.001800]"
    assert with_interval(Interval(-0.00001, -0.1, 0.1), sign=True) == "+0.000 [-0.100, +0.100]"
    assert with_interval(Interval(0.9171, 0.91, 0.9242), percent=True) == "91.7 [91.0, 92.4] %"
    assert with_interval(Interval(0.074, 0.068, 0.079), percent=True, sign=True) == "+7.4 [+6.8, +7.9] points"
    assert [duration(seconds) for seconds in (0.5, 75, 7300)] == ["0.5 s", "1 min 15 s", "2 h 1 min"]


def test_the_command_of_several_ranks_is_that_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python", "launch/train.py", "+recipe=quickstart", "quant.exclude=[*a b*]"]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert started_by(command, ranks=1, hosts=1) == "python launch/train.py +recipe=quickstart 'quant.exclude=[*a b*]'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    line = started_by(command, ranks=8, hosts=2)
    assert line == "torchrun --nnodes 2 --nproc-per-node 4 launch/train.py +recipe=quickstart 'quant.exclude=[*a b*]'"
    assert started_by((), ranks=1, hosts=1) is None
