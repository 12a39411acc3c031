"""Which tensors in memory are which on disk, and which of them may be quantized."""

from typing import Any

import pytest
import torch
from test_served_dtype import CASES, EXPERTS, MLA, SMALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.policy import QuantConfig, select

JOINED = "the hub stores it in another layout"
KEPT: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "sarvam_moe": (MLA | EXPERTS, {"model.layers.1.self_attn.k_proj": JOINED}),
    "hrm_text": (
        {"num_key_value_heads": 4},
        {"model.H_module.layers.0.self_attn.gate_proj": JOINED, "model.L_module.layers.1.mlp.up_proj": JOINED},
    ),
    "hunyuan_v1_moe": (CASES["hunyuan_v1_moe"], {"model.layers.0.mlp.gate.wg": "transformers keeps it in float32"}),
    "llama": ({"tie_word_embeddings": True}, {"lm_head": "output embedding"}),
}


def tiny(model_type: str, **fields: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **SMALL | fields)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("model_type", KEPT)
def test_what_a_folder_cannot_hold_is_kept_with_the_reason_before_training(model_type: str) -> None:
    fields, kept = KEPT[model_type]
    model = tiny(model_type, **fields)
    selection = select(model, QuantConfig(), HubLayout(model.config))
    assert selection.kept.items() >= kept.items()
    quantized = {name.removesuffix(".weight") for name in selection.manifest.names}
    assert quantized
    assert quantized.isdisjoint(kept)


def test_linears_that_are_tied_to_one_another_are_kept() -> None:
    model = tiny("llama")
    layout = HubLayout(model.config)
    name = "model.layers.0.mlp.down_proj.weight"
    layout.aliases["model.layers.1.mlp.down_proj.weight"] = name
    kept = select(model, QuantConfig(), layout).kept
    assert kept["model.layers.0.mlp.down_proj"] == kept["model.layers.1.mlp.down_proj"] == "tied to another module"


@pytest.mark.parametrize("model_type", [*CASES, "sarvam_moe", "hrm_text", "mixtral"])
def test_bundle_by_bundle_a_model_becomes_what_transformers_saves(model_type: str) -> None:
    fields = CASES.get(model_type) or KEPT.get(model_type, ({},))[0]
    model = tiny(model_type, **fields)
    layout = HubLayout(model.config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in layout.aliases}
    whole = revert_weight_conversion(model, state)
    found: dict[str, torch.Tensor] = {}
    for names, keys in layout.bundles.items():
        tensors = layout.to_hub({name: state[name] for name in names})
        assert tuple(tensors) == keys
        found |= tensors
    assert found.keys() == whole.keys() == layout.hub_tensors.keys()
    for key, tensor in whole.items():
        assert torch.equal(found[key], tensor), key
        assert layout.hub_tensors[key].shape == tensor.shape
