"""Folders in Model Optimizer's layout, as its own functions, compressed-tensors' converter and our reader see them."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter, convert_checkpoint
from export_models import CASES, Trained, read_tensors
from safetensors.torch import save_file
from test_export_checkpoint import run_script, save_checkpoint
from test_export_inputs import samples
from torch import Tensor

from nvfp4_train.callbacks.export import Export
from nvfp4_train.export import ExportError, ExportReport, verify_export
from nvfp4_train.models.layout import HubLayout

CaseOf = Callable[[str], Trained]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def served(model: Trained, serving: str) -> Trained:
    return model.with_quantized_inputs() if serving == "w4a4" else model


@pytest.fixture(scope="module")
def written(cases: CaseOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a case and a serving, written once."""
    root = tmp_path_factory.mktemp("modelopt")

    def folder(name: str, serving: str) -> Path:
        if not (path := root / f"{name}_{serving}").exists():
            served(cases(name), serving).export(path, format="modelopt")
        return path

    return folder


@pytest.fixture(scope="module")
def model_optimizer() -> Any:
    """What Model Optimizer's own reader of NVFP4 weights makes of one: a function to float32."""
    with warnings.catch_warnings():
        # It was tested with an older transformers, which this part of it does not use.
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def decode(codes: Tensor, scale: Tensor, multiplier: Tensor) -> Tensor:
        shape = torch.Size([codes.shape[0], 2 * codes.shape[1]])
        weight = NVFP4QTensor(shape, torch.float32, codes)
        return weight.dequantize(dtype=torch.float32, scale=scale, double_scale=multiplier, block_sizes={-1: 16})

    return decode


def parts_of(tensors: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor, Tensor]:
    return tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]


def quantized_modules(tensors: dict[str, Tensor]) -> list[str]:
    return [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]


@pytest.mark.parametrize("serving", ["w4a16", "w4a4"])
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_other_format_and_global_scales_are_inverses(
    name: str, serving: str, written: Callable[[str, str], Path], cases: CaseOf, tmp_path: Path
):
    served(cases(name), serving).export(tmp_path / "other")
    tensors, other = read_tensors(written(name, serving)), read_tensors(tmp_path / "other")
    modules = quantized_modules(tensors)
    assert len(modules) == cases(name).num_matrices()
    for module in modules:
        codes, scale, multiplier = (tensors.pop(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2"))
        assert codes.equal(other.pop(f"{module}.weight_packed"))
        assert scale.dtype == torch.float8_e4m3fn
        assert scale.view(torch.uint8).equal(other.pop(f"{module}.weight_scale").view(torch.uint8))
        assert multiplier.dtype == torch.float32
        assert multiplier.shape == ()
        assert multiplier == 1 / other.pop(f"{module}.weight_global_scale")
        if serving == "w4a4":
            multiplier = tensors.pop(f"{module}.input_scale")
            assert multiplier.dtype == torch.float32
            assert multiplier.shape == ()
            assert multiplier == 1 / other.pop(f"{module}.input_global_scale")
    assert tensors.keys() == other.keys()
    assert all(tensor.dtype == other[key].dtype and tensor.equal(other[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", CASES)
def test_model_optimizer_decodes_every_weight_to_that_of_the_forward(
    name: str, written: Callable[[str, str], Path], cases: CaseOf, model_optimizer: Any
):
    model = cases(name)
    tensors = read_tensors(written(name, "w4a16"))
    expected = model.compute_weights()
    layout = HubLayout(model.config)
    for weight in model.manifest.names:
        for matrix in layout.matrices(weight):
            decoded = model_optimizer(*parts_of(tensors, matrix.module))
            assert torch.equal(decoded, matrix.of(expected[weight]).float()), matrix


@pytest.mark.parametrize("spoil", ["nibbles", "one code", "block scale", "global scale"])
def test_model_optimizer_decodes_other_bytes_to_another_weight(
    spoil: str, written: Callable[[str, str], Path], cases: CaseOf, model_optimizer: Any
):
    codes, scale, multiplier = (part.clone() for part in parts_of(read_tensors(written("llama", "w4a16")), Q_PROJ))
    if spoil == "nibbles":
        codes = codes << 4 | codes >> 4
    elif spoil == "one code":
        codes[-1, -1] ^= 1
    elif spoil == "block scale":
        scale.view(torch.uint8)[3, 1] += 1
    else:
        multiplier = 1 / multiplier
    expected = cases("llama").compute_weights()[f"{Q_PROJ}.weight"]
    assert not torch.equal(model_optimizer(codes, scale, multiplier), expected.float())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_two_configs_say_the_same_as_model_optimizer_relates_them(name: str, written: Callable[[str, str], Path]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    for serving, algorithm in (("w4a16", "W4A16_NVFP4"), ("w4a4", "NVFP4")):
        folder = written(name, serving)
        file = json.loads((folder / "hf_quant_config.json").read_text())
        assert file["quantization"]["quant_algo"] == algorithm
        assert file["producer"]["name"] == "modelopt"
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config == convert_hf_quant_config_format(file)
        assert config["ignore"][0] == "lm_head"
        assert "model.embed_tokens" in config["ignore"]
        assert not any(entry.startswith("re:") for entry in config["ignore"])


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("mixtral", ["model.layers.1.block_sparse_moe.gate"]),
        ("deepseek_v3", ["model.layers.1.mlp.gate"]),
        ("llama_odd", ["model.layers.1.mlp.down_proj"]),
    ],
)
def test_routers_and_unfit_linears_are_excluded(name: str, entries: list[str], written: Callable[[str, str], Path]):
    excluded = json.loads((written(name, "w4a16") / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert set(entries) <= set(excluded)
    # vLLM excludes each module that an entry is a part of.
    modules = quantized_modules(read_tensors(written(name, "w4a16")))
    assert not [(entry, module) for entry in excluded for module in modules if entry in module]


def test_unquantized_experts_are_excluded_with_all_that_lies_below(cases: CaseOf, tmp_path: Path):
    manifest = cases("mixtral").manifest
    without = replace(manifest, groups=tuple(group for group in manifest.groups if "experts" not in group[0]))
    cases("mixtral").export(tmp_path / "out", manifest=without, format="modelopt")
    excluded = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert "model.layers.1.block_sparse_moe.experts*" in excluded


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("serving", ["w4a16", "w4a4"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_bias", "qwen3_moe"])
def test_the_converter_of_compressed_tensors_gives_our_folder_of_that_format(
    name: str, serving: str, written: Callable[[str, str], Path], cases: CaseOf, tmp_path: Path
):
    served(cases(name), serving).export(tmp_path / "ours")
    folder = written(name, serving)
    # Without input scales a weight must not be said to depend on one.
    targets = quantized_modules(read_tensors(folder)) if serving == "w4a4" else ["Linear"]
    convert_checkpoint(str(folder), str(tmp_path / "theirs"), ModelOptNvfp4Converter(targets=targets, ignore=["lm_head"]))
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        other = theirs[key]
        assert tensor.dtype == other.dtype, key
        # It leaves the shape of global scales.
        assert tensor.view(-1).view(torch.uint8).equal(other.view(-1).view(torch.uint8)), key


def test_codes_of_inputs_are_compared(cases: CaseOf, tmp_path: Path):
    model = cases("llama").with_quantized_inputs()
    report = model.export(tmp_path / "out", format="modelopt", inputs=samples(model))
    assert report.verified.input_codes == sum(sample.x.numel() for sample in samples(model))
    doubled = [sample._replace(x=2 * sample.x) for sample in samples(model)]
    with pytest.raises(ExportError, match="^inputs: "):
        model.export(tmp_path / "other", format="modelopt", inputs=doubled)
    assert not (tmp_path / "other").exists()


def change(tensors: dict[str, Tensor], part: str, by: Callable[[Tensor], Tensor]) -> None:
    tensors[f"{Q_PROJ}.{part}"] = by(tensors[f"{Q_PROJ}.{part}"]).contiguous()


def set_byte(scales: Tensor, byte: int) -> Tensor:
    raw = scales.view(torch.uint8).clone()
    raw[0, 0] = byte
    return raw.view(scales.dtype)


TENSOR_CONTROLS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "multiplier of shape [1]": ("tensors", lambda t: change(t, "weight_scale_2", lambda s: s.reshape(1))),
    "codes in int8": ("tensors", lambda t: change(t, "weight", lambda w: w.view(torch.int8))),
    "a float weight left": ("tensors", lambda t: change(t, "weight", lambda w: torch.zeros(64, 64, dtype=torch.bfloat16))),
    "scales in bf16": ("tensors", lambda t: change(t, "weight_scale", lambda s: s.bfloat16())),
    "multiplier missing": ("keys", lambda t: t.pop(f"{Q_PROJ}.weight_scale_2")),
    "codes missing": ("keys", lambda t: t.pop(f"{Q_PROJ}.weight")),
    "a part of the other format": ("keys", lambda t: t.update({f"{Q_PROJ}.weight_global_scale": torch.ones(1)})),
    "input scale of shape [1]": ("inputs", lambda t: change(t, "input_scale", lambda s: s.reshape(1))),
    "input scale missing": ("inputs", lambda t: t.pop(f"{Q_PROJ}.input_scale")),
    "input scale of one sibling doubled": ("inputs", lambda t: change(t, "input_scale", lambda s: 2 * s)),
    "input scale 0": ("inputs", lambda t: change(t, "input_scale", torch.zeros_like)),
    "a scale that is NaN": ("scales", lambda t: change(t, "weight_scale", lambda s: set_byte(s, 0x7F))),
    "multiplier 0": ("scales", lambda t: change(t, "weight_scale_2", torch.zeros_like)),
    "multiplier of one sibling doubled": ("siblings", lambda t: change(t, "weight_scale_2", lambda s: 2 * s)),
    "nibbles swapped": ("values", lambda t: change(t, "weight", lambda w: w << 4 | w >> 4)),
    "divisors in place of multipliers": (
        "values",
        lambda t: t.update({key: 1 / tensor for key, tensor in t.items() if key.endswith("weight_scale_2")}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("control", TENSOR_CONTROLS)
def test_spoiled_tensors_fail_by_name(control: str, written: Callable[[str, str], Path], cases: CaseOf, tmp_path: Path):
    check, spoil = TENSOR_CONTROLS[control]
    folder = copy(written("llama", "w4a4"), tmp_path)
    tensors = read_tensors(folder)
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"^{check}: "):
        verify_export(folder, cases("llama").compute_weights(), format="modelopt")


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def both(key: str, value: Any, in_file: str | None = None) -> Callable[[dict, dict], Any]:
    """Set a key of both configs."""

    def spoil(config: dict, file: dict) -> None:
        config[key] = value
        file["quantization"][in_file or key] = value

    return spoil


CONFIG_CONTROLS: dict[str, tuple[str, str, Callable[[dict, dict], Any]]] = {
    "quant_method": ("config", "quant_method must be", lambda c, f: c.update(quant_method="modelopt_fp4")),
    "another algorithm": ("config", "quant_algo must be", both("quant_algo", "W4A8_NVFP4_FP8")),
    "algorithms differ": ("config", "quant_algo in", lambda c, f: f["quantization"].update(quant_algo="NVFP4")),
    # vLLM would leave input scales uninitialised.
    "inputs in the algorithm alone": ("config", "config_groups must be", both("quant_algo", "NVFP4")),
    "lists differ": ("config", "exclude_modules in", lambda c, f: f["quantization"]["exclude_modules"].append("x")),
    "a field that vLLM asks for": ("config", "must have the keys", lambda c, f: f["quantization"].pop("kv_cache_quant_algo")),
    "blocks of 32": ("config", "group_size in", lambda c, f: f["quantization"].update(group_size=32)),
    "a quantized cache": ("config", "kv_cache_quant_algo in", lambda c, f: f["quantization"].update(kv_cache_quant_algo="FP8")),
    "producer": ("config", "producer must have", lambda c, f: c.update(producer={"name": "me", "version": "1"})),
    "producers differ": ("config", "names the producer", lambda c, f: f.update(producer={"name": "me"})),
    "empty file": ("config", "does not load", lambda c, f: f.clear()),
    "lm_head not excluded": ("scheme", "must hold lm_head", both("ignore", ["model.embed_tokens"], "exclude_modules")),
    "router not excluded": (
        "scheme",
        "block_sparse_moe.gate is selected",
        both("ignore", ["lm_head"], "exclude_modules"),
    ),
    "quantized experts excluded": (
        "scheme",
        "is not selected by the config",
        both("ignore", ["lm_head", "*.block_sparse_moe.gate", "*.block_sparse_moe.experts*"], "exclude_modules"),
    ),
    # As a name it matches nothing, as a part of names it does in vLLM.
    "a short stem": (
        "scheme",
        "not selected by the config",
        both("ignore", ["lm_head", "*.block_sparse_moe.gate", "k_proj"], "exclude_modules"),
    ),
}


@pytest.mark.parametrize("control", CONFIG_CONTROLS)
def test_spoiled_configs_fail_by_name(control: str, written: Callable[[str, str], Path], tmp_path: Path):
    check, message, spoil = CONFIG_CONTROLS[control]
    folder = copy(written("mixtral", "w4a16"), tmp_path)
    verify_export(folder, format="modelopt")
    config, file = (json.loads((folder / name).read_text()) for name in ("config.json", "hf_quant_config.json"))
    spoil(config["quantization_config"], file)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps(file))
    with pytest.raises(ExportError, match=f"^{check}: .*{message}"):
        verify_export(folder, format="modelopt")


def test_a_folder_without_the_file_of_tensorrt_llm_fails(written: Callable[[str, str], Path], tmp_path: Path):
    folder = copy(written("llama", "w4a16"), tmp_path)
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(ExportError, match="^config: hf_quant_config.json does not load"):
        verify_export(folder, format="modelopt")


def test_both_formats_are_two_folders_of_a_checkpoint(
    cases: CaseOf, written: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    model = cases("llama")
    checkpoint = save_checkpoint(model, tmp_path / "run" / "last.ckpt")
    run_script(monkeypatch, checkpoint, tmp_path / "out", "--format", "both")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert verify_export(tmp_path / "out", model.compute_weights()).compared
    assert verify_export(tmp_path / "out_modelopt", model.compute_weights(), format="modelopt").compared
    assert capsys.readouterr().out.count("matrices in NVFP4") == 2
    # The second name is checked before anything is written.
    (tmp_path / "other_modelopt").mkdir()
    (tmp_path / "other_modelopt" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="other_modelopt exists"):
        run_script(monkeypatch, checkpoint, tmp_path / "other", "--format", "both")
    assert not (tmp_path / "other").exists()


def test_a_run_checks_both_folders_before_it_starts(tmp_path: Path):
    assert [path.name for path in Export(folder=str(tmp_path / "export"), format="both").folders.values()] == [
        "export",
        "export_modelopt",
    ]
    (tmp_path / "export_modelopt").mkdir()
    with pytest.raises(ValueError, match="must not exist yet, got .*export_modelopt"):
        Export(folder=str(tmp_path / "export"), format="both")
    Export(folder=str(tmp_path / "export"), format="both", overwrite=True)
    Export(folder=str(tmp_path / "export"), format="compressed_tensors")


def test_what_was_checked_and_what_transformers_cannot_load_is_said(cases: CaseOf, tmp_path: Path):
    report: ExportReport = cases("llama").export(tmp_path / "out", format="modelopt")
    own = "nvfp4_train's reader in NumPy: all 21 tensors of the model, bit for bit"
    assert f"readers: {own}; not run: transformers and serving engines\n" in str(report)
    assert f"launch/convert.py {tmp_path / 'out'} OTHER --to compressed_tensors" in str(report)
    report = cases("llama").export(tmp_path / "other")
    assert f"readers: {own}; compressed-tensors {metadata.version('compressed-tensors')}: the config; not run: " in str(report)
    assert f"it loads what `python launch/convert.py {tmp_path / 'other'} OTHER --to bf16` decodes" in str(report)
    # Of experts that are joined in memory.
    report = cases("mixtral").export(tmp_path / "experts")
    assert f"`python launch/convert.py {tmp_path / 'experts'} OTHER --to bf16`" in str(report)
