"""launch/sensitivity.py: what it writes, that its choice can be used as it is written, and that ranks share the work."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, SMALL, launch

from nvfp4_train.export import VerifyReport, verify_export
from nvfp4_train.run.build import build
from nvfp4_train.run.compose import compose_options
from nvfp4_train.run.sensitivity import run_sensitivity, sensitivity_options, take_own_options

QUICK = ("logger=none", "quant.calibration.sequences=8", "data.val_fraction=0.2")
FAMILIES = {
    "llama": (),
    "mixtral": ("+model.config.num_local_experts=4", "+model.config.num_experts_per_tok=2", "quant.activations=nvfp4"),
}


def compose(run_dir: Path, family: str, *overrides: str) -> dict[str, Any]:
    given = [*SMALL, *QUICK, f"model.config.model_type={family}", *FAMILIES[family], f"run_dir={run_dir}", *overrides]
    return compose_options(ROOT, given)[0]


def fit(options: dict[str, Any]) -> None:
    """What the launchers do, in this process."""
    torch.manual_seed(0)
    run_dir = Path(options["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer, module, data = build(options, trains=False)
    trainer.fit(module, data)


def found_in(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "sensitivity.json").read_text())


def units_of(found: dict[str, Any], level: str) -> list[dict[str, Any]]:
    return [unit for unit in found["units"] if unit["level"] == level]


def ptq_with(text: str, run_dir: Path, family: str, *overrides: str) -> tuple[VerifyReport, dict[str, Any]]:
    """The export of a run with what the tool wrote on its command line."""
    fit(compose(run_dir, family, *overrides, *shlex.split(text)))
    return verify_export(run_dir / "export"), json.loads((run_dir / "export" / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_is_used_as_it_is_written(family: str, tmp_path: Path) -> None:
    """The export has in bf16 what was chosen and nothing else, and takes as many bits as was said."""
    fit(sensitivity_options(compose(tmp_path / "found", family), bits=8, sequences=2, by="weight"))
    found = found_in(tmp_path / "found")
    chosen = found["configurations"]["chosen"]
    assert 4.5 < found["configurations"]["all"]["bits"] < chosen["bits"] <= 8
    assert chosen["in_bf16"]
    text = (tmp_path / "found" / "exclude.txt").read_text()
    assert text == f"quant.exclude=[{','.join(found['exclude'])}]\n"

    verified, config = ptq_with(text, tmp_path / "mixed", family)
    quantized = config["quantization_config"]
    (group,) = quantized["config_groups"].values()
    assert (group["input_activations"] is not None) == (found["serving"] == "w4a4")
    units = units_of(found, "weight")
    of_chosen = sum(unit["weights"] for unit in units if unit["label"] in chosen["in_bf16"])
    num_weights = sum(unit["weights"] for unit in units)
    # The folder counts quantized weights alone.
    bits = verified.bits_per_weight * (num_weights - of_chosen) + 16 * of_chosen
    assert verified.quantized_parameters == num_weights - of_chosen
    assert bits / num_weights == pytest.approx(chosen["bits"], rel=1e-9)
    names = [name for unit in units if unit["label"] in chosen["in_bf16"] for name in unit["parameters"]]
    for name in names:
        # Experts are one matrix each on disk.
        owner = name.removesuffix(".weight").removesuffix(".gate_up_proj").removesuffix(".experts.down_proj")
        assert any(ignored.startswith(owner.removesuffix(".experts")) for ignored in quantized["ignore"]), name


def test_all_levels_are_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(sensitivity_options(compose(tmp_path, "llama", "quant.exclude=[*.0.mlp.*]"), bits=6, sequences=2, by="weight"))
    output = capsys.readouterr().out
    found = found_in(tmp_path)
    assert [len(units_of(found, level)) for level in ("weight", "layer", "kind")] == [6, 2, 4]
    assert found["exclude"][0] == "*.0.mlp.*", "what was excluded before stays so"
    assert (
        "sensitivity: 2 held-out sequences to choose by, in 1 batches a rank; 14 forwards a batch (13 sets of weights, W4A16)"
        in output
    )
    assert "proven: the same bits" in output
    tables = (tmp_path / "sensitivity.md").read_text()
    for unit in found["units"]:
        assert f"| {unit['label']} " in tables
        assert unit["kl"]["w4a16"]["low"] <= unit["kl"]["w4a16"]["mean"] <= unit["kl"]["w4a16"]["high"]
    assert "Chosen minus first and last layers: KL " in output
    assert f'"$(cat {tmp_path}/exclude.txt)"' in output
    for name in ("sensitivity.png", "sensitivity_bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("by", ["layer", "kind"])
def test_larger_units_are_chosen_among(by: str, tmp_path: Path) -> None:
    options = compose(tmp_path, "llama", "model.config.num_hidden_layers=3")
    fit(sensitivity_options(options, bits=9, sequences=2, by=by))
    found = found_in(tmp_path)
    assert {unit["level"] for unit in found["units"]} == {"layer": {"layer", "kind"}, "kind": {"kind"}}[by]
    labels = {unit["label"] for unit in units_of(found, by)}
    assert found["configurations"]["chosen"]["in_bf16"]
    assert labels.issuperset(found["configurations"]["chosen"]["in_bf16"])
    assert (found["configurations"]["first and last layers"]["predicted_kl"] is None) == (by == "kind")


@pytest.mark.parametrize("starts", ["torchrun", "Lightning"])
def test_two_ranks_find_what_one_does(starts: str, tmp_path: Path) -> None:
    """Through the launcher, sequence by sequence, whoever starts the second rank."""
    # Whatever the number of ranks, a forward is of one sequence.
    same = ("model.compute_dtype=float32", "data.val_batch_size=1", "data.val_fraction=0.2")
    two = launch(
        tmp_path / "two",
        "bits=8",
        "sequences=2",
        *same,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        *(["trainer.devices=2"] if starts == "Lightning" else []),
        ranks=2 if starts == "torchrun" else 0,
        script="sensitivity.py",
    )
    assert two.stdout.count("# Sensitivity to quantization") == 1
    assert "2 held-out sequences to choose by, in 1 batches a rank" in two.stdout
    fit(sensitivity_options(compose(tmp_path / "one", "llama", *same), bits=8, sequences=2, by="weight"))
    found = {name: found_in(tmp_path / name) for name in ("one", "two")}
    for part in ("to_choose", "to_verify"):
        one, two_ = (found[name]["sequences"][part]["w4a16"] for name in ("one", "two"))
        assert one.keys() == two_.keys()
        for label, of_one in one.items():
            assert two_[label]["positions"] == of_one["positions"]
            for metric, values in of_one["values"].items():
                assert two_[label]["values"][metric] == pytest.approx(values, rel=1e-5, abs=1e-12), (label, metric)
    assert found["one"]["exclude"] == found["two"]["exclude"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        # Known once the model is, and before.
        (("bits=4.4",), "bits must be from 4.50"),
        (("by=channel",), "by must be weight, layer or kind, got 'channel'"),
    ],
)
def test_mistakes_are_one_line(overrides: tuple[str, ...], line: str, tmp_path: Path) -> None:
    result = launch(tmp_path / "run", *overrides, script="sensitivity.py", check=False)
    assert result.returncode == 1
    (error,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert error.startswith(f"error: {line}")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("bits=few", "bits must be a number, the mean bits of a weight, got 'few'"),
        ("bits=inf", "bits must be a number, the mean bits of a weight, got 'inf'"),
        ("sequences=0", "sequences must be a number of held-out sequences, at least 1, got '0'"),
        ("by=", "by must be weight, layer or kind, got ''"),
    ],
)
def test_slips_in_own_options_are_named(argument: str, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        take_own_options([argument])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer=fsdp2", "trainer must be one that holds the whole model on every rank, cpu, gpu or ddp, got a sharded one"),
        ("quant=none", "quant.enabled must be true"),
    ],
)
def test_runs_that_cannot_be_measured_are_refused_before_they_begin(override: str, line: str, tmp_path: Path) -> None:
    options = compose(tmp_path, "llama", override)
    with pytest.raises(SystemExit, match=f"error: {line}"):
        run_sensitivity(options, {"bits": 5.0, "sequences": 2, "by": "weight"})
    assert not list(tmp_path.iterdir())


def test_too_few_held_out_sequences_are_refused(tmp_path: Path) -> None:
    options = sensitivity_options(compose(tmp_path, "llama"), bits=5, sequences=2, by="weight")
    options["data"]["val_sequences"] = 1
    with pytest.raises(ValueError, match="every rank needs two held-out sequences, got 1 for 1 ranks; raise sequences, or"):
        fit(options)


def test_own_options_are_told_from_those_of_a_run() -> None:
    own, others = take_own_options(["+recipe=x", "bits=5", "by=kind", "data.seq_len=8", "--cfg", "job"])
    assert own == {"bits": 5.0, "sequences": 8, "by": "kind"}
    assert others == ["+recipe=x", "data.seq_len=8", "--cfg", "job"]
