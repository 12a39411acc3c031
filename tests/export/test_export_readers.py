"""What independent readers make of an exported folder: compressed-tensors, transformers, and the reader of the verification."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from export_models import CASES, CONVERTED, JOINT, Trained, read_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

from nvfp4_train.export import verify_export
from nvfp4_train.export.convert import convert_folder
from nvfp4_train.export.formats.compressed_tensors import FORMAT
from nvfp4_train.export.readers import disk
from nvfp4_train.export.readers.compressed_tensors import READER
from nvfp4_train.kernels import reference
from nvfp4_train.models.layout import HubLayout

CaseOf = Callable[[str], Trained]
FolderOf = Callable[[str], Path]


def assert_is_the_dense_model(loaded: PreTrainedModel, info: dict, model: Trained) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    input_ids = torch.arange(2 * 12).view(2, 12) % 67
    with torch.no_grad():
        logits, dense_logits = loaded.eval()(input_ids).logits, model.dense_model()(input_ids).logits
    assert logits.dtype == dense_logits.dtype
    assert (logits - dense_logits).abs().max() == 0.0
    loaded_weights = loaded.state_dict()
    for key, weight in model.in_class(model.compute_weights()).items():
        assert torch.equal(loaded_weights[key], weight), key


def quantization_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def decode_with_compressed_tensors(folder: Path) -> dict[str, Tensor]:
    """Quantized weights by name, in bf16."""
    scheme = QuantizationConfig.model_validate(quantization_config(folder)).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    tensors = read_tensors(folder)
    modules = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    parts = ("weight_packed", "weight_scale", "weight_global_scale")
    return {
        f"{module}.weight": compressor.decompress({part: tensors[f"{module}.{part}"] for part in parts}, scheme)["weight"]
        for module in modules
    }


@pytest.mark.parametrize("name", CASES)
def test_compressed_tensors_decodes_every_weight_to_the_compute_weight(name: str, cases: CaseOf, exported: FolderOf):
    decoded = decode_with_compressed_tensors(exported(name))
    layout, compute = HubLayout(cases(name).config), cases(name).compute_weights()
    for weight in cases(name).manifest.names:
        for matrix in layout.matrices(weight):
            assert torch.equal(decoded.pop(f"{matrix.module}.weight"), matrix.of(compute[weight])), matrix
    assert not decoded


@pytest.mark.parametrize("name", CASES)
def test_note_tells_of_models_that_transformers_cannot_load_packed(name: str, cases: CaseOf):
    note = FORMAT.note(HubLayout(cases(name).config).with_quantized(cases(name).manifest.names), {})
    assert (note is not None) == (name in CONVERTED and name != "llama4")
    assert note is None or "python launch/convert.py FOLDER OTHER --to bf16" in note


# The loader says that `dequantize` overrides the folder's config: that is what is asked for.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name not in CONVERTED])
def test_transformers_computes_the_logits_of_the_dense_compute_weights(
    name: str, dequantize: bool, cases: CaseOf, exported: FolderOf
):
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        exported(name), dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert_is_the_dense_model(loaded, info, cases(name))


@pytest.mark.parametrize("name", [name for name in CONVERTED if name not in JOINT])
def test_unpacked_folder_of_joined_or_split_tensors_loads_and_computes_the_logits_of_the_dense_compute_weights(
    name: str, cases: CaseOf, exported: FolderOf, tmp_path: Path
):
    """Transformers 5.23 converts nothing beside compressed linears, so compressed-tensors unpacks the folder first."""
    convert_checkpoint(str(exported(name)), str(tmp_path), CompressedTensorsDequantizer(str(exported(name))))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert_is_the_dense_model(loaded, info, cases(name))


@pytest.mark.parametrize("name", CASES)
def test_unpacked_folder_is_that_of_the_authors(name: str, cases: CaseOf, exported: FolderOf, tmp_path: Path):
    convert_folder(exported(name), tmp_path / "plain", to="bf16")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, output_loading_info=True)
    assert_is_the_dense_model(loaded, info, cases(name))
    loaded.save_pretrained(tmp_path / "again")
    unpacked, again = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "again")
    assert unpacked.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in unpacked.items())


@pytest.mark.parametrize("name", CASES)
def test_compressed_tensors_resolves_targets_to_the_quantized_linears(name: str, cases: CaseOf, exported: FolderOf):
    config = QuantizationConfig.model_validate(quantization_config(exported(name)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cases(name).config)
    matched = {module for module, _ in match_named_modules(model, config.config_groups["group_0"].targets, config.ignore)}
    assert {f"{module}.weight" for module in matched} == {n for n in cases(name).manifest.names if n.endswith(".weight")}


def test_tied_output_embedding_is_not_written_and_loads_shared(exported: FolderOf):
    assert "lm_head.weight" not in read_tensors(exported("llama_tied"))
    model = AutoModelForCausalLM.from_pretrained(exported("llama_tied"), dtype=torch.bfloat16)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "router", "expert"),
    [
        ("qwen3_moe", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.0.gate_proj"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.experts.0.gate_proj"),
    ],
)
def test_routers_and_experts_are_ignored_by_the_names_that_serving_engines_ask_for(
    name: str, router: str, expert: str, cases: CaseOf, exported: FolderOf, tmp_path: Path
):
    quantized = quantization_config(exported(name))["ignore"]
    assert router in quantized
    assert not any(entry.startswith("re:") for entry in quantized)
    manifest = cases(name).manifest
    without = replace(manifest, groups=tuple(group for group in manifest.groups if "experts" not in group[0]))
    cases(name).export(tmp_path / "out", manifest=without)
    ignore = quantization_config(tmp_path / "out")["ignore"]
    patterns = [entry[3:] for entry in ignore if entry.startswith("re:")]
    assert router in ignore
    assert len(patterns) == 1
    assert re.match(patterns[0], expert)
    assert not re.match(patterns[0], "model.layers.0.mlp.gate_proj")


def test_layer_with_unfit_inputs_stays_in_bf16_and_is_ignored(exported: FolderOf):
    folder = exported("llama_odd")
    assert read_tensors(folder)["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert "model.layers.0.mlp.down_proj" in quantization_config(folder)["ignore"]


def test_zero_tensor_has_divisor_one_and_codes_zero_and_no_scale_is_zero(exported: FolderOf):
    tensors = read_tensors(exported("llama"))
    zero = "model.layers.0.self_attn.o_proj"
    assert tensors[f"{zero}.weight_global_scale"].tolist() == [1.0]
    assert not tensors[f"{zero}.weight_packed"].any()
    q_proj = "model.layers.0.self_attn.q_proj"
    assert not tensors[f"{q_proj}.weight_packed"][0, :8].any()
    for key, tensor in tensors.items():
        if key.endswith(".weight_scale"):
            assert (tensor.float() >= reference.E4M3_MIN).all()


def test_quantizing_the_decoded_weights_again_gives_the_same_bytes(cases: CaseOf, exported: FolderOf):
    tensors = read_tensors(exported("llama"))
    for name in cases("llama").manifest.names:
        packed, scales, divisor = (tensors[f"{name}_{part}"] for part in ("packed", "scale", "global_scale"))
        packed_again, scales_again = reference.quantize(
            reference.dequantize(packed, scales, 1 / divisor, torch.bfloat16), 1 / divisor
        )
        codes, codes_again = reference.unpack(packed), reference.unpack(packed_again)
        codes[codes == 8] = 0  # a decoded -0.0 has code 0
        is_clamped = (scales.float() == reference.E4M3_MIN) | (scales.float() == reference.E4M3_MAX)
        assert torch.equal(scales_again.float()[~is_clamped], scales.float()[~is_clamped])
        is_clamped = is_clamped.repeat_interleave(16, dim=1)
        assert torch.equal(codes_again[~is_clamped], codes[~is_clamped])


def test_error_is_at_most_half_a_step_and_below_12_percent_rms_on_gaussian_weights(cases: CaseOf, exported: FolderOf):
    decoded = decode_with_compressed_tensors(exported("llama"))
    tensors = read_tensors(exported("llama"))
    for name, weight in decoded.items():
        module = name.removesuffix(".weight")
        scale = tensors[f"{module}.weight_scale"].float() / tensors[f"{module}.weight_global_scale"]
        scale = scale.repeat_interleave(16, dim=1)
        master, served = cases("llama").weights[name], weight.float()
        relative = master.abs() / scale
        step = scale * torch.where(relative < 2, 0.5, torch.where(relative < 4, 1.0, 2.0))
        is_inside = relative <= 6
        assert ((master - served).abs() <= 0.5 * step)[is_inside].all()
    gaussian = "model.layers.1.mlp.gate_proj.weight"
    master = cases("llama").weights[gaussian]
    assert (master - decoded[gaussian].float()).norm() / master.norm() < 0.12


def test_exact_global_scale_decodes_within_one_bf16_step(cases: CaseOf, tmp_path: Path):
    model = cases("llama").with_rule(global_scale="exact")
    report = model.export(tmp_path / "exact")
    assert report.verified.compared == len(model.weights)
    compute = model.compute_weights()
    for key, weight in decode_with_compressed_tensors(tmp_path / "exact").items():
        torch.testing.assert_close(weight, compute[key], rtol=2.0**-7, atol=0)


def test_report_counts_bits(cases: CaseOf, exported: FolderOf):
    report = verify_export(exported("llama"))
    names = cases("llama").manifest.names
    numel = sum(cases("llama").weights[name].numel() for name in names)
    assert report.quantized_parameters == numel
    assert report.bits_per_weight == 4.5 + 32 * len(names) / numel
    assert report.bytes == sum(tensor.nbytes for tensor in read_tensors(exported("llama")).values())
    assert report.compared == 0


def test_own_tables_equal_torch_for_every_byte():
    every_byte = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(disk.E4M3_TABLE, every_byte.view(torch.float8_e4m3fn).float().numpy())
    x = torch.cat([torch.randn(1000), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 0.0, -0.0, 1e-40])])
    np.testing.assert_array_equal(disk.to_bf16_bits(x.numpy()), x.bfloat16().view(torch.int16).numpy().view(np.uint16))


def test_own_decoder_reads_the_golden_packing_vector():
    packed = np.array([[0xF7, 0x20, 0x42, 0x64, 0x86, 0x08, 0xCE, 0xA0]], np.uint8)
    one = np.array([[0x38]], np.uint8)
    values = [6, -6, 0, 1, 1, 2, 2, 4, 4, -0.0, -0.0, 0, -4, -2, 0, -1]
    np.testing.assert_array_equal(READER.decode(packed, one, np.float32(1)), np.array([values], np.float32))
