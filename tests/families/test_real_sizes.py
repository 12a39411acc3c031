"""At the sizes of the published models 99.9 % of the weights are in NVFP4. Built on the meta device, with the names of the hub."""

from typing import Any

import pytest
from family import share_in_nvfp4
from transformers import AutoConfig

from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.policy import QuantConfig, select

GRANITE_4_H_SMALL: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
}
DEFAULT_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "glm4_moe": {},
    "deepseek_v3": {},
    "gpt_oss": {},
    "granitemoehybrid": GRANITE_4_H_SMALL,
}
"""The defaults of a class are the sizes of its first release, except where fields are given."""


@pytest.mark.parametrize("model_type", DEFAULT_SIZES)
def test_nearly_all_weights_are_in_nvfp4(model_type: str) -> None:
    layout = HubLayout(AutoConfig.for_model(model_type, **DEFAULT_SIZES[model_type]))
    selection = select(layout.model, QuantConfig(), layout)
    assert share_in_nvfp4(layout.model, selection.manifest) >= 0.999
