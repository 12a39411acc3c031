"""Folders that are served with quantized inputs (W4A4): what is written, what readers make of it, and what the verification finds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from export_models import Trained, read_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nvfp4_train.export import ExportError, verify_export
from nvfp4_train.export.readers.disk import encode_input_rows
from nvfp4_train.kernels import reference
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.inputs import InputSample

CaseOf = Callable[[str], Trained]
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"
IDS = torch.arange(24).view(2, 12)


def input_scales(model: Trained) -> dict[str, Tensor]:
    return {name: model.state[f"{group[0]}.input_scale"] for group in model.manifest.groups for name in group}


def samples(model: Trained) -> list[InputSample]:
    """Two tokens for every group, with values that take every kind of block scale."""
    found = []
    for group in model.manifest.groups:
        scale = input_scales(model)[group[0]]
        num_columns = model.weights[group[0]].shape[-1]
        x = (
            torch.randn(2, num_columns, generator=torch.Generator().manual_seed(0))
            * torch.logspace(-5, 3, num_columns)
            * 448
            * scale
        )
        x = x.bfloat16()
        found.append(InputSample(group[0], x, *reference.quantize_input(x, scale)))
    return found


@pytest.fixture(scope="module")
def folder(cases: CaseOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("w4a4") / "llama"
    cases("llama").with_quantized_inputs().export(out)
    return out


@pytest.mark.parametrize("name", ["llama", "qwen2_bias", "phi3_fused", "mixtral", "sarvam_moe", "gpt_oss"])
def test_only_the_scales_of_inputs_and_one_line_of_the_config_are_added(
    name: str, cases: CaseOf, exported: Callable[[str], Path], tmp_path: Path
):
    model = cases(name).with_quantized_inputs()
    report = model.export(tmp_path / "out", inputs=samples(model))
    num_codes = sum(sample.x.numel() for sample in samples(model))
    assert f"; inputs in NVFP4, {num_codes:,} of their codes compared" in str(report)
    tensors, plain = read_tensors(tmp_path / "out"), read_tensors(exported(name))
    added = {key: tensors.pop(key) for key in tensors.keys() - plain.keys()}
    matrices = {name: len(HubLayout(model.config).matrices(name)) for name in model.manifest.names}
    assert len(added) == sum(matrices.values())
    assert all(key.endswith(".input_global_scale") and t.dtype == torch.float32 and t.shape == (1,) for key, t in added.items())
    for group in model.manifest.groups:
        divisor = 1 / model.state[f"{group[0]}.input_scale"]
        assert sum(torch.equal(tensor, divisor) for tensor in added.values()) == sum(matrices[name] for name in group)
    assert all(torch.equal(tensor.view(torch.uint8), plain[key].view(torch.uint8)) for key, tensor in tensors.items())
    config, plain_config = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", exported(name)))
    groups = [c["quantization_config"]["config_groups"]["group_0"] for c in (config, plain_config)]
    assert groups[1].pop("input_activations") is None
    assert groups[0].pop("input_activations") == groups[0]["weights"] | {
        "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    assert config == plain_config


def calibrated(model: Trained) -> Trained:
    """With the scales that suit what the model computes for IDS."""
    dense, amax = model.dense_model(), {}
    for name in model.manifest.names:
        hook = lambda _, args, name=name: amax.update({name: args[0].abs().amax()})  # noqa: E731
        dense.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)
    dense(IDS)
    scales = {f"{g[0]}.input_scale": reference.global_scale(2 * amax[g[0]]).reshape(1) for g in model.manifest.groups}
    return replace(model.with_quantized_inputs(), state=scales)


@torch.no_grad()
def test_transformers_quantizes_inputs_as_training_does(cases: CaseOf, tmp_path: Path):
    """Its emulation divides where engines multiply, and computes a block scale in bf16, so one element in a thousand differs."""
    model = calibrated(cases("llama"))
    model.export(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = loaded.eval()(IDS).logits
    dense = model.dense_model()
    of_weights_alone = dense(IDS).logits
    for name, scale in input_scales(model).items():
        hook = lambda _, args, scale=scale: (reference.fake_quant_input(args[0], scale),)  # noqa: E731
        dense.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)
    ours = dense(IDS).logits
    assert (logits - ours).float().norm() < 0.6 * (of_weights_alone - ours).float().norm()
    linear = loaded.get_submodule(Q_PROJ)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scale = input_scales(model)[f"{Q_PROJ}.weight"]
    arguments = "input", linear.quantization_scheme.input_activations
    assert torch.equal(forward_quantize(linear, x, *arguments), reference.fake_quant_input(x, scale))
    theirs, ours = forward_quantize(linear, x.bfloat16(), *arguments), reference.fake_quant_input(x.bfloat16(), scale)
    assert (theirs != ours).float().mean() < 0.01


def test_the_readers_own_encoder_gives_the_codes_of_the_reference():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 3, 256)
    x[0], x[1, ::3], x[2, :16] = 0.0, -0.0, 6.0 * 2.0**-10
    # Ties of codes under a block scale of 1.
    x[3, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0])
    seen: set[int] = set()
    for scale in (2.0**-10, 1.0, 2.0**6):
        packed, scales = reference.quantize_input(x, torch.tensor(scale))
        ours = encode_input_rows(x.numpy(), np.float32(1 / scale))
        np.testing.assert_array_equal(ours[0], packed.numpy())
        np.testing.assert_array_equal(ours[1], scales.view(torch.uint8).numpy())
        seen |= set(ours[1].flatten().tolist())
    assert {0, 1, 7, 8, 0x7E} < seen


def put(key: str, value: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: value(tensors.get(key)) if callable(value) else value})


KEY = f"{Q_PROJ}.input_global_scale"
CONTROLS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "missing": (f"missing {KEY}", lambda t: t.pop(KEY)),
    "extra": ("unexpected lm_head.input_global_scale", put("lm_head.input_global_scale", torch.ones(1))),
    "of_another_format": (f"unexpected {Q_PROJ}.input_scale", put(f"{Q_PROJ}.input_scale", torch.ones(1))),
    "0d": (rf"{KEY} must be F32 \(1,\), got F32 \(\)", put(KEY, lambda s: s.reshape(()))),
    "in_bf16": (rf"{KEY} must be F32 \(1,\), got BF16 \(1,\)", put(KEY, lambda s: s.bfloat16())),
    "zero": ("which is no power of two", put(KEY, torch.zeros_like)),
    "infinite": ("which is no power of two", put(KEY, lambda s: s * torch.inf)),
    "negative": ("which is no power of two", put(KEY, lambda s: -s)),
    "no_power_of_two": ("which is no power of two", put(KEY, lambda s: s * 1.5)),
    "one_sibling_doubled": ("has the input scale", put(KEY, lambda s: 2 * s)),
    "reciprocal": (
        f"the input of {DOWN_PROJ} has the scale .* on disk, .* in training",
        put(f"{DOWN_PROJ}.input_global_scale", torch.reciprocal),
    ),
}  # fmt: skip


@pytest.mark.parametrize("control", CONTROLS)
def test_spoiled_scales_of_inputs_are_found(control: str, folder: Path, cases: CaseOf, tmp_path: Path):
    message, spoil = CONTROLS[control]
    tensors = read_tensors(folder)
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ExportError, match=f"^inputs: .*{message}"):
        verify_export(tmp_path, input_scales=input_scales(cases("llama").with_quantized_inputs()))


@pytest.mark.parametrize(
    "change", [{"dynamic": True}, {"strategy": "group"}, {"observer": "static_minmax"}, {"group_size": 32}]
)
def test_another_scheme_of_inputs_is_found(change: dict[str, Any], folder: Path, tmp_path: Path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= change
    save_file(read_tensors(folder), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="^config: input_activations must be null or"):
        verify_export(tmp_path)


def test_scales_without_a_config_that_uses_them_are_found(folder: Path, exported: Callable[[str], Path], tmp_path: Path):
    save_file(read_tensors(folder), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((exported("llama") / "config.json").read_text())
    with pytest.raises(ExportError, match="^inputs: .* present, but the config has no inputs quantized"):
        verify_export(tmp_path)


def test_codes_that_no_reader_makes_fail_the_export(cases: CaseOf, tmp_path: Path):
    model = cases("llama").with_quantized_inputs()
    for index, (part, message) in enumerate((("packed", "1 bytes of codes"), ("scales", "1 blocks .* another scale"))):
        spoiled = samples(model)
        bytes_of_part = getattr(spoiled[2], part).view(torch.uint8).clone()
        bytes_of_part[1, 3] ^= 1
        spoiled[2] = spoiled[2]._replace(**{part: bytes_of_part})
        with pytest.raises(ExportError, match=f"^inputs: a reader .*{message}"):
            model.export(tmp_path / str(index), inputs=spoiled)
    with pytest.raises(ExportError, match="^inputs: the model quantizes inputs"):
        cases("llama").export(tmp_path / "w4a16", inputs=samples(model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, 0.3, torch.nan])
def test_a_scale_that_calibration_has_not_left_is_refused(value: float, cases: CaseOf, tmp_path: Path):
    model = cases("llama").with_quantized_inputs()
    state = model.state | {f"{DOWN_PROJ}.weight.input_scale": torch.tensor([value])}
    with pytest.raises(ValueError, match=rf"input scale of {DOWN_PROJ}\.weight must be a power of two .* got {value}"):
        model.export(tmp_path / "out", state=state)
    state.pop(f"{DOWN_PROJ}.weight.input_scale")
    with pytest.raises(ValueError, match=rf"state must hold {DOWN_PROJ}\.weight\.input_scale"):
        model.export(tmp_path / "out", state=state)
    # Served with inputs as they are, it needs none.
    replace(model, manifest=cases("llama").manifest).export(tmp_path / "out", state={})
