"""Routers and gates are told from other linears by what they are for, in models of their usual sizes."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.quant.experts import find_experts
from nvfp4_train.quant.policy import Quantizable
from nvfp4_train.quant.roles import Roles

# One or two layers of the default size.
ROLES: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "llama": ({}, {}),
    # One head of keys, and as few of them.
    "gemma3_text": ({"num_key_value_heads": 1}, {}),
    "afmoe": ({"num_hidden_layers": 4}, {"router": {"mlp.router.gate"}}),
    "qwen2_moe": ({}, {"gate": {"mlp.shared_expert_gate"}}),
    "qwen3_next": (
        {"layer_types": ["linear_attention", "full_attention"]},
        {"gate": {"linear_attn.in_proj_ba", "mlp.shared_expert_gate"}},
    ),
    "qwen3_5_text": (
        {"layer_types": ["linear_attention", "full_attention"]},
        {"gate": {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}},
    ),
    "hunyuan_v1_moe": ({"num_experts": 8, "moe_topk": 2, "hidden_size": 512, "head_dim": 64}, {"router": {"mlp.gate.wg"}}),
    "longcat_flash": ({"num_layers": 1}, {"router": {"mlp.router.classifier"}}),
    # The layer holds its experts itself, as many as its keys have channels.
    "gemma4_text": (
        {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
        | {"num_key_value_heads": 1, "head_dim": 128},
        {"router": {"router.proj"}},
    ),
    "jetmoe": ({}, {"router": {"mlp.router.layer", "self_attention.experts.router.layer"}}),
    # As many heads as a key of its index has channels.
    "deepseek_v32": ({"first_k_dense_replace": 1}, {"gate": {"self_attn.indexer.weights_proj"}}),
    # A learned scale for every head of an index; ranks of low-rank projections are no numbers of heads.
    "glm_moe_dsa": ({"first_k_dense_replace": 1}, {"gate": {"self_attn.indexer.weights_proj"}}),
    "mamba": ({}, {}),
    "jamba": ({"use_mamba_kernels": False}, {}),
}


@pytest.mark.parametrize("family", ROLES)
def test_roles_of_linears(family: str) -> None:
    fields, expected = ROLES[family]
    config = AutoConfig.for_model(family, **{"num_hidden_layers": 2} | fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    roles = Roles(model, find_experts(model))
    found: dict[str, set[str]] = {}
    for name, linear in Quantizable.of(model).linears.items():
        if name != "lm_head" and (role := roles.role_of(name, linear)) is not None:
            in_layer = name.partition("layers.")[2].partition(".")[2]
            found.setdefault(role.split()[0], set()).add(in_layer)
    assert found == expected


def test_a_router_is_known_by_its_number_of_outputs() -> None:
    """Whatever it is called, beside experts in one parameter or in a list of modules."""
    model = nn.ModuleDict({"block": nn.ModuleDict({"choose": nn.Linear(32, 4), "mix": nn.Linear(32, 16)})})
    model["block"]["experts"] = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    roles = Roles(model, find_experts(model))
    assert roles.role_of("block.choose", model["block"]["choose"]) == "router"
    assert roles.role_of("block.mix", model["block"]["mix"]) is None
    assert roles.role_of("block.experts.0", model["block"]["experts"][0]) is None
