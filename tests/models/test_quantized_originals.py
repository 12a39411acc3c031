"""Published folders in MXFP4 and FP8: their masters are what an independent dequantization gives, and nothing of it is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export.export_models import SMALL, read_tensors
from multimodal_models import save_multimodal
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.export.passed_through import PassedThrough
from nvfp4_train.export.replicated import FromStore
from nvfp4_train.export.writer import export_model
from nvfp4_train.models.build import BuiltModel, build_model
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, load_config, load_frozen, load_model
from nvfp4_train.models.folder import open_folder
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.plan import RunShape, make_plan, meta_model
from nvfp4_train.quant.policy import QuantConfig

BLOCK = (32, 32)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPERTS = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def save_fp8(folder: Path, model_type: str = "llama", extra: tuple[str, ...] = (), **fields: Any) -> dict[str, Tensor]:
    """Write a folder whose linears are in FP8, in blocks that do not fit their rows. Returns the values, float32, by name on disk."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL | {"intermediate_size": 80} | fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors, values = {}, {}
    held = load_file(folder / "model.safetensors") | {name: torch.randn(48, 64) for name in extra}
    for name, tensor in held.items():
        if not any(part in name for part in ("_proj", *extra)):
            tensors[name], values[name] = tensor, tensor.float()
            continue
        rows, columns = tensor.shape
        scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
        codes, decoded = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn), torch.empty(tensor.shape)
        for i in range(len(scales)):
            for j in range(scales.shape[1]):
                where = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
                scales[i, j] = tensor[where].float().abs().max() / 448
                codes[where] = (tensor[where].float() / scales[i, j]).to(torch.float8_e4m3fn)
                decoded[where] = codes[where].float() * scales[i, j]
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        values[name] = decoded
    rewrite(folder, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)})
    return values


def save_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Write a small gpt-oss as it is published. Returns its experts, float32 [E, K, N], by name in memory."""
    torch.manual_seed(0)
    fields = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 16}
    config = AutoConfig.for_model("gpt_oss", **SMALL | fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors, values = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        num_experts, columns, rows = tensor.shape
        codes = torch.randint(0, 16, (num_experts, rows, columns), dtype=torch.uint8)
        exponents = torch.randint(115, 123, (num_experts, rows, columns // 32), dtype=torch.uint8)
        blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).view(num_experts, rows, columns // 32, 16)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        decoded = torch.tensor(E2M1)[codes.long()] * (exponents.float() - 127).exp2().repeat_interleave(32, -1)
        values[name] = decoded.transpose(1, 2)
    rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]})
    return values


def build(folder: Path) -> BuiltModel:
    built = build_model(ModelConfig(path=str(folder)), QuantConfig(), torch.device("cpu"), compute_dtype=torch.bfloat16)
    built.store.update()
    return built


def test_fp8_masters_are_the_dequantized_weights(tmp_path: Path) -> None:
    values = save_fp8(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)))
    for name, master in model.state_dict().items():
        assert master.dtype is torch.float32
        assert torch.equal(master, values[name]), name
    teacher = load_frozen(ModelConfig(path=str(tmp_path)))
    assert all(torch.equal(p, values[name].bfloat16()) for name, p in teacher.state_dict().items())


def test_fp8_experts_are_joined_after_they_were_dequantized(tmp_path: Path) -> None:
    values = save_fp8(tmp_path, "qwen3_moe", **EXPERTS)
    layer = load_model(ModelConfig(path=str(tmp_path))).model.layers[1].mlp.experts
    for expert in range(4):
        parts = {name: values[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")}
        assert torch.equal(layer.gate_up_proj[expert], torch.cat((parts["gate"], parts["up"])))
        assert torch.equal(layer.down_proj[expert], parts["down"])


def test_a_multimodal_folder_with_one_scale_for_a_weight_is_dequantized(tmp_path: Path) -> None:
    """As Ministral 3 is published: also scales of inputs, and its tower is not quantized."""
    original = save_multimodal(tmp_path, "mistral3")
    tensors, values = {}, {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if not (name.startswith("language_model.model.layers.") and "_proj" in name):
            tensors[name], values[name] = tensor, tensor.float()
            continue
        scale = tensor.float().abs().max() / 448
        codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scale, f"{name.removesuffix('.weight')}.activation_scale": torch.ones(())}
        values[name] = codes.float() * scale
    ignored = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    rewrite(
        tmp_path,
        tensors,
        {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
            "modules_to_not_convert": ignored,
        },
    )
    key_of = HubLayout(original.config).hub_names()
    model = load_model(ModelConfig(path=str(tmp_path)))
    assert type(model) is type(original)
    for name, master in model.named_parameters():
        assert torch.equal(master, values[key_of[name]]), name


def test_mxfp4_masters_are_the_dequantized_experts(tmp_path: Path) -> None:
    values = save_mxfp4(tmp_path)
    state = load_model(ModelConfig(path=str(tmp_path))).state_dict()
    assert values
    for name, wanted in values.items():
        assert torch.equal(state[name], wanted), name


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
def test_an_export_has_no_trace_of_the_old_quantization(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "original")
    built = build(tmp_path / "original")
    assert built.note is not None
    assert "dequantized while loading" in built.note
    export_model(tmp_path / "export", FromStore(built.model, built.store))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not any("scale_inv" in name or "_blocks" in name for name in read_tensors(tmp_path / "export"))
    assert not hasattr(load_config(ModelConfig(path=str(tmp_path / "original"))), "quantization_config")


def test_the_model_of_an_fp8_folder_computes_what_its_export_computes(tmp_path: Path) -> None:
    save_fp8(tmp_path / "original")
    built = build(tmp_path / "original")
    export_model(tmp_path / "export", FromStore(built.model, built.store))
    ids = torch.randint(0, 67, (2, 16), generator=torch.Generator().manual_seed(0))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compute_logits(built.model.eval(), ids), compute_logits(exported.eval(), ids))


def test_tensors_in_fp8_that_no_class_builds_are_copied_in_bf16(tmp_path: Path) -> None:
    fields = {
        "head_dim": 16,
        "layer_types": ["full_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
    }
    values = save_fp8(tmp_path / "original", "qwen3_5_text", extra=("mtp.fc.weight",), **fields)
    built = build(tmp_path / "original")
    assert built.not_built is not None
    passed = PassedThrough(built.not_built, str(tmp_path / "original"))
    export_model(tmp_path / "export", FromStore(built.model, built.store), passed_through=passed)
    written = read_tensors(tmp_path / "export")
    assert torch.equal(written["mtp.fc.weight"], values["mtp.fc.weight"].bfloat16())
    assert "mtp.fc.weight_scale_inv" not in written


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
def test_quantized_folders_are_not_read_by_rows_but_planned(save: Any, tmp_path: Path) -> None:
    save(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    assert open_folder(config) is None
    assert make_plan(meta_model(config), QuantConfig(), RunShape(world_size=2)).num_quantized > 0


@pytest.mark.parametrize("method", ["compressed-tensors", "awq", "gptq", "modelopt"])
def test_other_quantizations_are_refused_by_name(method: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    config.quantization_config = {"quant_method": method}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is quantized with {method}, which is not undone here"):
        load_config(ModelConfig(path=str(tmp_path)))
