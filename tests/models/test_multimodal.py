"""Folders of multimodal models: the language model trains on text, the rest is frozen and exported as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from export.export_models import read_tensors
from multimodal_models import MULTIMODAL, TEXT, save_multimodal
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, CompressedTensorsConfig, PreTrainedModel

from nvfp4_train.export.replicated import FromStore
from nvfp4_train.export.writer import export_model
from nvfp4_train.models.architecture import OUTSIDE, model_class, modules_outside, parameters_outside
from nvfp4_train.models.build import BuiltModel, build_model, quantize
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, decoder_layers, load_config
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.prepare import first_sequences, prepare
from nvfp4_train.models.served_check import check_served
from nvfp4_train.models.sharding import fsdp_units
from nvfp4_train.optim import parameter_groups
from nvfp4_train.plan import RunShape, make_plan, meta_model
from nvfp4_train.quant.policy import QuantConfig, select

IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
QUANT = QuantConfig(rule="hessian", include=["*"])
WITH_EXPERTS = ("llama4", "qwen3_5_moe")
"""Transformers 5.24 does not find the experts of these where the folder is packed."""


def train(built: BuiltModel, steps: int = 2) -> Tensor:
    """Calibrate, equalize, quantize and train a model. Returns its logits in the end."""
    calibration = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    prepare(built.model, built.store, QUANT, first_sequences([{"input_ids": calibration}], 8))
    built.store.update()
    check_served(built.model, IDS[:1])
    optimizer = torch.optim.AdamW(parameter_groups(built.model, weight_decay=0.1), lr=1e-2)
    for _ in range(steps):
        logits = compute_logits(built.model, IDS).float()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        # DDP waits for the gradient of everything that takes one.
        assert all(p.grad is not None for p in built.model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        built.store.update()
    with torch.no_grad():
        return compute_logits(built.model.eval(), IDS)


def build(folder: Path, **options: Any) -> BuiltModel:
    config = ModelConfig(path=str(folder))
    return build_model(config, QUANT, torch.device("cpu"), compute_dtype=torch.bfloat16, **options)


def load(cls: type[PreTrainedModel], folder: Path, **options: Any) -> Tensor:
    model, info = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not any(info.values()), info
    with torch.no_grad():
        return compute_logits(model.eval(), IDS)


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_a_folder_is_trained_on_text_and_exported_as_its_own_class(model_type: str, tmp_path: Path) -> None:
    original = save_multimodal(tmp_path / "original", model_type)
    built = build(tmp_path / "original")
    assert built.model.config.architectures == [type(original).__name__]
    outside = parameters_outside(original)
    assert outside
    assert not outside & set(built.selection.manifest.names)
    trained = train(built)
    export_model(tmp_path / "export", FromStore(built.model, built.store))
    if model_type not in WITH_EXPERTS:
        assert torch.equal(load(type(original), tmp_path / "export"), trained)
        dequantize = CompressedTensorsConfig(dequantize=True)
        assert torch.equal(load(type(original), tmp_path / "export", quantization_config=dequantize), trained)
    before, after = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "export")
    key_of = HubLayout(original.config).hub_names()
    for name in outside:
        assert torch.equal(before[key_of[name]], after[key_of[name]]), name
    trained_keys = {key for name, key in key_of.items() if name not in outside and key in after}
    assert any(not torch.equal(before[key], after[key]) for key in trained_keys & before.keys())


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_a_folder_with_experts_decodes_to_what_was_trained(model_type: str, tmp_path: Path) -> None:
    """The export is verified against the served weights, and those are what was trained."""
    original = save_multimodal(tmp_path / "original", model_type)
    built = build(tmp_path / "original")
    trained = train(built)
    served = FromStore(built.model, built.store)
    export_model(tmp_path / "export", served)
    plain = type(original)._from_config(original.config, dtype=torch.bfloat16)
    plain.load_state_dict(dict(served))
    with torch.no_grad():
        assert torch.equal(compute_logits(plain.eval(), IDS), trained)


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_layers_and_units_are_those_of_the_language_model(model_type: str) -> None:
    name, fields = MULTIMODAL[model_type]
    config = AutoConfig.for_model(model_type, architectures=[name], **fields)
    cls, _ = model_class(config)
    assert cls.__name__ == name
    with torch.device("meta"):
        model = cls._from_config(config)
    layers = decoder_layers(model)
    assert len(layers) == 2
    assert len({type(layer) for layer in layers}) == 1
    assert all("Vision" not in type(layer).__name__ for layer in layers)
    units, towers = fsdp_units(model), modules_outside(model)
    assert [unit.modules[0] for unit in units if not unit.is_called] == towers
    of_towers = {id(p) for tower in towers for p in tower.parameters()}
    outside = parameters_outside(model)
    assert {id(p) for name, p in model.named_parameters() if name in outside} == of_towers


IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"pixel_values": [1, 3, 28, 28], "image_token": 260, "num": 1},
    "llava": {"pixel_values": [1, 3, 28, 28], "image_token": 260, "num": 4},
    "internvl": {"pixel_values": [1, 3, 28, 28], "image_token": 260, "num": 1},
}


@pytest.mark.parametrize("model_type", IMAGES)
def test_an_export_sees_images_as_the_trained_model_does(model_type: str, tmp_path: Path) -> None:
    case = IMAGES[model_type]
    original = save_multimodal(tmp_path / "original", model_type)
    built = build(tmp_path / "original")
    train(built)
    export_model(tmp_path / "export", FromStore(built.model, built.store))
    ids = IDS[:1].clone()
    ids[0, 2 : 2 + case["num"]] = case["image_token"]
    generator = torch.Generator().manual_seed(5)
    pixels, others = (torch.randn(case["pixel_values"], generator=generator).bfloat16() for _ in range(2))
    exported = type(original).from_pretrained(tmp_path / "export", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        seen = built.model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        assert torch.equal(exported(input_ids=ids, pixel_values=pixels, use_cache=False).logits, seen)
        assert not torch.equal(exported(input_ids=ids, pixel_values=others, use_cache=False).logits, seen)


def test_a_plan_holds_towers_and_never_gathers_them() -> None:
    name, fields = MULTIMODAL["qwen3_vl"]
    model_config = ModelConfig(config={"model_type": "qwen3_vl", "architectures": [name], **fields})
    shape = RunShape(world_size=2, seq_len=64)
    model = meta_model(model_config)
    plan = make_plan(model, QuantConfig(), shape)
    deeper = fields | {"vision_config": fields["vision_config"] | {"depth": 5}}
    larger = meta_model(ModelConfig(config={"model_type": "qwen3_vl", "architectures": [name], **deeper}))
    plan_of_larger = make_plan(larger, QuantConfig(), shape)
    rows, rows_of_larger = ({row.name: row.packed for row in p.memory} for p in (plan, plan_of_larger))
    assert rows_of_larger["masters"] - rows["masters"] == 2 * (plan_of_larger.num_parameters - plan.num_parameters)
    for row in ("optimizer (AdamW)", "gradients", "quantized shards"):
        assert rows_of_larger[row] == rows[row]
    assert plan_of_larger.wire_total == plan.wire_total
    assert plan_of_larger.num_quantized == plan.num_quantized


def test_a_multimodal_model_in_a_repl_keeps_its_tower_in_bf16() -> None:
    name, fields = MULTIMODAL["qwen3_5"]
    torch.manual_seed(0)
    # The config names no class, and stands for a text model as well.
    model = getattr(transformers, name)(AutoConfig.for_model("qwen3_5", **fields))
    store = quantize(model, calibration=[torch.randint(0, 256, (1, 64)) for _ in range(4)])
    # 5 of each attention and 3 of each MLP, less the two gates of the linear one.
    assert len(store.names) == 13
    assert not any("visual" in parameter for parameter in store.names)


def test_weights_that_layers_of_gemma4_share_are_left_out(tmp_path: Path) -> None:
    """Published folders hold keys and values of layers that take those of another."""
    save_multimodal(tmp_path, "gemma4")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention", "full_attention"]
    config["text_config"]["num_kv_shared_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    not_built = build(tmp_path).not_built
    assert not_built is not None
    assert not not_built.kept
    assert "model.language_model.layers.1.self_attn.k_proj.weight" in not_built.left_out


def test_the_policy_says_why_a_tower_stays_in_bf16(tmp_path: Path) -> None:
    original = save_multimodal(tmp_path, "gemma3")
    kept = select(original, QuantConfig(include=["*"]), HubLayout(original.config)).kept
    assert {reason for name, reason in kept.items() if "vision_tower" in name} == {OUTSIDE}
    with pytest.raises(ValueError, match="the policy selects no weight"):
        select(original, QuantConfig(include=["*vision_tower*"]), HubLayout(original.config))


def test_a_text_model_is_not_cut() -> None:
    config = AutoConfig.for_model("llama", **TEXT)
    with torch.device("meta"):
        model = model_class(config)[0]._from_config(config)
    assert not parameters_outside(model)
    assert not modules_outside(model)


def test_the_text_model_of_a_multimodal_config_is_built_where_the_folder_names_it(tmp_path: Path) -> None:
    fields = MULTIMODAL["qwen3_5"][1]
    AutoConfig.for_model("qwen3_5", architectures=["Qwen3_5ForCausalLM"], **fields).save_pretrained(tmp_path)
    assert load_config(ModelConfig(path=str(tmp_path))).model_type == "qwen3_5_text"


@pytest.mark.parametrize(
    ("model_type", "architecture", "reason"),
    [
        ("bert", "BertModel", "BertModel: it gives no logits of a next token"),
        ("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration: it has an encoder"),
        ("siglip", None, "has no language model for model_type 'siglip'"),
    ],
)
def test_a_model_that_is_no_causal_language_model_is_refused(
    model_type: str, architecture: str | None, reason: str, tmp_path: Path
) -> None:
    named = [architecture] if architecture else None
    AutoConfig.for_model(model_type, architectures=named).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_config(ModelConfig(path=str(tmp_path)))
