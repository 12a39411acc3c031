"""Small models with awkward weights, and what an export of them has to decode to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nvfp4_train.export import ExportReport, export_compressed_tensors
from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule
from nvfp4_train.quant.policy import QuantConfig, select

SMALL: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    # K = 48, N = 48 and 72, and a down_proj that stays in bf16: 72 inputs.
    "llama_odd": ("llama", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 72}),
    "qwen2_bias": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3_fused": ("phi3", {}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
}
MOE = ("qwen3_moe", "mixtral")
DENSE = tuple(name for name in CASES if name not in MOE)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model as training leaves it."""

    config: PretrainedConfig
    weights: dict[str, Tensor]
    groups: list[list[str]]

    def compute_weights(self, rule: ScaleRule = MAX_RULE) -> dict[str, Tensor]:
        served = {name: weight.bfloat16() for name, weight in self.weights.items()}
        for group in self.groups:
            names = [f"{member}.weight" for member in group]
            s2 = reference.global_scale(torch.stack([self.weights[name].abs().amax() for name in names]).amax(), rule)
            served.update({name: reference.fake_quant(self.weights[name], s2, torch.bfloat16, rule) for name in names})
        return served

    def export(self, folder: Path, **options: Any) -> ExportReport:
        arguments = {"weights": self.weights, "groups": self.groups, "config": self.config, **options}
        return export_compressed_tensors(folder, **arguments)

    def dense_model(self) -> PreTrainedModel:
        """A plain bf16 model that holds the compute weights."""
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        model.load_state_dict(self.compute_weights())
        return model.eval()


def trained(case: str) -> Trained:
    model_type, changes = CASES[case]
    config = AutoConfig.for_model(model_type, **SMALL | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(-0.5, 0.5)
        attention = model.model.layers[0].self_attn
        attention.o_proj.weight.zero_()
        weight = attention.qkv_proj.weight if case == "phi3_fused" else attention.q_proj.weight
        weight[0, :16] = 0
        weight[1, 16:32] *= 1e-6
        weight[2, :16] *= 50
    groups = [list(group) for group in select(model, QuantConfig()).groups]
    return Trained(config=config, weights=dict(model.state_dict()), groups=groups)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the safetensors package."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
