"""Experts: which parameters they are, how they are held, and that they are quantized one by one."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import nvfp4_train
from nvfp4_train.kernels import reference
from nvfp4_train.models.build import BuiltModel, build_model
from nvfp4_train.models.causal_lm import compute_logits, load_model
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.prepare import prepare
from nvfp4_train.models.served_check import check_served
from nvfp4_train.quant.experts import find_experts, held_rows_first, input_module
from nvfp4_train.quant.policy import QuantConfig, select

IDS = torch.arange(40).view(2, 20)


def build(family: str, dtype: torch.dtype = torch.bfloat16, **quant: str) -> BuiltModel:
    torch.manual_seed(0)
    return build_model(tiny_config(family), QuantConfig(**quant), torch.device("cpu"), compute_dtype=dtype)


def calibrated(family: str, dtype: torch.dtype = torch.bfloat16, **quant: str) -> BuiltModel:
    built = build(family, dtype, **quant)
    batches = [({"input_ids": torch.arange(64).roll(shift).view(1, -1)}, True) for shift in range(8)]
    prepare(built.model, built.store, QuantConfig(**quant), batches)
    built.store.update()
    return built


@pytest.mark.parametrize(
    ("family", "up", "down"),
    [
        # Outputs and inputs, whether inputs come first in the class, and what the rows are.
        ("mixtral", (96, 64, False, ("gate_proj", "up_proj")), (64, 48, False, ("down_proj",))),
        ("gpt_oss", (96, 64, True, ("gate_proj", "up_proj")), (64, 48, True, ("down_proj",))),
        ("llama4_text", (96, 64, True, ("gate_proj", "up_proj")), (64, 48, True, ("down_proj",))),
        ("nemotron_h", (32, 64, False, ("up_proj",)), (64, 32, False, ("down_proj",))),
    ],
)
def test_experts_are_found_whatever_their_layout(family: str, up: tuple, down: tuple) -> None:
    config = load_model(tiny_config(family)).config
    for model in (HubLayout(config).model, build(family).model):
        weights = list(find_experts(model).values())[:2]
        found = [(w.num_outputs, w.num_inputs, w.is_transposed, w.projections) for w in weights]
        assert found == [up, down]
        assert [w.partner for w in weights] == [weights[1].name, weights[0].name]
        assert {w.num_experts for w in weights} == {4}


def test_rows_of_gate_and_up_alternate_where_their_class_says_so() -> None:
    for family, gate, up in (
        ("gpt_oss", slice(0, None, 2), slice(1, None, 2)),
        ("mixtral", slice(0, 48), slice(48, 96)),
    ):
        weight = next(iter(find_experts(load_model(tiny_config(family))).values()))
        assert (weight.rows("gate_proj"), weight.rows("up_proj")) == (gate, up)


def test_other_parameters_of_three_dimensions_are_no_experts() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(16, 16, 4)})
    model.alone = nn.Parameter(torch.zeros(2, 16, 16))
    model.down_proj = nn.Parameter(torch.zeros(2, 16, 16))
    assert find_experts(model) == {}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_held_with_outputs_first_they_compute_the_same_bits(family: str) -> None:
    built, plain = build(family), tiny_model(family, torch.bfloat16)
    assert len(held_rows_first(built.model)) == 4
    plain.load_state_dict({n: p.mT if n in held_rows_first(built.model) else p for n, p in built.model.state_dict().items()})
    assert torch.equal(compute_logits(built.model, IDS), compute_logits(plain, IDS))
    for model in (built.model, plain):
        compute_logits(model, IDS).float().logsumexp(-1).mean().backward()
    name = next(iter(held_rows_first(built.model)))
    gradient, expected = built.model.get_parameter(name).grad, plain.get_parameter(name).grad
    assert gradient.shape == built.model.get_parameter(name).shape == expected.mT.shape
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient.bfloat16(), expected.mT)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_every_expert_has_a_global_scale_of_its_own(family: str) -> None:
    built = build(family)
    name = next(iter(find_experts(built.model)))
    with torch.no_grad():
        for expert, matrix in enumerate(built.model.get_parameter(name)):
            matrix *= 4.0**expert
    built.store.update()
    masters, weights = built.model.get_parameter(name), built.store.compute_weight(name)
    scales = [reference.global_scale(matrix.abs().amax()) for matrix in masters]
    assert torch.equal(built.store.global_scale[built.store.slots(name)], torch.stack(scales))
    assert len(set(map(float, scales))) == 4
    for master, weight, s2 in zip(masters, weights, scales, strict=True):
        assert torch.equal(weight, reference.fake_quant(master, s2, torch.bfloat16))
    assert check_served(built.model, IDS) > 20


def test_an_epoch_of_two_steps_moves_every_master_and_follows_it() -> None:
    built = build("gpt_oss")
    built.store.update()
    optimizer = torch.optim.AdamW(built.model.parameters(), lr=1e-2)
    before = {name: built.store.compute_weight(name).clone() for name in find_experts(built.model)}
    for _ in range(2):
        built.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        built.store.update()
    for name, weight in before.items():
        assert not torch.equal(built.store.compute_weight(name), weight)
    check_served(built.model, IDS)


def products(model: nn.Module, name: str) -> Tensor:
    """Inputs of the products with a parameter of experts, of the tokens of IDS."""
    seen: list[Tensor] = []
    handle = input_module(model, name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        compute_logits(model.eval(), IDS)
    handle.remove()
    (x,) = seen
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_inputs_of_both_products_can_be_seen(family: str) -> None:
    """Against experts that are called one by one."""
    built = build(family, torch.float32)
    up_name, down_name = list(find_experts(built.model))[:2]
    experts = built.model.get_submodule(up_name.rpartition(".")[0])
    routed: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda module, args: routed.append(args))
    x = products(built.model, up_name)
    handle.remove()
    hidden, chosen, _ = routed[0]
    assert torch.equal(x, hidden)
    made = products(built.model, down_name)
    assert len(made) == chosen.numel()
    up = built.model.get_parameter(up_name).bfloat16().float()
    rows = []
    for expert in range(4):
        product = F.linear(hidden[(chosen == expert).any(-1)], up[expert])
        if experts.has_bias:
            product = product + experts.gate_up_proj_bias[expert].bfloat16().float()
        rows.append(type(experts).__mro__[2]._apply_gate(experts, product) if experts.has_gate else experts.act_fn[0](product))
    # Tokens of an expert come in any order.
    expected = torch.cat(rows)
    torch.testing.assert_close(made.T @ made, expected.T @ expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.abs().amax(0), expected.abs().amax(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["max", "hessian"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_quantized_inputs_are_those_of_the_served_model(family: str, rule: str) -> None:
    built = calibrated(family, activations="nvfp4", rule=rule)
    compute_logits(built.model, IDS)
    assert check_served(built.model, IDS, torch.bfloat16, built.inputs) > 20
    # Without the experts' quantizers another model is served.
    for name in find_experts(built.model):
        input_module(built.model, name).quantizer = None
    with pytest.raises(ValueError, match="is the first module with another output"):
        check_served(built.model, IDS, torch.bfloat16, built.inputs)


def test_gradients_pass_quantized_inputs_straight_through() -> None:
    built = calibrated("mixtral", torch.float32, activations="nvfp4")
    name = list(find_experts(built.model))[1]
    module = input_module(built.model, name)
    x = torch.randn(5, 48, requires_grad=True)
    module(x).square().sum().backward()
    x_hat = reference.fake_quant_input(x.detach(), built.store.state.input_scale(name))
    assert not torch.equal(x_hat, x.detach())
    assert torch.equal(x.grad, 2 * x_hat)


def test_an_expert_without_tokens_shares_the_scales_of_its_layer() -> None:
    built = build("mixtral", activations="nvfp4", rule="hessian")
    with torch.no_grad():
        for layer in built.model.model.layers:
            # No token goes to the last expert.
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] = layer.mlp.gate.weight[:3].abs() + 1
            layer.post_attention_layernorm.weight.fill_(1.0)
            layer.mlp.gate.weight[3] = -100
    batches = [({"input_ids": torch.arange(64).roll(shift).view(1, -1)}, True) for shift in range(8)]
    prepare(built.model, built.store, QuantConfig(activations="nvfp4", rule="hessian"), batches)
    built.inputs.check_calibrated()
    built.store.update()
    assert built.store.global_amax.isfinite().all()


def test_experts_whose_inputs_are_closed_stay_in_bf16_where_those_are_needed() -> None:
    model = load_model(tiny_config("llama4_text"))
    layout = HubLayout(model.config)
    assert find_experts(model).keys() <= set(select(model, QuantConfig(), layout).manifest.names)
    for options in ({"rule": "hessian"}, {"activations": "nvfp4"}, {"serve": "w4a4"}):
        kept = select(model, QuantConfig(**options), layout).kept
        assert {kept[name] for name in find_experts(model)} == {
            "inputs of Llama4TextExperts cannot be measured, as hessian and W4A4 need it"
        }


def test_all_weights_of_experts_are_selected_or_none() -> None:
    model = tiny_model("mixtral")
    assert not find_experts(model).keys() & set(select(model, QuantConfig(exclude=["*experts*"])).manifest.names)
    with pytest.raises(
        ValueError, match=r"experts.gate_up_proj would be quantized but its sibling .*experts.down_proj would not"
    ):
        select(model, QuantConfig(exclude=["*experts.down_proj"]))
    # 40 inputs of the second weight are no multiple of 16, so the first one stays, too.
    kept = select(tiny_model("mixtral", intermediate_size=40), QuantConfig()).kept
    assert kept["model.layers.0.mlp.experts.down_proj"] == "40 inputs are no multiple of 16"
    assert "take all weights of an expert or none" in kept["model.layers.0.mlp.experts.gate_up_proj"]


def test_a_model_in_a_repl_keeps_its_parameter_objects() -> None:
    model = tiny_model("gpt_oss")
    before = dict(model.named_parameters())
    store = nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert "model.layers.0.mlp.experts.gate_up_proj" in store.names


def test_a_copy_of_the_student_has_the_layout_of_the_class(tmp_path) -> None:
    """A teacher of random weights is one."""
    from nvfp4_train.models.build import ModelBuilder

    built = build("gpt_oss")
    teacher = ModelBuilder(student=built.model, config=tiny_config("gpt_oss"), device=torch.device("cpu"))()
    assert torch.equal(compute_logits(teacher, IDS), compute_logits(built.model.eval(), IDS))
    assert type(teacher) is type(AutoModelForCausalLM.from_config(built.model.config))
