"""Small models with awkward weights, and what an export of them has to decode to."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nvfp4_train.export import ExportReport, export_compressed_tensors
from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.served_dtype import plain_model, served_dtypes
from nvfp4_train.quant.experts import hold_rows_first
from nvfp4_train.quant.manifest import QuantManifest
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
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
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
    # On disk q, k and v of a layer are one matrix, in hrm_text the gates of attention and gate and up of the MLP, too.
    "sarvam_moe": ("sarvam_moe", {"head_dim": 16, **DEEPSEEK_EXPERTS}),
    "hrm_text": ("hrm_text", {"num_key_value_heads": 4}),
    # Routers in fp32: one by `_keep_in_fp32_modules_strict`, the other an nn.Linear that is made so.
    "deepseek_v3": (
        "deepseek_v3",
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        | {"num_key_value_heads": 4, **DEEPSEEK_EXPERTS},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    # A linear that is named `shared_mlp.input_linear`: its block scales are no scales of activations.
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 32}),
    # Experts with inputs first, in one tensor on disk: rows of gate and up alternate, with biases; or they do not, by bmm.
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ),
    "llama4": ("llama4_text", {"head_dim": 16, "num_local_experts": 4, "intermediate_size": 48, "intermediate_size_mlp": 64}),
    # No gate.
    "nemotron_h": (
        "nemotron_h",
        {"layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
    ),
}
# Transformers joins or splits tensors of these while it loads them, and so loads no packed folder.
CONVERTED = (
    "qwen3_moe",
    "mixtral",
    "sarvam_moe",
    "hrm_text",
    "deepseek_v3",
    "hunyuan_v1_moe",
    "granitemoeshared",
    "nemotron_h",
)
# As published, the experts of a layer are one tensor.
JOINT = ("granitemoeshared", "gpt_oss", "llama4")
CONVERTED += tuple(name for name in JOINT if name not in CONVERTED)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model as training leaves it."""

    config: PretrainedConfig
    weights: dict[str, Tensor]
    manifest: QuantManifest
    state: dict[str, Tensor] = field(default_factory=dict)

    def with_quantized_inputs(self) -> "Trained":
        """Each group with a scale of its own."""
        state = {f"{group[0]}.input_scale": torch.tensor([2.0 ** -(9 + i)]) for i, group in enumerate(self.manifest.groups)}
        return replace(self, manifest=replace(self.manifest, activations="nvfp4"), state=state)

    def with_rule(self, **fields: str) -> "Trained":
        return replace(self, manifest=replace(self.manifest, rule=ScaleRule(**fields)))

    def compute_weights(self) -> dict[str, Tensor]:
        dtypes = served_dtypes(plain_model(self.config))
        served = {name: weight.to(dtypes[name]) for name, weight in self.weights.items()}
        for group in self.manifest.groups:
            slots = [self.weights[name] if self.weights[name].dim() == 3 else self.weights[name][None] for name in group]
            amaxes = torch.stack([weight.abs().amax((1, 2)) for weight in slots]).amax(0)
            scales = [reference.global_scale(amax, self.manifest.rule) for amax in amaxes]
            for name, weight in zip(group, slots, strict=True):
                matrices = [
                    reference.fake_quant(matrix, s2, torch.bfloat16, self.manifest.rule)
                    for matrix, s2 in zip(weight, scales, strict=True)
                ]
                served[name] = torch.stack(matrices).view(self.weights[name].shape)
        return served

    def num_matrices(self) -> int:
        """Quantized matrices on disk."""
        layout = HubLayout(self.config)
        return sum(len(layout.matrices(name)) for name in self.manifest.names)

    def in_class(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as the transformers class has them: experts with inputs first are held with outputs first."""
        shapes = {name: tensor.shape for name, tensor in plain_model(self.config).state_dict().items()}
        # In these cases the two differ.
        return {name: t.mT.contiguous() if t.shape != shapes[name] else t for name, t in tensors.items()}

    def export(self, folder: Path, **options: Any) -> ExportReport:
        arguments = {"weights": self.weights, "manifest": self.manifest, "config": self.config, "state": self.state, **options}
        return export_compressed_tensors(folder, **arguments)

    def dense_model(self) -> PreTrainedModel:
        """A plain bf16 model that holds the compute weights."""
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        model.load_state_dict(self.in_class(self.compute_weights()), assign=True)
        model.tie_weights()
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
        attention = next(
            module for module in model.modules() if hasattr(module, "o_proj") and isinstance(module.o_proj, torch.nn.Linear)
        )
        attention.o_proj.weight.zero_()
        name = {"phi3_fused": "qkv_proj", "deepseek_v3": "q_a_proj"}.get(case, "q_proj")
        weight = getattr(attention, name).weight
        weight[0, :16] = 0
        weight[1, 16:32] *= 1e-6
        weight[2, :16] *= 50
    manifest = select(model, QuantConfig(), HubLayout(config)).manifest
    hold_rows_first(model, manifest.names)
    return Trained(config=config, weights=dict(model.state_dict()), manifest=manifest)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the safetensors package."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
