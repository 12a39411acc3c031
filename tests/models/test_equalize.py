"""Equalization is found in any family, proven, and exact: logits keep their bits, and inputs have the statistics that were computed."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, MLA, SMALL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.models.build import build_model, make_trainable
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, load_model
from nvfp4_train.models.equalize import Equalized, equalize
from nvfp4_train.models.fold_sites import find_sites, kind_of
from nvfp4_train.quant.calibration import InputStatistics, calibrate
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import QuantConfig, select

IDS = torch.randint(3, 64, (1, 32), generator=torch.Generator().manual_seed(1))
TEXT = [torch.randint(3, 64, (1, 48), generator=torch.Generator().manual_seed(seed)) for seed in range(2, 8)]

NORMS = {"input_layernorm", "post_attention_layernorm"}
GATED = NORMS | {"self_attn.v_proj", "mlp.up_proj"}
GEMMA = {"input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj"}
EXPERTS = NORMS | {"self_attn.v_proj"}
"""Experts make the inputs of their second weight themselves."""
MLA_NORMS = {"self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"}

FOLDED: dict[str, set[str]] = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "stablelm": GATED,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": NORMS | {"self_attn.qkv_proj", "mlp.gate_up_proj"},
    "gpt_neox": NORMS | {"attention.query_key_value"},
    # One norm feeds attention and MLP.
    "phi": {"input_layernorm", "self_attn.v_proj"},
    "starcoder2": NORMS | {"self_attn.v_proj"},
    "nemotron": NORMS | {"self_attn.v_proj"},
    # A product with ReLU is one with its input.
    "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,
    "deepseek_v3": GATED - {"self_attn.v_proj"} | MLA_NORMS | {"self_attn.kv_b_proj", "mlp.shared_experts.up_proj"},
    "qwen3_next": NORMS | {"linear_attn.norm", "self_attn.v_proj", "mlp.shared_expert.up_proj"},
    "mamba2": {"norm", "mixer.norm"},
    "lfm2": {"operator_norm", "ffn_norm", "feed_forward.w3", "self_attn.v_proj"},
    "minimax": {"self_attn.norm", "self_attn.v_proj"},
    "olmo2": {"self_attn.v_proj", "mlp.up_proj"},
    "zamba2": {"input_layernorm", "mamba.norm", "mamba_decoder.input_layernorm", "mamba_decoder.mamba.norm"},
}
"""By family the modules of a layer that are scaled."""

NO_FEEDER = "its input is not, channel by channel, the output of one norm or linear"
CHANGES = "scaling it changes the logits, so something else depends on its output, too"
SKIPPED: dict[str, dict[str, str]] = {
    "gpt_neox": {"mlp.dense_4h_to_h": NO_FEEDER},
    "phi": {"mlp.fc2": NO_FEEDER},
    "starcoder2": {"mlp.c_proj": NO_FEEDER},
    "nemotron": {"mlp.down_proj": NO_FEEDER},
    "lfm2": {"conv.out_proj": NO_FEEDER},
    # The residual begins at the norm's output.
    "minimax": {"input_layernorm": CHANGES, "post_attention_layernorm": CHANGES, "mlp.experts.down_proj": NO_FEEDER},
    **{
        family: {"mlp.experts.down_proj": NO_FEEDER}
        for family in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next")
    },
    # Norms are after attention and MLP, which read the residual.
    "olmo2": {"self_attn.q_proj": NO_FEEDER, "mlp.gate_proj": NO_FEEDER},
    "zamba2": {"shared_transformer.feed_forward.down_proj": "shares its weight with model.layers."},
}
ONE_PLUS_WEIGHT = {"gemma2", "gemma3_text", "nemotron", "qwen3_next"}

MORE_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA
    | {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2}
    | {"topk_group": 1, "first_k_dense_replace": 1},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def config(family: str, **options: Any) -> ModelConfig:
    fields = {"model_type": family} | SMALL | FAMILIES.get(family, {}) | MORE_FIELDS.get(family, {})
    return ModelConfig(config=fields, **options)


def spread(model: nn.Module) -> None:
    """Give masters values that are not bf16's, biases that are not 0, and channels of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter *= 4 * torch.randn(parameter.shape[-1], generator=generator).exp2()


def served(family: str, compute_dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, QuantManifest]:
    """A model as it trains."""
    torch.manual_seed(0)
    built = build_model(config(family, **options), QuantConfig(), torch.device("cpu"), compute_dtype=compute_dtype)
    spread(built.model)
    return built.model, built.selection.manifest


def unserved(family: str) -> tuple[nn.Module, QuantManifest]:
    """A model that computes with its masters as they are."""
    torch.manual_seed(0)
    model = load_model(config(family), torch.float32)
    spread(model)
    return model, select(model, QuantConfig()).manifest


def statistics_of(model: nn.Module, manifest: QuantManifest) -> dict[str, InputStatistics]:
    batches = [({"input_ids": ids}, True) for ids in TEXT]
    return calibrate(model, manifest, batches, lambda batch: compute_logits(model, batch["input_ids"])).statistics


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    was_training = model.training
    logits = torch.cat([compute_logits(model.eval(), ids) for ids in TEXT]).float()
    model.train(was_training)
    return logits


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def in_layer(name: str) -> str:
    return re.sub(r"^.*?\.#\.", "", kind_of(name))


def fold(model: nn.Module, manifest: QuantManifest, **options: Any) -> tuple[Equalized, Tensor, Tensor]:
    """Equalize, by default by powers of two; also the logits before and after."""
    statistics, before = statistics_of(model, manifest), logits_of(model)
    equalized = equalize(model, manifest, statistics, 0.5, IDS, **{"round_to_pow2": True} | options)
    return equalized, before, logits_of(model)


@pytest.mark.parametrize("family", FOLDED)
def test_logits_stay_and_sites_are_those_of_the_family(family: str) -> None:
    model, manifest = served(family)
    before_fold = masters(model)
    equalized, before, after = fold(model, manifest)
    assert {in_layer(name) for name in equalized.folded} == FOLDED[family]
    skipped = {in_layer(name): reason for name, reason in equalized.skipped.items()}
    assert skipped.keys() == SKIPPED.get(family, {}).keys()
    for name, reason in SKIPPED.get(family, {}).items():
        assert reason in skipped[name]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before_fold[name])}
    assert {f"{name}.weight" for name in equalized.folded} <= changed
    if family in ONE_PLUS_WEIGHT:
        # 1 + weight, of which the weight is served in bf16.
        assert 0 < (after - before).square().mean().sqrt() < 0.03 * before.square().mean().sqrt()
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("family", sorted(ONE_PLUS_WEIGHT))
def test_one_plus_weight_is_folded_as_such(family: str) -> None:
    """Nothing but the rounding to bf16 changes logits."""
    model, manifest = unserved(family)
    equalized, before, after = fold(model, manifest)
    assert {in_layer(name) for name in equalized.folded} == FOLDED[family]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "deepseek_v3", "gpt_oss"])
def test_bf16_keeps_its_bits(family: str) -> None:
    equalized, before, after = fold(*served(family, torch.bfloat16))
    assert {in_layer(name) for name in equalized.folded} == FOLDED[family]
    assert torch.equal(after, before)


def test_unrounded_scales_keep_logits_but_for_rounding() -> None:
    model, manifest = unserved("llama")
    equalized, before, after = fold(model, manifest, round_to_pow2=False)
    assert {in_layer(name) for name in equalized.folded} == FOLDED["llama"]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_scales_are_those_of_the_formula() -> None:
    alpha, heads, kv_heads, width = 0.3, 4, 2, 16
    model, manifest = unserved("llama")
    statistics, old = statistics_of(model, manifest), masters(model)
    equalize(model, manifest, statistics, alpha, IDS)
    new = masters(model)

    def scales(rms: Tensor, column_amax: Tensor) -> Tensor:
        s = rms**alpha / column_amax ** (1 - alpha)
        return s / s.log().mean().exp()

    def check(name: str, s: Tensor) -> None:
        torch.testing.assert_close(new[name] / old[name], s.expand_as(new[name]), rtol=1e-4, atol=1e-5)

    attention = "model.layers.1.self_attn."
    o_proj = f"{attention}o_proj.weight"
    # A channel of a value head is read by two query heads.
    rms = statistics[o_proj].rms.view(kv_heads, heads // kv_heads, width).square().mean(1).sqrt().flatten()
    column_amax = old[o_proj].abs().amax(0).view(kv_heads, heads // kv_heads, width).amax(1).flatten()
    s_of_v = scales(rms, column_amax)
    check(o_proj, s_of_v.view(kv_heads, 1, width).expand(-1, heads // kv_heads, -1).flatten())

    group = [f"{attention}{leaf}_proj.weight" for leaf in "qkv"]
    # The rows of v as they were: what one site scales does not change the scales of another.
    s_of_norm = scales(statistics[group[0]].rms, torch.cat([old[name] for name in group]).abs().amax(0))
    check("model.layers.1.input_layernorm.weight", 1 / s_of_norm)
    check(group[0], s_of_norm)
    check(group[2], s_of_norm / s_of_v[:, None])


def test_statistics_are_those_of_the_folded_model() -> None:
    model, manifest = served("llama")
    equalized, *_ = fold(model, manifest)
    for group, expected in statistics_of(model, manifest).items():
        found = equalized.statistics[group]
        assert torch.equal(found.rms, expected.rms)
        assert torch.equal(found.amax, expected.amax)
        torch.testing.assert_close(found.hessian, expected.hessian, rtol=1e-4, atol=1e-4 * float(expected.hessian.abs().max()))


def test_quantization_loses_less() -> None:
    def loss(with_equalization: bool) -> float:
        torch.manual_seed(0)
        built = build_model(config("llama"), QuantConfig(), torch.device("cpu"), compute_dtype=torch.float32)
        spread(built.model)
        expected = logits_of(built.model)
        if with_equalization:
            fold(built.model, built.selection.manifest)
        built.store.update()
        return float((logits_of(built.model) - expected).square().mean())

    assert loss(True) < 0.8 * loss(False)


def test_dead_channels_and_extremes_keep_to_the_limits() -> None:
    model, manifest = served("llama")
    norm = model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        norm[:16] = 0
        norm[16] = 2.0**30
        norm[17] = 2.0**-30
        model.model.layers[0].mlp.down_proj.weight[:, 5] = 0
    old = masters(model)
    fold(model, manifest)
    new = masters(model)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    s = (new[q_proj] / old[q_proj])[0]
    assert (s[:16] == 1).all()
    assert s[16:].log2().abs().max() == 8
    assert s[16] == 2.0**8
    up_proj = "model.layers.0.mlp.up_proj.weight"
    columns = model.model.layers[0].mlp.gate_proj.weight / old["model.layers.0.mlp.gate_proj.weight"]
    assert torch.equal(new[up_proj][5], old[up_proj][5] * columns[0]), "nothing reads this row"


def test_compiled_and_recomputing_layers_are_left_as_they_were() -> None:
    model, manifest = served("llama", compile=True, gradient_checkpointing=True)
    plain, _ = served("llama")
    compute_logits(plain.eval(), IDS)
    compiled = [module._compiled_call_impl for module in model.modules()]
    assert any(compiled)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    statistics = statistics_of(model, manifest)
    equalize(model, manifest, statistics, 0.5, IDS, round_to_pow2=True)
    equalize(plain, manifest, statistics, 0.5, IDS, round_to_pow2=True)
    assert model.training
    assert [module._compiled_call_impl for module in model.modules()] == compiled
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    compute_logits(model, IDS).float().logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_averages_of_gradients_are_those_of_the_folded_model() -> None:
    model, manifest = served("stablelm")
    optimizer = adamw(model)
    old, states = (
        masters(model),
        {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()},
    )
    fold(model, manifest, optimizer=optimizer)
    num_scaled = 0
    for name, parameter in model.named_parameters():
        factors = torch.where(old[name] == 0, 1.0, parameter.detach() / old[name])
        num_scaled += bool((factors != 1).any())
        state = optimizer.state[parameter]
        assert torch.equal(state["exp_avg"], states[name]["exp_avg"] / factors)
        assert torch.equal(state["exp_avg_sq"], states[name]["exp_avg_sq"] / factors.square())
        assert torch.equal(state["max_exp_avg_sq"], states[name]["max_exp_avg_sq"] / factors.square())
        assert torch.equal(state["step"], states[name]["step"])
    # Norms and their biases, q, k, v, o, gate, up and down of two layers.
    assert num_scaled == 2 * (4 + 7)


def test_bad_options_change_nothing() -> None:
    model, manifest = served("llama")
    statistics, before = statistics_of(model, manifest), masters(model)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"quant.equalize must be none or lie between 0 and 1, got {alpha}"):
            equalize(model, manifest, statistics, alpha, IDS)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    compute_logits(model, IDS).float().mean().backward()
    sgd.step()
    with pytest.raises(
        ValueError, match="can scale an optimizer's exp_avg, .* got a state momentum_buffer of SGD; .*equalize=none"
    ):
        equalize(model, manifest, statistics, 0.5, IDS, optimizer=sgd)
    for name, master in masters(model).items():
        assert torch.equal(master, before[name])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down_proj = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Eight experts, each token in one of them; `spoilt` reads the norm's output without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(32), nn.Linear(32, 8)
        self.experts = nn.ModuleList(Mlp() for _ in range(8))
        self.spoilt = False

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        gate, chosen = self.router(read).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            of_expert = chosen == index
            out[of_expert] = self.experts[index](read[of_expert]) * gate[of_expert].unsqueeze(-1)
        return x + out + (read.square() if self.spoilt else 0)


class Toy(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.lm_head = nn.Linear(32, 64)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(x))


def toy(num_layers: int = 4) -> tuple[Toy, QuantManifest]:
    torch.manual_seed(0)
    model = Toy(num_layers)
    return model, select(model, QuantConfig(exclude=["*router*"])).manifest


def test_experts_that_no_token_reaches_are_folded_with_the_others() -> None:
    model, manifest = toy()
    statistics = statistics_of(model, manifest)
    # Of eight experts at least four see none of these.
    few = IDS[:, :4]
    equalized, before, after = fold(model, manifest)
    again = equalize(model, manifest, statistics, 0.5, few, round_to_pow2=True)
    names = {f"layers.{layer}.experts.{expert}.up_proj" for layer in range(4) for expert in range(8)}
    assert set(equalized.folded) == set(again.folded) == names | {f"layers.{layer}.norm" for layer in range(4)}
    assert not equalized.skipped
    assert not again.skipped
    assert torch.equal(after, before)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("spoilt", [[2], [1, 2]])
def test_a_norm_with_a_reader_that_is_not_seen_is_skipped(spoilt: list[int]) -> None:
    """By name where it is one; where it is several, all of their kind are."""
    model, manifest = toy()
    for layer in spoilt:
        model.layers[layer].spoilt = True
    old = masters(model)
    equalized, before, after = fold(model, manifest)
    expected = {f"layers.{layer}.norm": CHANGES for layer in (spoilt if len(spoilt) == 1 else range(4))}
    assert equalized.skipped == expected
    assert torch.equal(after, before)
    for name in expected:
        assert torch.equal(model.get_parameter(f"{name}.weight"), old[f"{name}.weight"])
        layer = name.removesuffix(".norm")
        assert torch.equal(model.get_parameter(f"{layer}.router.weight"), old[f"{layer}.router.weight"]), "not restored"


class Cubed(nn.RMSNorm):
    """A norm that computes with its weight in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight**3)


class SquaredRouter(nn.Module):
    """One that does more than multiply by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.square(), self.weight)


@pytest.mark.parametrize(
    ("leaf", "module", "reason"),
    [
        ("norm", Cubed(32), "its output is not proportional to its weight"),
        ("router", SquaredRouter(), "layers.1.router does not only multiply its output by weights"),
    ],
)
def test_modules_that_cannot_be_scaled_are_named(leaf: str, module: nn.Module, reason: str) -> None:
    model, manifest = toy()
    setattr(model.layers[1], leaf, module)
    equalized, before, after = fold(model, manifest)
    assert equalized.skipped == {"layers.1.norm": reason}
    assert torch.equal(after, before)


def test_shared_weights_are_scaled_once_where_all_agree() -> None:
    """Two layers are one module, and gates of two experts have one weight: all of them read one norm."""
    model, _ = toy(3)
    model.layers[1] = model.layers[0]
    model.layers[2].experts[1].gate_proj.weight = model.layers[2].experts[0].gate_proj.weight
    manifest = select(model, QuantConfig(exclude=["*router*"])).manifest
    equalized, before, after = fold(model, manifest)
    assert {"layers.0.norm", "layers.2.norm"} <= set(equalized.folded)
    assert not equalized.skipped
    assert torch.equal(after, before)


def test_shared_weights_that_read_different_inputs_are_not_scaled() -> None:
    model, _ = toy(2)
    model.layers[1].experts[3].gate_proj.weight = model.layers[0].experts[3].gate_proj.weight
    manifest = select(model, QuantConfig(exclude=["*router*"])).manifest
    equalized, before, after = fold(model, manifest)
    first, second = (f"layers.{layer}.experts.3.gate_proj" for layer in (0, 1))
    # Both gates are in one group with their siblings, which two norms feed.
    assert equalized.skipped == {
        "layers.0.experts.3.up_proj": NO_FEEDER,
        "layers.0.norm": f"{first} shares its weight with {second}",
        "layers.1.norm": f"{second} shares its weight with {first}",
    }
    assert torch.equal(after, before)


def test_a_quantized_model_is_equalized_by_its_masters() -> None:
    """As a run does that switches quantization on for the second time."""
    torch.manual_seed(0)
    model = load_model(config("llama"), torch.float32)
    store = make_trainable(model, QuantConfig(), compute_dtype=torch.float32).store
    store.update()
    with store.masters_only():
        equalized, before, after = fold(model, store.manifest)
    assert {in_layer(name) for name in equalized.folded} == FOLDED["llama"]
    assert torch.equal(after, before)


def test_an_experiment_for_one_kind_of_linears_may_find_the_feeders_of_another() -> None:
    """Gemma 3n's linears between the streams of its residual do, once its scales of outputs are not 0."""
    fields = SMALL | {
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "laurel_rank": 16,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [64, 64],
        "sliding_window": 32,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3n_text", **fields)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    sites, skipped = find_sites(model, select(model, QuantConfig()).manifest, IDS)
    assert sites
    assert "model.altup_projections.0" in skipped
