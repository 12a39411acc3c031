"""What may be left in bf16 by itself, what it takes on disk, and how a budget of bits is spent on it."""

import random

import pytest
from judged import PLAIN
from running import ROOT
from tiny_models import tiny_model

from nvfp4_train.judge.bits_budget import (
    check_budget,
    exclusion_patterns,
    mean_bits,
    most_sensitive,
    nearest_to_the_ends,
    override,
)
from nvfp4_train.judge.units import Unit, kind_of, kinds, layer_name, layers, smallest_units, whole
from nvfp4_train.quant.policy import QuantConfig, select
from nvfp4_train.run.compose import compose_options


def units_of(family: str, **fields: object) -> list[Unit]:
    model = tiny_model(family, **fields)
    return smallest_units(model, select(model, PLAIN).manifest)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.3.gate_proj.weight", "model.layers.12"),
        ("layers.0.linear", "layers.0"),
        ("0.linear.weight", "0"),
        # A linear in a list by itself is in no layer.
        ("projections.0.weight", None),
        ("model.conv1d.2b.weight", None),
    ],
)
def test_a_layer_is_named_up_to_its_number(name: str, layer: str | None) -> None:
    assert layer_name(name) == layer


def test_kinds_of_siblings_are_named_together() -> None:
    assert kind_of(["a.layers.1.mlp.gate_proj.weight", "a.layers.1.mlp.up_proj.weight"]) == "mlp.gate_proj+up_proj"
    assert kind_of(["a.layers.1.mlp.w1.weight", "a.layers.1.attn.w2.weight"]) == "mlp.w1+attn.w2"
    assert kind_of(["a.layers.1.mlp.w1.weight", "a.layers.2.mlp.w1.weight"]) == "mlp.w1"


def test_siblings_and_all_experts_of_a_layer_are_one_unit() -> None:
    attention = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"]
    dense = units_of("llama")
    assert [unit.kind for unit in dense[:4]] == [*attention, "mlp.gate_proj+up_proj", "mlp.down_proj"]
    assert [unit.label for unit in dense[:1]] == ["model.layers.0.self_attn.q_proj+k_proj+v_proj"]
    experts = units_of("mixtral")
    assert sorted(unit.kind for unit in experts if unit.depth == 1) == sorted(
        [*attention, "mlp.experts.gate_up_proj+down_proj"]
    )
    # Experts that are modules of a list.
    assert {unit.kind for unit in units_of("jamba") if "experts" in unit.kind} <= {
        "feed_forward.experts.gate_up_proj+down_proj",
        "feed_forward.experts.*.gate_proj+up_proj",
        "feed_forward.experts.*.down_proj",
    }


def test_layers_and_kinds_are_made_of_the_same_weights() -> None:
    smallest = units_of("qwen3_next")
    everything = whole(smallest)
    assert [unit.label for unit in layers(smallest)] == ["model.layers.0", "model.layers.1"]
    assert {unit.label for unit in kinds(smallest)} >= {"*.self_attn.o_proj", "*.mlp.experts.gate_up_proj+down_proj"}
    for joined in (smallest, layers(smallest), kinds(smallest)):
        assert sorted(name for unit in joined for name in unit.names) == sorted(everything.names)
        assert sum(unit.num_weights for unit in joined) == everything.num_weights
        assert mean_bits(joined) == mean_bits(smallest)


def some_units(seed: int = 0, num_layers: int = 6) -> list[Unit]:
    sizes = random.Random(seed)
    units = []
    for depth in range(num_layers):
        for kind in ("attn.o", "mlp.up", "mlp.down"):
            layer = f"model.layers.{depth}"
            num = 16 * sizes.randint(1, 40)
            units.append(
                Unit(
                    label=f"{layer}.{kind}",
                    names=(f"{layer}.{kind}.weight",),
                    layer=layer,
                    depth=depth,
                    kind=kind,
                    num_weights=num,
                    bits=num * 9 // 2 + 32,
                )
            )
    return units


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_kept_and_spent(seed: int) -> None:
    units = some_units(seed)
    draws = random.Random(seed)
    kl = {unit.label: draws.random() for unit in units}
    for bits in (mean_bits(units), 4.8, 5.5, 8, 12, 16):
        for excluded in (most_sensitive(units, kl, bits), nearest_to_the_ends(units, bits)):
            assert mean_bits(units, excluded) <= bits
            others = [unit for unit in units if unit not in excluded]
            assert all(mean_bits(units, [*excluded, unit]) > bits for unit in others), "nothing more would fit"
    assert most_sensitive(units, kl, mean_bits(units)) == []
    assert most_sensitive(units, kl, 16) == units


def test_what_saves_most_for_its_bits_is_chosen_first() -> None:
    small, large, useless = some_units()[:3]
    units = [
        Unit(**vars(unit) | {"num_weights": num, "bits": num * 9 // 2})
        for unit, num in ((small, 16), (large, 160), (useless, 16))
    ]
    kl = {units[0].label: 0.1, units[1].label: 0.5, units[2].label: 0.0}
    both = mean_bits(units, units[:2])
    assert most_sensitive(units, kl, both) == units[:2]
    assert most_sensitive(units, kl, both - 0.01) == units[:1], "twice the KL per bit of the large one"
    assert most_sensitive(units, kl, 16) == units[:2], "what costs nothing stays quantized"


def test_the_ends_come_first_without_a_measurement() -> None:
    units = [Unit(**vars(unit) | {"num_weights": 16, "bits": 72}) for unit in some_units(num_layers=5)]
    from_the_ends = [0] * 3 + [4] * 3 + [1] * 3 + [3] * 3 + [2] * 3
    for num in range(len(units) + 1):
        chosen = nearest_to_the_ends(units, mean_bits(units, units[:num]))
        assert [unit.depth for unit in chosen] == sorted(from_the_ends[:num])


@pytest.mark.parametrize("bits", [4.4, 16.5, float("nan")])
def test_a_budget_that_nothing_meets_is_refused(bits: float) -> None:
    units = some_units()
    with pytest.raises(ValueError, match=rf"bits must be from {mean_bits(units):.4f}, .* to 16, got {bits:g}"):
        check_budget(units, bits)


def test_patterns_are_exact_and_few() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    selection = select(model, PLAIN)
    names, smallest = selection.manifest.names, smallest_units(model, selection.manifest)
    by_label = {unit.label: unit for unit in (*smallest, *layers(smallest), *kinds(smallest))}

    def patterns(*labels: str) -> list[str]:
        return exclusion_patterns([name for label in labels for name in by_label[label].names], names)

    assert patterns("model.layers.2") == ["model.layers.2.*"]
    assert patterns("*.mlp.down_proj", "model.layers.1") == ["model.layers.1.*", "*.mlp.down_proj"]
    assert sorted(patterns("*.mlp.gate_proj+up_proj")) == ["*.mlp.gate_proj", "*.mlp.up_proj"]
    assert patterns("model.layers.3.self_attn.o_proj") == ["model.layers.3.self_attn.o_proj"]
    o_proj, qkv = "model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.q_proj+k_proj+v_proj"
    assert patterns(o_proj, qkv) == ["model.layers.3.self_attn.*"]
    assert patterns("*.self_attn.o_proj", "*.self_attn.q_proj+k_proj+v_proj") == ["*.self_attn.*"]
    assert override(patterns("model.layers.2")) == "quant.exclude=[model.layers.2.*]"
    given = ["model.layers.[01].*", "*.mlp.{a,b}", "*.o_proj"]
    assert override(given) == 'quant.exclude=["model.layers.[01].*","*.mlp.{a,b}",*.o_proj]'
    assert compose_options(ROOT, ["run_dir=x", override(given)])[0]["quant"]["exclude"] == given
    draws = random.Random(0)
    for _ in range(20):
        left = draws.sample(smallest, draws.randint(1, len(smallest) - 1))
        excluded = {name for unit in left for name in unit.names}
        selected = select(model, QuantConfig(exclude=exclusion_patterns(excluded, names))).manifest.names
        assert set(names) - set(selected) == excluded
