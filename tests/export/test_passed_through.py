"""Tensors of the original folder that transformers does not build reach the export, and the launcher says so."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from export.export_models import SMALL, read_tensors
from multimodal_models import save_multimodal
from running import ROOT, forked_python, launch, train_environment
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.data.tokenizer import byte_tokenizer
from nvfp4_train.export import ExportError, verify_export
from nvfp4_train.export.passed_through import PassedThrough
from nvfp4_train.export.replicated import FromStore
from nvfp4_train.export.writer import export_model
from nvfp4_train.models.build import BuiltModel, build_model
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.models.layout import prefixes
from nvfp4_train.models.not_built import NotBuilt
from nvfp4_train.quant.policy import QuantConfig

EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
MTP: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_5": (
        "qwen3_5_text",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "mtp",
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"num_key_value_heads": 4, "first_k_dense_replace": 1, **MLA, **EXPERTS},
        "model.layers.61",
    ),
    "glm4_moe": ("glm4_moe", {"head_dim": 16, "first_k_dense_replace": 1, **EXPERTS}, "model.layers.46"),
}
"""Model type, fields of its config, and the block of its published folders that transformers passes over."""


def block(prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        f"{prefix}.eh_proj.weight": random(64, 128),
        f"{prefix}.enorm.weight": random(64),
        f"{prefix}.self_attn.o_proj.weight": random(64, 64),
        f"{prefix}.mlp.experts.0.up_proj.weight": random(32, 64),
        f"{prefix}.mlp.experts.1.up_proj.weight": random(32, 64),
        f"{prefix}.mlp.gate.e_score_correction_bias": random(4, dtype=torch.float32),
    }


def save(folder: Path, case: str, **others: Tensor) -> dict[str, Tensor]:
    """Write a folder with tensors that the class does not build, in a file of their own. Returns them."""
    model_type, fields, prefix = MTP[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL | {"vocab_size": 272} | fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = block(prefix) | others
    save_file(tensors, folder / "extra.safetensors", metadata={"format": "pt"})
    files = {"model.safetensors": load_file(folder / "model.safetensors"), "extra.safetensors": tensors}
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {name: "model-1.safetensors" if file == "model.safetensors" else file for name, file in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors


def build(folder: Path) -> BuiltModel:
    built = build_model(ModelConfig(path=str(folder)), QuantConfig(), torch.device("cpu"), compute_dtype=torch.bfloat16)
    built.store.update()
    return built


def export(folder: Path, original: Path) -> BuiltModel:
    built = build(original)
    assert built.not_built is not None
    passed = PassedThrough(built.not_built, str(original))
    report = export_model(folder, FromStore(built.model, built.store), passed_through=passed)
    assert f"{len(built.not_built.kept)} with the original folder" in str(report)
    return built


@pytest.mark.parametrize("case", MTP)
def test_blocks_that_no_class_builds_are_copied_byte_for_byte_and_ignored(case: str, tmp_path: Path) -> None:
    wanted = save(tmp_path / "original", case)
    built = export(tmp_path / "export", tmp_path / "original")
    written = read_tensors(tmp_path / "export")
    for name, tensor in wanted.items():
        assert written[name].dtype is tensor.dtype
        assert torch.equal(written[name], tensor), name
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    ignore = QuantizationConfig.model_validate(config).ignore
    prefix = MTP[case][2]
    for name in (*wanted, f"{prefix}.shared_head.head.weight"):
        assert any(match_name(name.removesuffix(".weight"), pattern) for pattern in ignore), name
    assert f"{prefix}.eh_proj" in ignore, "readers that know no patterns find full names"
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == type(built.model).__name__


def test_a_multimodal_folder_keeps_its_tower_and_what_predicts_further_tokens(tmp_path: Path) -> None:
    original = save_multimodal(tmp_path / "original", "qwen3_5")
    wanted = block("mtp")
    tensors = load_file(tmp_path / "original" / "model.safetensors") | wanted
    save_file(tensors, tmp_path / "original" / "model.safetensors", metadata={"format": "pt"})
    built = export(tmp_path / "export", tmp_path / "original")
    assert type(built.model).__name__ == type(original).__name__
    written = read_tensors(tmp_path / "export")
    for name, tensor in tensors.items():
        if name in wanted or name.startswith("model.visual."):
            assert torch.equal(written[name], tensor), name


def test_an_export_is_verified_without_the_original_too(tmp_path: Path) -> None:
    save(tmp_path / "original", "qwen3_5")
    export(tmp_path / "export", tmp_path / "original")
    verify_export(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    config["quantization_config"]["ignore"] = [name for name in config["quantization_config"]["ignore"] if "mtp" not in name]
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="scheme: mtp.* is selected by the config"):
        verify_export(tmp_path / "export")


@pytest.mark.parametrize("damage", ["other", "missing"])
def test_a_copied_tensor_that_differs_fails_the_verification(damage: str, tmp_path: Path) -> None:
    save(tmp_path / "original", "qwen3_5")
    built = export(tmp_path / "export", tmp_path / "original")
    file = tmp_path / "export" / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors["mtp.enorm.weight"]
    else:
        tensors["mtp.enorm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert built.not_built is not None
    passed = PassedThrough(built.not_built, str(tmp_path / "original"))
    match = {"missing": "keys: missing mtp.enorm.weight", "other": "passed: mtp.enorm.weight differs"}[damage]
    with pytest.raises(ExportError, match=match):
        verify_export(tmp_path / "export", passed_through=passed)


def test_what_no_reader_uses_is_left_out_and_said(tmp_path: Path) -> None:
    others = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save(tmp_path, "deepseek_v3", **others)
    not_built = build(tmp_path).not_built
    assert not_built is not None
    assert not_built.left_out == tuple(others)
    assert "left out of the export, since no reader uses them: model.layers.0.self_attn.rotary_emb.inv_freq" in str(not_built)
    assert "6 tensors that transformers does not build, model.layers.61.*" in str(not_built)
    assert NotBuilt.from_dict(not_built.to_dict()) == not_built


def test_a_folder_without_such_tensors_has_nothing_to_copy(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert build(tmp_path).not_built is None


def test_packed_weights_that_no_class_builds_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_5", **{"mtp.packed.weight": torch.ones(4, 4, dtype=torch.int8)})
    with pytest.raises(ValueError, match="mtp.packed.weight is quantized in a way that is not undone"):
        build(tmp_path)


def test_pickled_folders_are_copied_from_too(tmp_path: Path) -> None:
    wanted = save(tmp_path / "safe", "qwen3_5")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    torch.save(read_tensors(tmp_path / "safe"), tmp_path / "original" / "pytorch_model.bin")
    export(tmp_path / "export", tmp_path / "original")
    assert torch.equal(read_tensors(tmp_path / "export")["mtp.eh_proj.weight"], wanted["mtp.eh_proj.weight"])


def test_unknown_tensors_are_still_refused(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_5", **{"model.unheard_of.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="holds tensors that the model has not: model.unheard_of.weight"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("mtp.layers.0.mlp.up_proj.weight", "mtp"),
        ("mtp.fc.weight", "mtp"),
        ("model.layers.61.self_attn.q_proj.weight", "model.layers.61"),
        ("model.language_model.layers.16.eh_proj.weight", "model.language_model.layers.16"),
        ("model.mtp_layers.0.norm.weight", "model.mtp_layers"),
        ("model.visual.blocks.0.norm1.bias", "model.visual"),
    ],
)
def test_the_block_of_a_tensor(name: str, prefix: str) -> None:
    assert prefixes([name]) == [prefix]


def export_launcher(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    python, server = forked_python()
    command = [python, str(ROOT / "launch" / "export.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=train_environment() | server, cwd=ROOT)


def test_a_run_says_what_it_copies_and_its_checkpoint_finds_the_original_again(tmp_path: Path) -> None:
    original, run = tmp_path / "original", tmp_path / "run"
    wanted = save(original, "qwen3_5")
    (original / "preprocessor_config.json").write_text("{}\n")
    output = launch(run, f"model.path={original}", "trainer.max_steps=2", "quant.start_step=0").stdout
    assert "copied to the export as they are: 6 tensors that transformers does not build, mtp.*" in output
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert export_launcher(checkpoint, tmp_path / "again").returncode == 0
    names = {path.name for path in (run / "export").iterdir()}
    assert "preprocessor_config.json" in names
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    # The card of a run tells of the run.
    for file in names - {"README.md"}:
        assert (tmp_path / "again" / file).read_bytes() == (run / "export" / file).read_bytes(), file
    original.rename(tmp_path / "moved")
    gone = export_launcher(checkpoint, tmp_path / "gone")
    assert gone.returncode == 1
    assert "the export needs 6 tensors of the original folder that transformers does not build (mtp.*)" in gone.stderr
    assert not (tmp_path / "gone").exists()
    assert export_launcher(checkpoint, tmp_path / "gone", "--original", tmp_path / "moved").returncode == 0
    assert torch.equal(read_tensors(tmp_path / "gone")["mtp.enorm.weight"], wanted["mtp.enorm.weight"])
    assert export_launcher(checkpoint, tmp_path / "without", "--without-original").returncode == 0
    assert not any("mtp" in name for name in read_tensors(tmp_path / "without"))
