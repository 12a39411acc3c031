"""Negative controls: each way to spoil a good folder is found, by the name of the check that finds it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import Trained, read_tensors
from safetensors.torch import save_file
from torch import Tensor

from nvfp4_train.export import ExportError, verify_export

Q_PROJ = "model.layers.0.self_attn.q_proj"


def swap_nibbles(packed: Tensor) -> Tensor:
    return packed << 4 | packed >> 4


def set_byte(scales: Tensor, byte: int) -> Tensor:
    raw = scales.view(torch.uint8).clone()
    raw[0, 0] = byte
    return raw.view(torch.float8_e4m3fn)


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def edit(tensors: dict[str, Tensor], part: str, change: Callable[[Tensor], Tensor], module: str = Q_PROJ) -> None:
    key = f"{module}.{part}"
    tensors[key] = change(tensors[key]).contiguous()


TENSOR_CONTROLS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "scale_viewed_as_uint8": ("tensors", lambda t: edit(t, "weight_scale", lambda s: s.view(torch.uint8))),
    "scale_in_bf16": ("tensors", lambda t: edit(t, "weight_scale", lambda s: s.bfloat16())),
    "global_scale_0d": ("tensors", lambda t: edit(t, "weight_global_scale", lambda s: s.reshape(()))),
    "norm_in_float32": ("tensors", lambda t: edit(t, "weight", lambda w: w.float(), "model.norm")),
    "scale_padded": ("tensors", lambda t: edit(t, "weight_scale", lambda s: torch.cat([s, s]))),
    "scale_missing": ("keys", lambda t: t.pop(f"{Q_PROJ}.weight_scale")),
    "norm_missing": ("keys", lambda t: t.pop("model.norm.weight")),
    "float_weight_left": ("keys", lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(64, 64, dtype=torch.bfloat16)})),
    "tied_alias_written": ("keys", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
    "compile_prefix": ("index", lambda t: rename(t, "model.norm.weight", "_orig_mod.model.norm.weight")),
    "scale_nan_byte": ("scales", lambda t: edit(t, "weight_scale", lambda s: set_byte(s, 0x7F))),
    "scale_zero_byte": ("scales", lambda t: edit(t, "weight_scale", lambda s: set_byte(s, 0x00))),
    "scale_negative_byte": ("scales", lambda t: edit(t, "weight_scale", lambda s: set_byte(s, 0xB8))),
    # E4M3's subnormal numbers, which kernels of serving engines take for zero.
    "scale_below_the_floor": ("scales", lambda t: edit(t, "weight_scale", lambda s: set_byte(s, 0x07))),
    "global_scale_zero": ("scales", lambda t: edit(t, "weight_global_scale", torch.zeros_like)),
    "global_scale_infinite": ("scales", lambda t: edit(t, "weight_global_scale", lambda s: s * torch.inf)),
    "global_scale_without_inverse": ("scales", lambda t: edit(t, "weight_global_scale", lambda s: s * 0 + 1e-40)),
    "one_sibling_global_doubled": ("siblings", lambda t: edit(t, "weight_global_scale", lambda s: s * 2)),
    "input_scale_of_activations": ("inputs", lambda t: t.update({f"{Q_PROJ}.input_scale": torch.ones(1)})),
    "input_global_scale_of_activations": ("inputs", lambda t: t.update({f"{Q_PROJ}.input_global_scale": torch.ones(1)})),
    "global_scale_reciprocal": (
        "values",
        lambda t: [edit(t, "weight_global_scale", torch.reciprocal, k[:-20]) for k in t if k.endswith("global_scale")],
    ),
    "nibbles_swapped": ("values", lambda t: edit(t, "weight_packed", swap_nibbles)),
    "one_code_changed": ("values", lambda t: t[f"{Q_PROJ}.weight_packed"].view(-1)[-1:].bitwise_xor_(1)),
    "norm_changed": ("values", lambda t: t["model.norm.weight"][:1].mul_(1.01)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("deepseek_v3", "model.layers.1.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("hunyuan_v1_moe", "model.layers.0.mlp.gate.wg.weight"),
    ],
)
def test_tensor_that_transformers_keeps_in_float32_fails_in_another_dtype(
    name: str, key: str, dtype: torch.dtype, own_copy: Callable[[str], Path]
):
    folder = own_copy(name)
    tensors = read_tensors(folder)
    assert tensors[key].dtype == torch.float32
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"^tensors: {key} must be F32"):
        verify_export(folder)


@pytest.mark.parametrize("name", ["sarvam_moe", "hrm_text"])
def test_one_of_several_tensors_joined_on_disk_is_compared(
    name: str, own_copy: Callable[[str], Path], cases: Callable[[str], Trained]
):
    folder = own_copy(name)
    tensors = read_tensors(folder)
    key = next(key for key in tensors if key.endswith(("query_key_value.weight", "gqkv_proj.weight")))
    tensors[key][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"^values: {key} differs"):
        verify_export(folder, cases(name).compute_weights())


@pytest.mark.parametrize("control", TENSOR_CONTROLS)
def test_spoiled_tensors_fail_by_name(control: str, own_copy: Callable[[str], Path], cases: Callable[[str], Trained]):
    check, spoil = TENSOR_CONTROLS[control]
    folder = own_copy("llama_tied")
    tensors = read_tensors(folder)
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"^{check}: "):
        verify_export(folder, cases("llama_tied").compute_weights())


def drop_ignore(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["quantization_config"]["ignore"].remove(name)


def set_in(value: Any, *path: str) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


GROUP = ("quantization_config", "config_groups", "group_0")
CONFIG_CONTROLS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "status_removed": ("config", lambda c: c["quantization_config"].pop("quantization_status")),
    "no_quantization_config": ("config", lambda c: c.pop("quantization_config")),
    "extra_key_in_weights": ("config", set_in("float8", *GROUP, "weights", "scale_type")),
    "strategy_group": ("config", set_in("group", *GROUP, "weights", "strategy")),
    "activations_quantized": ("config", set_in({"num_bits": 4}, *GROUP, "input_activations")),
    "float16": ("config", set_in("float16", "dtype")),
    "lm_head_not_ignored": ("scheme", drop_ignore("lm_head")),
    "router_not_ignored": ("scheme", drop_ignore("model.layers.0.block_sparse_moe.gate")),
    "experts_ignored": ("scheme", lambda c: c["quantization_config"]["ignore"].append(r"re:.*\.block_sparse_moe\.experts\..*")),
    "quantized_linear_ignored": ("scheme", set_in(["lm_head", "re:.*"], "quantization_config", "ignore")),
}


@pytest.mark.parametrize("control", CONFIG_CONTROLS)
def test_spoiled_config_fails_by_name(control: str, own_copy: Callable[[str], Path]):
    check, spoil = CONFIG_CONTROLS[control]
    folder = own_copy("mixtral")
    config = json.loads((folder / "config.json").read_text())
    spoil(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=f"^{check}: "):
        verify_export(folder)


def test_unquantized_experts_that_are_not_ignored_fail(cases: Callable[[str], Trained], tmp_path: Path):
    manifest = cases("mixtral").manifest
    without = replace(manifest, groups=tuple(group for group in manifest.groups if "experts" not in group[0]))
    cases("mixtral").export(tmp_path / "out", manifest=without)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    drop_ignore(r"re:.*\.block_sparse_moe\.experts\..*")(config)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="^scheme: .*experts"):
        verify_export(tmp_path / "out")


def test_config_of_another_format_beside_it_fails(own_copy: Callable[[str], Path]):
    folder = own_copy("llama")
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"^config: hf_quant_config\.json"):
        verify_export(folder)


def test_file_that_is_cut_off_fails(own_copy: Callable[[str], Path]):
    folder = own_copy("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ExportError, match="^index: "):
        verify_export(folder)


@pytest.mark.parametrize("spoil", ["weight_map", "total_size", "shard", "index"])
def test_incomplete_shards_fail(spoil: str, cases: Callable[[str], Trained], tmp_path: Path):
    folder = tmp_path / "sharded"
    assert cases("llama").export(folder, max_shard_bytes=20_000).shards > 2
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    if spoil == "weight_map":
        index["weight_map"].pop("model.norm.weight")
    elif spoil == "total_size":
        index["metadata"]["total_size"] += 1
    index_path.write_text(json.dumps(index))
    if spoil == "shard":
        next(folder.glob("model-00002-*")).unlink()
    elif spoil == "index":
        index_path.unlink()
    with pytest.raises(ExportError, match="^index: "):
        verify_export(folder)
