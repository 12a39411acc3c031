import re

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.quant.policy import CalibrationConfig, QuantConfig, select, selection_table


def llama(**overrides: object) -> nn.Module:
    fields: dict = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(fields | overrides)))


def names(selection) -> list[str]:
    return [name.removesuffix(".weight") for name in selection.manifest.names]


def test_default_takes_every_linear_but_the_output_embedding() -> None:
    model = llama()
    selection = select(model, QuantConfig())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(names(selection)) == linears - {"lm_head"}
    assert selection.kept == {"lm_head": "output embedding"}


def test_siblings_share_a_group() -> None:
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    groups = select(llama(num_hidden_layers=1), QuantConfig()).manifest.groups
    assert groups == (
        tuple(f"{attention}{leaf}.weight" for leaf in ("q_proj", "k_proj", "v_proj")),
        (attention + "o_proj.weight",),
        tuple(f"{mlp}{leaf}.weight" for leaf in ("gate_proj", "up_proj")),
        (mlp + "down_proj.weight",),
    )


def test_layers_that_do_not_fit_stay_in_bf16_and_are_reported() -> None:
    model = llama(intermediate_size=40)
    selection = select(model, QuantConfig())
    assert selection.kept["model.layers.1.mlp.down_proj"] == "40 inputs are no multiple of 16"
    assert "40 inputs are no multiple of 16" in selection_table(model, selection)


def test_patterns_choose() -> None:
    selection = select(llama(), QuantConfig(include=["model.layers.*"], exclude=["*.layers.1.*", "*o_proj"]))
    assert len(names(selection)) == 6
    assert selection.kept["model.layers.0.self_attn.o_proj"] == "in quant.exclude"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str) -> None:
    with pytest.raises(ValueError, match=rf"quant.{option}: pattern '\*.qproj' matches no nn.Linear"):
        select(llama(), QuantConfig(**{option: ["*_proj", "*.qproj"]}))


def test_a_selection_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="selects no weight"):
        select(llama(), QuantConfig(include=["lm_head"]))


@pytest.mark.parametrize(
    ("model_type", "fields", "reasons"),
    [
        (
            "gpt2",
            {"n_embd": 32, "n_layer": 2, "n_head": 2},
            [r"lm_head \(output embedding\)", r"h.0.attn.c_attn and all 8 .*Conv1D"],
        ),
        (
            "falcon",
            {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            [r"self_attention.query_key_value.* and 5 more \(a FalconLinear computes in its own way\)"],
        ),
        (
            "llama",
            {"hidden_size": 72, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3},
            [r"72 inputs are no multiple of 16", r"mlp.down_proj \(24 inputs are no multiple of 16\)"],
        ),
    ],
)
def test_a_model_of_which_nothing_can_be_quantized_is_refused_with_every_reason(
    model_type: str, fields: dict, reasons: list[str]
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=64, **fields))
    for reason in ("selects no weight of this model, all are kept in bf16", *reasons):
        with pytest.raises(ValueError, match=reason):
            select(model, QuantConfig())


def test_siblings_are_quantized_all_or_none() -> None:
    with pytest.raises(ValueError, match="k_proj would be quantized but its sibling .*q_proj would not"):
        select(llama(), QuantConfig(exclude=["*.q_proj"]))


def test_modules_that_share_a_parameter_share_a_group() -> None:
    model = llama()
    first, second = (layer.self_attn.o_proj for layer in model.model.layers)
    second.weight = first.weight
    selection = select(model, QuantConfig())
    assert tuple(f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)) in selection.manifest.groups


def test_a_weight_that_an_embedding_uses_stays_in_bf16() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(16, 16), "a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["a"].weight = model["embed"].weight
    assert select(model, QuantConfig()).kept == {"a": "shares its weight with an embedding"}


def test_routers_stay_in_bf16() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(16, 4), "expert": nn.Linear(16, 16)})
    assert select(model, QuantConfig()).kept == {"gate": "router"}


def test_table_counts_parameters_and_bits() -> None:
    model = llama()
    table = selection_table(model, select(model, QuantConfig()))
    total = sum(p.numel() for p in model.parameters())
    quantized = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    assert f"{quantized:,} of {total:,}" in table
    assert f"{(4.5 * quantized + 16 * (total - quantized)) / total:.3f}" in table
    assert "8, 4 of them shared by siblings" in table


@pytest.mark.parametrize(
    "options",
    [
        {"global_scale": "pow3"},
        {"start_step": -1},
        {"include": "*"},
        {"rule": "hesse"},
        {"refit_every": 0},
        {"activations": "int8"},
        {"serve": "w8a8"},
        {"equalize": -0.1},
        {"equalize": 1.5},
        {"equalize": "foo"},
        {"equalize": float("nan")},
        {"gather": "fp32"},
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=f"quant.{next(iter(options))} must be"):
        QuantConfig(**options)


@pytest.mark.parametrize("headroom", [0.5, 257, float("nan")])
def test_headroom_is_at_least_none_and_leaves_block_scales_a_range(headroom: float) -> None:
    with pytest.raises(ValueError, match=f"quant.input_headroom must lie in 1 to 256, got {headroom}"):
        QuantConfig(input_headroom=headroom)


UNCALIBRATED = {"calibration": CalibrationConfig(sequences=0), "equalize": None}


@pytest.mark.parametrize(
    "options",
    [{"rule": "hessian"}, {"equalize": 0.5}, {"activations": "nvfp4"}, {"serve": "w4a4"}],
    ids=lambda o: next(iter(o)),
)
def test_what_needs_calibration_is_refused_without(options: dict) -> None:
    ((name, value),) = options.items()
    message = rf"quant\.calibration\.sequences must be at least 1 with quant\.{name}={value}, got 0"
    with pytest.raises(ValueError, match=message):
        QuantConfig(**UNCALIBRATED | options)
    QuantConfig(**options)
    QuantConfig(**UNCALIBRATED)
    with pytest.raises(ValueError, match="sequences must be at least 0, got -1"):
        CalibrationConfig(sequences=-1)


@pytest.mark.parametrize(("equalize", "alpha"), [(None, None), ("none", None), (0, 0.0), (0.5, 0.5), (1, 1.0)])
def test_the_exponent_of_the_equalization(equalize: float | str | None, alpha: float | None) -> None:
    assert QuantConfig(equalize=equalize).alpha == alpha


@pytest.mark.parametrize(
    ("activations", "serve", "trained", "served"),
    [
        ("none", None, "w4a16", "w4a16"),
        ("nvfp4", None, "w4a4", "w4a4"),
        ("none", "w4a4", "w4a16", "w4a4"),
        ("nvfp4", "w4a16", "w4a4", "w4a16"),
    ],
)
def test_what_is_served_is_what_was_trained_unless_told_otherwise(
    activations: str, serve: str | None, trained: str, served: str
) -> None:
    config = QuantConfig(activations=activations, serve=serve)
    assert (config.trained_serving, config.serving) == (trained, served)
    assert select(llama(), config).manifest.activations == {"w4a16": "none", "w4a4": "nvfp4"}[served]


def test_selection_does_not_depend_on_the_device() -> None:
    with torch.device("meta"):
        on_meta = select(llama(), QuantConfig())
    assert on_meta == select(llama(), QuantConfig())


def test_the_table_names_matrices_that_are_in_no_linear() -> None:
    model = tiny_model("mixtral")
    table = selection_table(model, select(model, QuantConfig()))
    assert re.search("in bf16: matrices of MixtralTopKRouter +model.layers.0.mlp.gate.weight and 1 more", table)
    assert "MixtralExperts" not in table
    kept = selection_table(model, select(model, QuantConfig(exclude=["*experts*"])))
    assert re.search("in bf16: matrices of MixtralExperts +model.layers.0.mlp.experts.gate_up_proj and 3 more", kept)
