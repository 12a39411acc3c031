import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.kernels.scale_rules import MAX_RULE
from nvfp4_train.quant.linear import NVFP4Linear, compute_in_served_dtype, quantize_linears
from nvfp4_train.quant.policy import QuantConfig, select
from nvfp4_train.quant.store import WeightStore

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    if hasattr(config, "num_experts"):
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size = 4, 2, 16
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_parameters_are_shared_and_keep_their_names() -> None:
    model = tiny("qwen2")
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    quantize_linears(model, [name for group in select(model, QuantConfig()).groups for name in group])
    compute_in_served_dtype(model)
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_served_bf16_model(family: str) -> None:
    """The reference is the Hugging Face model in bf16 holding the compute weights: difference 0.0, quantized and not."""
    model = tiny(family).eval()
    served = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
    served.load_state_dict(model.state_dict())
    ids = torch.randint(0, 64, (2, 20))
    selection = select(model, QuantConfig())
    quantize_linears(model, [name for group in selection.groups for name in group])
    compute_in_served_dtype(model)
    assert torch.equal(model(input_ids=ids).logits, served(input_ids=ids).logits)

    store = WeightStore(model, selection.groups, rule=MAX_RULE)
    store.update()
    for name, module in store.modules():
        served.get_submodule(name).weight.data.copy_(module.compute_weight)
    assert torch.equal(model(input_ids=ids).logits, served(input_ids=ids).logits)


def test_gradient_goes_straight_through_to_the_master() -> None:
    torch.manual_seed(0)
    linear = NVFP4Linear.from_linear(nn.Linear(16, 4))
    linear.compute_weight = torch.randn(4, 16).bfloat16()
    x = torch.randn(3, 16).bfloat16()
    out = linear(x)
    assert torch.equal(out, F.linear(x, linear.compute_weight, linear.bias.bfloat16()))
    grad = torch.randn(3, 4).bfloat16()
    out.backward(grad)
    assert linear.weight.grad.dtype == torch.float32
    assert torch.equal(linear.weight.grad, (grad.T @ x).float())
    assert torch.equal(linear.bias.grad, grad.sum(0).float())


@pytest.mark.parametrize("with_compute_weights", [False, True])
def test_compiled_forward_has_no_graph_break_and_equals_eager(with_compute_weights: bool) -> None:
    model = tiny("llama")
    selection = select(model, QuantConfig())
    quantize_linears(model, [name for group in selection.groups for name in group])
    compute_in_served_dtype(model)
    if with_compute_weights:
        WeightStore(model, selection.groups, rule=MAX_RULE).update()
    ids = torch.randint(0, 64, (2, 16))
    layer = model.model.layers[0]
    hidden = model.model.embed_tokens(ids)
    position = model.model.rotary_emb(hidden, torch.arange(16).unsqueeze(0))
    compiled = torch.compile(copy.copy(layer), backend="aot_eager", fullgraph=True)
    eager = layer(hidden, position_embeddings=position)
    out = compiled(hidden, position_embeddings=position)
    assert torch.equal(out, eager)
    (expected,) = torch.autograd.grad(eager.sum(), layer.mlp.down_proj.weight)
    (found,) = torch.autograd.grad(out.sum(), layer.mlp.down_proj.weight)
    assert torch.equal(found, expected)


def test_gradient_checkpointing_computes_with_the_same_weights() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        selection = select(model, QuantConfig())
        quantize_linears(model, [name for group in selection.groups for name in group])
        compute_in_served_dtype(model)
        WeightStore(model, selection.groups, rule=MAX_RULE).update()
        ids = torch.arange(32).reshape(2, 16)
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_an_exception_in_a_forward_leaves_the_masters_in_place() -> None:
    norm = nn.LayerNorm(4)
    weight = norm.weight
    compute_in_served_dtype(norm)
    with pytest.raises(RuntimeError):
        norm(torch.zeros(1, 5))
    assert norm.weight is weight
