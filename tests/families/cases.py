"""Small configs of every model type that is tried, as plain data: what differs from `SHARED`, by kind and type.

Every kind of layer of a type is there. Sizes are odd on purpose: heads times head_dim is not the hidden size, for instance. Matrices
have multiples of 16 inputs wherever the type allows it.
"""

from typing import Any

Fields = dict[str, Any]

SHARED: Fields = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM: Fields = {"head_dim": 32}
TIED: Fields = {"tie_word_embeddings": True}
GPT2: Fields = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
MLA: Fields = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
INDEXER: Fields = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
EXPERTS: Fields = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SHARED_EXPERT: Fields = EXPERTS | {"shared_expert_intermediate_size": 48}
GROUPED: Fields = EXPERTS | {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LINEAR_ATTENTION: Fields = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MROPE: Fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
HYBRID_SLIDING: Fields = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "sliding_window_size": 16,
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
}
SPARSE: Fields = {"mlp_layer_types": ["dense", "sparse"]}
SLIDING: Fields = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}

DENSE: dict[str, Fields] = {
    "apertus": {},
    "apertus1p5_text": {},
    "arcee": {},
    "bart": {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
    "bert": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": GPT2 | {"rotary_dim": 8},
    "cohere": {},
    "cohere2": {},
    "cohere_compass_text": SLIDING | {"rope_parameters": dict.fromkeys(SLIDING["layer_types"], MROPE["rope_parameters"])},
    "cpmant": {"dim_head": 32, "dim_ff": 96},
    "ctrl": {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96, "n_positions": 64},
    "cwm": HEAD_DIM,
    "diffllama": {},
    "doge": {},
    "dory": HEAD_DIM,
    "ernie4_5": {"use_bias": True},
    "exaone": {},
    "exaone4": {},
    "falcon": {},
    "gemma": HEAD_DIM,
    "gemma2": HEAD_DIM | SLIDING,
    "gemma3_text": HEAD_DIM | SLIDING,
    "gemma3n_text": HEAD_DIM
    | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "laurel_rank": 16}
    | {"activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
    "gemma4_text": HEAD_DIM | SLIDING | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16},
    "gemma4_unified_text": HEAD_DIM | SLIDING,
    "glm": HEAD_DIM,
    "glm4": HEAD_DIM,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": GPT2 | {"rotary_dim": 8},
    "granite": TIED,
    "granite_swa": SLIDING,
    "helium": {"head_dim": 16, "num_key_value_heads": 4},
    "hrm_text": {"num_key_value_heads": 4},
    "hunyuan_v1_dense": HEAD_DIM,
    "hyperclovax": {},
    "internlm3": HEAD_DIM,
    "iquestcoder": {},
    "jais2": {},
    "lfm3": {},
    "llama": HEAD_DIM | {"attention_bias": True, "mlp_bias": True},
    "minicpm3": MLA,
    "ministral": HEAD_DIM | SLIDING,
    "ministral3": HEAD_DIM,
    "mistral": {"sliding_window": 16},
    "modernbert-decoder": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "openai-gpt": GPT2,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": TIED,
    "qwen3": HEAD_DIM | TIED,
    "roberta": {"is_decoder": True},
    "seed_oss": HEAD_DIM,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {},
    "vaultgemma": HEAD_DIM | SLIDING,
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
    "youtu": MLA | {"pad_token_id": None},
}
EXPERT: dict[str, Fields] = {
    "afmoe": EXPERTS | {"num_dense_layers": 1, "head_dim": 32, "n_group": 1, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": GROUPED | MLA,
    "axk2": GROUPED | MLA | INDEXER,
    "beam": EXPERTS | SPARSE | HEAD_DIM | SLIDING | {"n_group": 2, "topk_group": 1, "num_shared_experts": 1},
    "cohere2_moe": EXPERTS | HEAD_DIM,
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": GROUPED | MLA | {"topk_method": "greedy"},
    "deepseek_v3": GROUPED | MLA,
    "deepseek_v32": GROUPED | MLA | INDEXER,
    "dots1": GROUPED | HEAD_DIM,
    "dots3_note_text": GROUPED
    | MLA
    | INDEXER
    | SPARSE
    | {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16}
    | {"shared_experts_intermediate_size": 48, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
    | {"swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone_moe": GROUPED | HEAD_DIM | {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
    "flex_olmo": EXPERTS,
    "flint": EXPERTS | SPARSE | HEAD_DIM | SLIDING | {"mlp_only_layers": [0]},
    "glm4_moe": GROUPED | HEAD_DIM | {"use_qk_norm": True},
    "glm4_moe_lite": GROUPED | MLA,
    "glm_moe_dsa": GROUPED | MLA | INDEXER,
    "gpt_oss": EXPERTS | HEAD_DIM | SLIDING,
    "granitemoe": EXPERTS,
    "granitemoe_swa": EXPERTS,
    "granitemoeshared": EXPERTS | {"shared_intermediate_size": 48},
    "hunyuan_v1_moe": EXPERTS | HEAD_DIM | {"moe_topk": 2, "num_shared_expert": 1},
    "hy_v3": EXPERTS | HEAD_DIM | {"num_shared_experts": 1, "first_k_dense_replace": 1},
    "hy_v4": GROUPED | MLA | INDEXER | SPARSE | {"head_dim": 16},
    "inkling_text": EXPERTS | HYBRID_SLIDING | SPARSE | {"n_shared_experts": 1},
    "inkling2_text": EXPERTS | HYBRID_SLIDING | {"unpadded_vocab_size": 90},
    "inkling2_loop_text": EXPERTS | HYBRID_SLIDING | {"unpadded_vocab_size": 90},
    "jetmoe": EXPERTS | {"kv_channels": 16, "num_attention_heads": 8, "num_key_value_heads": 4},
    "kolibri1": EXPERTS | HEAD_DIM | SLIDING,
    "laguna": EXPERTS | {"shared_expert_intermediate_size": 48, "head_dim": 16},
    "llama4_text": EXPERTS
    | {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 96, "intermediate_size": 32, "num_hidden_layers": 2}
    | {"no_rope_layers": [1, 0], "attention_chunk_size": 16},
    "longcat_flash": MLA
    | {"num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "n_routed_experts": 4}
    | {"zero_expert_num": 2, "moe_topk": 2, "head_dim": 8},
    "mellum": EXPERTS,
    "mimo_v2_flash": GROUPED | SPARSE | SLIDING | {"head_dim": 16, "v_head_dim": 32},
    "minimax_m2": EXPERTS | HEAD_DIM,
    "minimax_m3_vl_text": EXPERTS | SPARSE | HEAD_DIM | {"dense_intermediate_size": 96, "shared_intermediate_size": 48},
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "qwen2_moe": SHARED_EXPERT | {"mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS | HEAD_DIM | {"mlp_only_layers": [1]},
    "sarvam_mla": GROUPED | MLA,
    "sarvam_moe": GROUPED | HEAD_DIM,
    "solar_open": GROUPED | HEAD_DIM,
    "zaya": EXPERTS | {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
HYBRID: dict[str, Fields] = {
    "bailing_hybrid": GROUPED | MLA | SPARSE | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 16,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    }
    | INDEXER
    | EXPERTS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 16},
    "granitemoehybrid": EXPERTS
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48, "mamba_n_heads": 8, "mamba_d_state": 16},
    "jamba": EXPERTS
    | {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    | {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "use_mamba_kernels": False},
    "kimi_linear": GROUPED
    | MLA
    | SPARSE
    | {"layer_types": ["linear_attention", "full_attention"]}
    | {"linear_head_dim": 16, "linear_num_heads": 4},
    "lara_mini": EXPERTS | LINEAR_ATTENTION | HEAD_DIM,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {"state_size": 16, "time_step_rank": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "minimax": EXPERTS | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "nemotron_h": EXPERTS
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "moe", "mlp"], "mamba_num_heads": 8}
    | {"mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "head_dim": 16}
    | {"moe_shared_expert_intermediate_size": 32},
    "olmo_hybrid": LINEAR_ATTENTION,
    "qwen3_5_text": LINEAR_ATTENTION | HEAD_DIM,
    "qwen3_5_moe_text": LINEAR_ATTENTION | SHARED_EXPERT | HEAD_DIM,
    "qwen3_next": LINEAR_ATTENTION | SHARED_EXPERT | HEAD_DIM,
    "qwen4_exp_text": LINEAR_ATTENTION
    | SHARED_EXPERT
    | HEAD_DIM
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 16, "indexer_compress_ratio": 8},
    "recurrent_gemma": {"lru_width": 64, "num_hidden_layers": 3, "attention_window_size": 16, "head_dim": 16},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "qk_dim_factor": 0.5},
    "zamba": {"num_hidden_layers": 5, "mamba_d_state": 16, "n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"num_key_value_heads": 4, "use_mamba_kernels": False},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_key_value_heads": 4,
        "adapter_rank": 16,
        "chunk_size": 16,
    },
}
VISION: Fields = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "vision_output_dim": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
}
MULTIMODAL: dict[str, Fields] = {
    "aya_vision": {"text_config": {"model_type": "cohere2"}},
    "cohere2_vision": {"text_config": {"model_type": "cohere2"}},
    "gemma3": {"text_config": DENSE["gemma3_text"], "mm_tokens_per_image": 4},
    "gemma4": {"text_config": DENSE["gemma4_text"]},
    "glm4v": {"text_config": MROPE},
    "glm4v_moe": {"text_config": GROUPED | MROPE | HEAD_DIM},
    "idefics3": {"text_config": {"model_type": "llama"}},
    "internvl": {"text_config": {"model_type": "qwen2"}},
    "lfm2_vl": {"text_config": HYBRID["lfm2"] | {"model_type": "lfm2"}},
    "llama4": {"text_config": EXPERT["llama4_text"]},
    "llava": {"text_config": {"model_type": "llama"}},
    "llava_next": {"text_config": {"model_type": "mistral"}},
    "mistral3": {"text_config": {"model_type": "ministral3", "head_dim": 32}},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "paligemma": {"text_config": {"model_type": "gemma", "head_dim": 32}},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "qwen3_5": {"text_config": HYBRID["qwen3_5_text"]},
    "qwen3_5_moe": {"text_config": HYBRID["qwen3_5_moe_text"]},
    "qwen3_vl": {"text_config": HEAD_DIM | MROPE},
    "qwen3_vl_moe": {"text_config": EXPERTS | HEAD_DIM | MROPE},
    "smolvlm": {"text_config": {"model_type": "llama"}},
}
KINDS = {"dense": DENSE, "experts": EXPERT, "hybrid": HYBRID, "multimodal": MULTIMODAL}
CASES = {model_type: fields for cases in KINDS.values() for model_type, fields in cases.items()}

IN_EVERY_RUN = (
    "cohere2", "falcon", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "gpt2", "gpt_bigcode", "gptj", "hrm_text",
    "llama", "mistral", "nanochat", "opt", "phi3", "qwen3", "youtu",
    "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "jetmoe", "llama4_text", "longcat_flash", "mixtral",
    "qwen2_moe", "qwen3_moe", "sarvam_moe",
    "bamba", "deepseek_v4", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "mamba2", "minimax", "nemotron_h", "qwen3_5_text",
    "qwen3_next", "zamba2",
    "gemma3", "gemma4", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
)  # fmt: skip
"""Types that every run of the tests tries. The others are marked slow."""


def fields_of(model_type: str) -> Fields:
    """The fields of the config of a case."""
    fields = CASES[model_type]
    if model_type not in MULTIMODAL:
        return SHARED | fields
    return {"vision_config": VISION} | fields | {"text_config": SHARED | fields["text_config"]}
