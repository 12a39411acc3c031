"""The dtypes of a model that is served, against transformers itself: saved, and loaded with dtype=bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.models.served_dtype import served_dtypes

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
MAMBA: dict[str, Any] = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "deepseek_v3": MLA,
    "deepseek_v4": {"num_hidden_layers": 4},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": MAMBA,
    "qwen3_next": EXPERTS | LINEAR_ATTENTION,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# One of each kind; the others of these models are compared with transformers alone.
KNOWN: dict[str, dict[str, torch.dtype]] = {
    "deepseek_v3": {
        "model.layers.1.mlp.gate.weight": torch.float32,
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.float32,
        "model.layers.1.mlp.experts.down_proj": torch.bfloat16,
    },
    "deepseek_v4": {
        "model.layers.0.attn_hc.fn": torch.float32,
        "model.layers.0.mlp.gate.tid2eid": torch.int64,
        "model.layers.3.mlp.gate.e_score_correction_bias": torch.float32,
    },
    "hunyuan_v1_moe": {"model.layers.0.mlp.gate.wg.weight": torch.float32},
    # `_keep_in_fp32_modules` names it, for float16.
    "gpt_oss": {"model.layers.0.input_layernorm.weight": torch.bfloat16},
    "llama": {"model.rotary_emb.inv_freq": torch.float32, "lm_head.weight": torch.bfloat16},
}


@pytest.mark.parametrize("model_type", CASES)
def test_dtypes_are_those_that_transformers_loads(model_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type, **SMALL | CASES[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    expected = {name: tensor.dtype for name, tensor in loaded.named_parameters(remove_duplicate=False)}
    expected |= {name: tensor.dtype for name, tensor in loaded.named_buffers(remove_duplicate=False)}
    assert served_dtypes(model) == expected
    assert served_dtypes(loaded) == expected
    assert expected.items() >= KNOWN.get(model_type, {}).items()
