"""Folders turned into other formats: the same bytes as an export of that format, there and back, and one line for bad input."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import CASES, Trained, read_tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nvfp4_train.export import ExportError, convert, shards, verify_export
from nvfp4_train.export.convert import convert_folder, format_of
from nvfp4_train.export.ignored import translate

SCRIPT = Path(__file__).parents[2] / "launch" / "convert.py"
CaseOf = Callable[[str], Trained]
OTHER = {"compressed_tensors": "modelopt", "modelopt": "compressed_tensors"}


def served(model: Trained, serving: str) -> Trained:
    return model.with_quantized_inputs() if serving == "w4a4" else model


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the model card, which tells of the conversion."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "README.md"}


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("serving", ["w4a16", "w4a4"])
@pytest.mark.parametrize("name", CASES)
def test_a_converted_folder_is_the_exported_one_to_the_byte_there_and_back(
    name: str, serving: str, cases: CaseOf, tmp_path: Path
):
    model = served(cases(name), serving)
    for format in OTHER:
        # Several files, and an index.
        model.export(tmp_path / format, format=format, max_shard_bytes=20_000)
    for format, other in OTHER.items():
        report = convert_folder(tmp_path / format, tmp_path / f"from {format}", to=other)
        assert contents(tmp_path / f"from {format}") == contents(tmp_path / other)
        assert (report.source_format, report.target_format, report.rounded) == (format, other, 0)
        assert report.quantized == model.num_matrices()
        convert_folder(tmp_path / f"from {format}", tmp_path / f"{format} again", to=format)
        assert contents(tmp_path / f"{format} again") == contents(tmp_path / format)
    assert verify_export(tmp_path / "from modelopt", model.compute_weights()).compared


@pytest.mark.parametrize("format", OTHER)
@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "mixtral", "deepseek_v3", "hrm_text"])
def test_a_plain_folder_loads_in_transformers_with_equal_logits(name: str, format: str, cases: CaseOf, tmp_path: Path):
    """Also of models whose packed folder transformers does not load."""
    model = cases(name)
    model.export(tmp_path / "packed", format=format)
    convert_folder(tmp_path / "packed", tmp_path / "plain", to="bf16")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dense, input_ids = model.dense_model(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids).logits, dense(input_ids).logits)


def test_other_files_are_kept_and_those_of_the_source_format_are_not(cases: CaseOf, tmp_path: Path):
    source = tmp_path / "source"
    cases("llama").export(source, format="modelopt")
    kept = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "preprocessor_config.json": "{}",
        "modeling_x.py": "x = 1",
    }
    for name, text in kept.items():
        (source / name).write_text(text)
    (source / "additional").mkdir()
    (source / "additional" / "a.txt").write_text("a")
    # A download of the hub is a folder of links.
    (source / "linked.txt").symlink_to(source / "tokenizer.json")
    convert_folder(source, tmp_path / "out", to="compressed_tensors")
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out" / "additional" / "a.txt").read_text() == "a"
    assert not (tmp_path / "out" / "linked.txt").is_symlink()
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_what_the_source_ignores_beyond_its_layers_is_ignored_by_the_result(cases: CaseOf, tmp_path: Path):
    source = tmp_path / "source"
    cases("mixtral").export(source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["ignore"] += ["mtp.fc", r"re:^mtp\.layers\.0\..*", r"re:vision_tower\.blocks\."]
    (source / "config.json").write_text(json.dumps(config))
    convert_folder(source, tmp_path / "out", to="modelopt")
    excluded = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert excluded[-3:] == ["mtp.fc", "mtp.layers.0.*", "vision_tower.blocks.*"]
    convert_folder(tmp_path / "out", tmp_path / "back", to="compressed_tensors")
    ignored = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored[-3:] == ["mtp.fc", r"re:mtp\.layers\.0\..*", r"re:vision_tower\.blocks\..*"]


@pytest.mark.parametrize(
    ("entry", "format", "wanted"),
    [
        ("lm_head", "modelopt", "lm_head"),
        (r"re:.*\.mlp\.experts\..*", "modelopt", "*.mlp.experts.*"),
        (r"re:model\.gate$", "modelopt", "model.gate"),
        (r"re:model\.gate", "modelopt", "model.gate*"),
        ("re:model.gate$", "modelopt", "model?gate"),
        ("model.layers.0*", "compressed_tensors", r"re:model\.layers\.0.*"),
        ("*.gate", "compressed_tensors", r"re:.*\.gate$"),
        ("lm_head", "compressed_tensors", "lm_head"),
    ],
)
def test_entries_are_translated(entry: str, format: str, wanted: str):
    assert translate(entry, format) == wanted


@pytest.mark.parametrize(
    ("entry", "format"), [(r"re:(a|b)", "modelopt"), (r"re:a\d", "modelopt"), ("re:[ab]", "modelopt"), ("[ab]", "compressed_tensors")]
)  # fmt: skip
def test_entries_without_a_counterpart_are_refused_by_name(entry: str, format: str):
    with pytest.raises(ValueError, match="translated|no wildcard stands for it") as error:
        translate(entry, format)
    assert repr(entry) in str(error.value)


def test_parts_of_a_weight_in_several_files_come_together(cases: CaseOf, tmp_path: Path):
    cases("llama").export(tmp_path / "one")
    cases("llama").export(tmp_path / "scattered")
    tensors = read_tensors(tmp_path / "one")
    (tmp_path / "scattered" / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        # Codes, block scales and global scales in files of their own.
        part = {key: t for key, t in tensors.items() if (2 if "global" in key else key.endswith("_scale")) == number}
        save_file(part, tmp_path / "scattered" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (tmp_path / "scattered" / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_folder(tmp_path / "scattered", tmp_path / "out", to="modelopt")
    cases("llama").export(tmp_path / "wanted", format="modelopt")
    wanted = read_tensors(tmp_path / "wanted")
    found = read_tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(tensor.view(torch.uint8).equal(wanted[key].view(torch.uint8)) if tensor.dim() else tensor == wanted[key]
               for key, tensor in found.items())  # fmt: skip


def test_global_scales_that_are_no_powers_of_two_keep_their_value_up_to_the_last_bit(cases: CaseOf, tmp_path: Path):
    model = cases("llama").with_rule(global_scale="exact")
    model.export(tmp_path / "source")
    report = convert_folder(tmp_path / "source", tmp_path / "out", to="modelopt")
    assert report.rounded > 0
    assert f"note: {report.rounded} global scales are no powers of two" in str(report)
    assert verify_export(tmp_path / "out", model.compute_weights(), format="modelopt").compared
    convert_folder(tmp_path / "source", tmp_path / "plain", to="bf16")


@pytest.mark.parametrize(
    ("to", "what"),
    [
        *(("modelopt", what) for what in ("codes", "block scales", "global scale", "input scale", "norm", "dropped")),
        *(("bf16", what) for what in ("value", "norm", "dropped")),
    ],
)
def test_a_wrong_result_is_found_and_leaves_nothing(
    to: str, what: str, cases: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    served(cases("llama"), "w4a4").export(tmp_path / "source")
    module = "model.layers.0.mlp.down_proj"

    def spoiled(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        if what == "norm":
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
        elif what == "dropped":
            del tensors["model.norm.weight"]
        elif to == "bf16":
            tensors[f"{module}.weight"][-1, -1] += 1
        else:
            part = {"codes": "weight", "block scales": "weight_scale", "global scale": "weight_scale_2"}.get(
                what, "input_scale"
            )
            tensor = tensors[f"{module}.{part}"].clone()
            # Every byte of these is valid, so that only a comparison finds it.
            tensor = tensor * 2 if tensor.dim() == 0 else (tensor.view(torch.uint8) ^ 1).view(tensor.dtype)
            tensors[f"{module}.{part}"] = tensor
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(convert if to == "modelopt" else shards, "save_file", spoiled)
    with pytest.raises(ExportError, match="^(convert|keys): "):
        convert_folder(tmp_path / "source", tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_does_not_pass_its_verification_is_not_converted(own_copy: Callable[[str], Path], tmp_path: Path):
    folder = own_copy("llama")
    tensors = read_tensors(folder)
    tensors["model.layers.0.self_attn.q_proj.weight_global_scale"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="^siblings: "):
        convert_folder(folder, tmp_path / "out", to="modelopt")
    assert not (tmp_path / "out").exists()


def test_formats_are_found_by_the_config(exported: Callable[[str], Path], tmp_path: Path):
    assert format_of(exported("llama")) == "compressed_tensors"
    with pytest.raises(ValueError, match="must be an NVFP4 folder, but its config.json does not load"):
        format_of(tmp_path)


def test_script_converts_and_reports(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_script(monkeypatch, exported("llama"), tmp_path / "out", "--to", "modelopt")
    assert "14 matrices with the same codes and block scales, bit for bit, from compressed_tensors to modelopt" in (
        capsys.readouterr().out
    )
    assert verify_export(tmp_path / "out", format="modelopt").quantized_parameters
    # A second time it is replaced when told so.
    with pytest.raises(SystemExit, match="error: .*out exists"):
        run_script(monkeypatch, exported("llama"), tmp_path / "out", "--to", "modelopt")
    run_script(monkeypatch, exported("llama"), tmp_path / "out", "--to", "modelopt", "--overwrite")


@pytest.mark.parametrize("problem", ["nothing", "dense", "gptq", "same", "inside", "around", "itself", "not a model folder"])
def test_bad_input_is_one_line_and_costs_nothing(
    problem: str, exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, target, to = tmp_path / "source", tmp_path / "target", "modelopt"
    shutil.copytree(exported("llama"), source)
    config = json.loads((source / "config.json").read_text())
    if problem == "nothing":
        source, message = tmp_path / "none", "must be an NVFP4 folder, but its config.json does not load"
    elif problem == "dense":
        del config["quantization_config"]
        message = "must be an NVFP4 folder, with quant_method compressed-tensors or modelopt in its config.json, got None"
    elif problem == "gptq":
        config["quantization_config"] = {"quant_method": "gptq"}
        message = "got 'gptq'"
    elif problem == "same":
        to, message = "compressed_tensors", "has the format compressed_tensors already"
    elif problem == "inside":
        target, message = source / "out", "two folders beside each other"
    elif problem == "around":
        target, message = tmp_path, "two folders beside each other"
        (tmp_path / "config.json").write_text("{}")
    elif problem == "itself":
        target, message = source, "two folders beside each other"
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        message = "is not replaced: it holds no config.json"
    if source.exists():
        (source / "config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="^error: ") as ended:
        run_script(monkeypatch, source, target, "--to", to, "--overwrite")
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
