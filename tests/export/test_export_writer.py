"""What the writer refuses, how it splits files, and that a folder appears whole or not at all."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import Trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from nvfp4_train.export import ExportError, folder, masters, shards, verify_export, writer

CaseOf = Callable[[str], Trained]
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def with_value(name: str, value: float) -> Callable[[Trained], dict[str, Any]]:
    def change(model: Trained) -> dict[str, Any]:
        weight = model.weights[name].clone()
        weight.view(-1)[-1] = value
        return {"weights": model.weights | {name: weight}}

    return change


def with_groups(change: Callable[[list[list[str]]], Any]) -> Callable[[Trained], dict[str, Any]]:
    def changed(model: Trained) -> dict[str, Any]:
        groups = [list(group) for group in model.manifest.groups]
        change(groups)
        return {"manifest": replace(model.manifest, groups=tuple(map(tuple, groups)))}

    return changed


REFUSALS: dict[str, tuple[str, Callable[[Trained], dict[str, Any]], str]] = {
    "nan_in_quantized": ("llama", with_value(f"{Q_PROJ}.weight", torch.nan), rf"{Q_PROJ}\.weight holds NaN or Inf"),
    "inf_in_quantized": ("llama", with_value(f"{DOWN_PROJ}.weight", -torch.inf), rf"{DOWN_PROJ}\.weight holds NaN or Inf"),
    "nan_in_norm": ("llama", with_value("model.norm.weight", torch.nan), r"model\.norm\.weight holds NaN or Inf"),
    "infinite_in_bf16": ("llama", with_value("model.norm.weight", 3.4e38), r"model\.norm\.weight holds NaN or Inf"),
    "no_groups": ("llama", with_groups(lambda g: g.clear()), "at least one weight"),
    "unknown_module": (
        "llama",
        with_groups(lambda g: g.append(["model.layers.9.mlp.weight"])),
        r"model\.layers\.9\.mlp\.weight is no weight of an nn.Linear",
    ),
    "listed_twice": ("llama", with_groups(lambda g: g.append([f"{DOWN_PROJ}.weight"])), "listed twice"),
    "unfit_inputs": ("llama_odd", with_groups(lambda g: g.append([f"{DOWN_PROJ}.weight"])), "72 inputs"),
    "output_embedding": (
        "llama",
        with_groups(lambda g: g.append(["lm_head.weight"])),
        r"lm_head\.weight cannot be served in NVFP4: output embedding",
    ),
    "module_name": (
        "llama",
        with_groups(lambda g: (g[0].remove(f"{Q_PROJ}.weight"), g[0].append(Q_PROJ))),
        rf"{Q_PROJ} is no weight",
    ),
    "sibling_in_bf16": ("llama", with_groups(lambda g: g[0].remove(f"{Q_PROJ}.weight")), "sibling .*q_proj is not quantized"),
    "sibling_elsewhere": (
        "llama",
        with_groups(lambda g: (g[0].remove(f"{Q_PROJ}.weight"), g.append([f"{Q_PROJ}.weight"]))),
        "is in another group",
    ),
    "missing_name": (
        "llama",
        lambda m: {"weights": {name: w for name, w in m.weights.items() if name != "model.norm.weight"}},
        r"missing: model\.norm\.weight",
    ),
    "unknown_name": (
        "llama",
        lambda m: {"weights": m.weights | {"head.weight": torch.zeros(1)}},
        r"unknown names: head\.weight",
    ),
    "wrong_shape": ("llama", lambda m: {"weights": m.weights | {"model.norm.weight": torch.zeros(3)}}, r"got \(3,\)"),
    "packed_already": (
        "llama",
        lambda m: {"weights": m.weights | {"model.norm.weight": torch.zeros(64, dtype=torch.uint8)}},
        "float master",
    ),
    "tied_but_different": (
        "llama_tied",
        lambda m: {"weights": m.weights | {"lm_head.weight": m.weights["lm_head.weight"] + 1}},
        "tied in the config but differ",
    ),
    "shard_size": ("llama", lambda m: {"max_shard_bytes": 0}, "max_shard_bytes must be positive, got 0"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_bad_input_is_refused_before_anything_is_written(refusal: str, cases: CaseOf, tmp_path: Path):
    case, change, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        cases(case).export(tmp_path / "out", **change(cases(case)))
    assert names_in(tmp_path) == []


def test_existing_folder_is_refused_unless_overwritten(cases: CaseOf, tmp_path: Path):
    out = tmp_path / "out"
    cases("llama").export(out)
    before = (out / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        cases("qwen3").export(out)
    assert (out / "config.json").read_bytes() == before
    cases("qwen3").export(out, overwrite=True)
    verify_export(out, cases("qwen3").compute_weights())
    assert names_in(tmp_path) == ["out"]


def test_folder_that_is_no_model_is_never_replaced(cases: CaseOf, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no config\.json"):
        cases("llama").export(tmp_path, overwrite=True)
    assert names_in(tmp_path) == ["thesis.tex"]


def fail_in_second_file(monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    save_file = shards.save_file

    def failing(tensors: Any, path: Path, metadata: Any) -> None:
        if path.name.startswith("1"):
            raise OSError("no space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(shards, "save_file", failing)
    return OSError


def fail_in_verification(monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    monkeypatch.setattr(masters, "nvfp4_fake_quant", lambda x, s2, dtype, rule, steps: torch.ones_like(x, dtype=dtype))
    return ExportError


def interrupt_in_verification(monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "verify_export", interrupted)
    return KeyboardInterrupt


@pytest.mark.parametrize("fail", [fail_in_second_file, fail_in_verification, interrupt_in_verification])
@pytest.mark.parametrize("is_old_there", [False, True])
def test_failed_export_leaves_the_old_folder_or_none(
    fail: Callable[[pytest.MonkeyPatch], type[BaseException]],
    is_old_there: bool,
    cases: CaseOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"
    if is_old_there:
        cases("llama").export(out)
    error = fail(monkeypatch)
    with pytest.raises(error):
        cases("qwen3").export(out, overwrite=True, max_shard_bytes=20_000)
    monkeypatch.undo()
    assert names_in(tmp_path) == (["out"] if is_old_there else [])
    if is_old_there:
        verify_export(out, cases("llama").compute_weights())


@pytest.mark.parametrize("is_swapped", [False, True])
def test_killed_export_leaves_a_complete_folder_under_the_name(
    is_swapped: bool, cases: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A killed process cleans nothing up: before the swap the old folder is there, after it the new one."""
    out = tmp_path / "out"
    cases("llama").export(out)
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path, ignore_errors: None)
    if not is_swapped:
        interrupt_in_verification(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            cases("qwen3").export(out, overwrite=True)
    else:
        cases("qwen3").export(out, overwrite=True)
    monkeypatch.undo()
    verify_export(out, cases("qwen3" if is_swapped else "llama").compute_weights())
    left = [name for name in names_in(tmp_path) if name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.partial-")


def test_old_folder_comes_back_where_a_system_without_exchange_fails_between_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    monkeypatch.setattr(sys, "platform", "other")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == out and (self / "config.json").read_text() == "new":
            raise OSError("disk gone")
        return rename(self, target)

    def replace_while_renames_fail(patch: pytest.MonkeyPatch) -> None:
        with folder.replacing_folder(out, True) as partial:
            (partial / "config.json").write_text("new")
            patch.setattr(Path, "rename", failing)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk gone"):
        replace_while_renames_fail(patch)
    assert (out / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]

    with folder.replacing_folder(out, True) as partial:
        (partial / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert names_in(tmp_path) == ["out"]


def test_written_folder_is_readable_by_others(cases: CaseOf, tmp_path: Path):
    (tmp_path / "plain").mkdir()
    cases("llama").export(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["llama", "qwen2_bias", "mixtral"])
def test_sharded_export_keeps_modules_together(name: str, cases: CaseOf, tmp_path: Path):
    out = tmp_path / "out"
    report = cases(name).export(out, max_shard_bytes=20_000)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == report.shards >= 2
    file_of: dict[str, str] = {}
    for key, file in weight_map.items():
        assert file_of.setdefault(key.rpartition(".")[0], file) == file
    for path in out.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 20_000
    verify_export(out, cases(name).compute_weights())


def test_sharded_folder_loads(cases: CaseOf, tmp_path: Path):
    cases("qwen2_bias").export(tmp_path / "out", max_shard_bytes=20_000)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_weights_without_tied_alias_and_of_the_run_give_the_same_bytes(cases: CaseOf, tmp_path: Path):
    model = cases("llama_tied")
    model.export(tmp_path / "with", expected=model.compute_weights())
    model.export(tmp_path / "without", weights={k: w for k, w in model.weights.items() if k != "lm_head.weight"})
    for file in names_in(tmp_path / "with"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_expected_weights_that_differ_fail_the_export(cases: CaseOf, tmp_path: Path):
    model = cases("llama")
    expected = model.compute_weights()
    expected[f"{DOWN_PROJ}.weight"] = model.weights[f"{DOWN_PROJ}.weight"].bfloat16()
    with pytest.raises(ExportError, match=f"^values: {DOWN_PROJ} decodes to"):
        model.export(tmp_path / "out", expected=expected)
    assert names_in(tmp_path) == []


def test_config_is_served_in_bf16_and_tells_no_path(cases: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = cases("llama").config
    monkeypatch.setattr(config, "_name_or_path", "/home/someone/model")
    cases("llama").export(tmp_path / "out", generation_config=GenerationConfig(do_sample=True, top_k=7))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "someone" not in str(written)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_k"] == 7
    assert not hasattr(config, "quantization_config")


def test_quantizing_a_few_rows_at_a_time_gives_the_same_bytes(
    cases: CaseOf, exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(masters, "ELEMENTS_AT_ONCE", 200)
    cases("llama_odd").export(tmp_path / "out")
    for file in names_in(tmp_path / "out"):
        assert (tmp_path / "out" / file).read_bytes() == (exported("llama_odd") / file).read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama_tied", "llama_odd", "mixtral"])
def test_weights_on_the_gpu_give_the_same_bytes(name: str, cases: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = cases(name)
    model.export(tmp_path / "cpu")
    monkeypatch.setattr(masters, "ELEMENTS_AT_ONCE", 200)
    on_gpu = {key: weight.cuda() for key, weight in model.weights.items()}
    model.export(tmp_path / "gpu", weights=on_gpu, expected={key: w.cuda() for key, w in model.compute_weights().items()})
    for file in names_in(tmp_path / "cpu"):
        assert (tmp_path / "cpu" / file).read_bytes() == (tmp_path / "gpu" / file).read_bytes()
