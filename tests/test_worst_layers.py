"""Which layers are named as the worst, and that hints follow from their numbers."""

import math

import pytest
from tiny_models import tiny_model

from nvfp4_train.quant.policy import QuantConfig, select
from nvfp4_train.worst_layers import worst_layers


def rows(**of_worst: float) -> dict[str, dict[str, float]]:
    """Four layers, of which q_proj of the second one is the worst."""
    names = [f"model.layers.{depth}.self_attn.{kind}_proj" for depth in range(4) for kind in "qkvo"]
    values = {name: {"sqnr_db": 20.0 + place / 100} for place, name in enumerate(names)}
    values["model.layers.1.self_attn.q_proj"] = {"sqnr_db": 19.5} | of_worst
    return values


GROUP = "quant.exclude=[" + ",".join(f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv") + "]"


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({}, "nothing stands out: it is as the others of its kind"),
        ({"sqnr_db": 17.0}, f"3.0 dB below the median of its kind: keep in bf16: {GROUP}"),
        ({"input_clipped_share": 0.02}, "2.00% of its inputs are clipped: raise quant.input_headroom"),
        (
            {"scale_at_floor_share": 0.05},
            f"5.0% of its blocks have the smallest scale: few large weights set the global scale; keep in bf16: {GROUP}",
        ),
        (
            {"scale_at_floor_share": 0.05, "sibling_amax_ratio": 0.01},
            "5.0% of its blocks have the smallest scale: its amax is 0.01 of that of its siblings, whose global scale it shares; "
            f"keep in bf16: {GROUP}",
        ),
        ({"oscillation_rate": 0.03}, "3.0% of its weights oscillate"),
        ({"flip_rate": 0.2, "oscillation_rate": 0.0}, "20.0% of its codes changed since the last look: lower optim.lr"),
        ({"other_scale_share": 0.0}, "try quant.rule=four_over_six, or hessian"),
        ({"other_scale_share": 0.3}, "nothing stands out"),
        ({"scale_at_floor_share": 0.0, "sibling_amax_ratio": 0.5, "input_clipped_share": 0.0}, "nothing stands out"),
    ],
)
def test_hints_follow_from_the_numbers(values: dict[str, float], hint: str) -> None:
    worst = worst_layers(rows(**values))[0]
    assert worst.layer == "model.layers.1.self_attn.q_proj"
    assert worst.values["sqnr_db"] == values.get("sqnr_db", 19.5)
    assert worst.hint.startswith(hint) or worst.hint.endswith(hint)


def test_the_worst_come_first_and_no_more_than_asked() -> None:
    values = rows() | {"zeros": {"sqnr_db": math.nan}, "exact": {"sqnr_db": math.inf}, "unknown": {"zero_share": 0.1}}
    worst = worst_layers(values, 3)
    assert [layer.layer for layer in worst] == [
        f"model.layers.{at}" for at in ("1.self_attn.q_proj", "0.self_attn.q_proj", "0.self_attn.k_proj")
    ]
    assert [layer.layer for layer in worst_layers(values, 100)][-1] == "exact"
    assert len(worst_layers(values, 100)) == 17
    assert worst_layers({"a": {"zero_share": 0.5}}) == []


def test_a_layer_beside_exact_ones_is_not_infinitely_far_below_them() -> None:
    exact = {f"model.layers.{at}.mlp.up_proj": {"sqnr_db": math.inf} for at in range(3)}
    worst, *_ = worst_layers(exact | {"model.layers.3.mlp.up_proj": {"sqnr_db": 20.0}})
    assert worst.hint == "nothing stands out: it is as the others of its kind"


def test_both_matrices_of_experts_are_kept_together() -> None:
    experts = {
        f"model.layers.{at}.mlp.experts.{leaf}": {"sqnr_db": 20.0} for at in range(3) for leaf in ("gate_up_proj", "down_proj")
    }
    experts["model.layers.1.mlp.experts.down_proj"] = {"sqnr_db": 10.0}
    (worst,) = worst_layers(experts, 1)
    parent = "model.layers.1.mlp.experts"
    assert worst.hint.endswith(f"quant.exclude=[{parent}.gate_up_proj,{parent}.down_proj]")


def test_the_policy_takes_the_names_of_a_hint() -> None:
    model = tiny_model("llama")
    names = [name.removesuffix(".weight") for name in select(model, QuantConfig()).manifest.names]
    values = {name: {"sqnr_db": 20.0} for name in names}
    for name in names:
        (worst,) = worst_layers(values | {name: {"sqnr_db": 10.0}}, 1)
        excluded = worst.hint.partition("quant.exclude=[")[2].removesuffix("]").split(",")
        kept = select(model, QuantConfig(exclude=excluded)).kept
        assert name in excluded
        assert {other for other, reason in kept.items() if reason == "in quant.exclude"} == set(excluded)
