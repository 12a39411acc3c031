"""What quantizing some weights alone costs: of the weights that it says, and by the forwards that it saves."""

from contextlib import AbstractContextManager
from copy import deepcopy

import numpy as np
import pytest
import torch
from judged import W4A4, lively_model, quantized, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from nvfp4_train.judge.bits_budget import mean_bits, most_sensitive
from nvfp4_train.judge.restart import LayerOutputsOfAForward
from nvfp4_train.judge.sensitivity import Comparison
from nvfp4_train.judge.units import ALL, kinds, layers, whole
from nvfp4_train.models.causal_lm import compute_logits, decoder_layers
from nvfp4_train.models.logits import find_logit_map
from nvfp4_train.quant.experts import held_rows_first
from nvfp4_train.quant.policy import QuantConfig


def plain_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL of every sequence, float64 [B]."""
    p, q = (F.log_softmax(x.double(), -1) for x in (reference, logits))
    return (p.exp() * (p - q)).sum(-1).mean(-1)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_the_quantized_weights_are_those_of_the_unit_alone(family: str) -> None:
    """Beside the plain class with the same values in its parameters."""
    model = lively_model(family)
    plain = deepcopy(model)
    made, units, comparison = quantized(model)
    batches = tokens()
    found = comparison.measure(batches, {unit.label: unit.names for unit in units}, ["w4a16"])
    transposed = held_rows_first(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.bfloat16())
        reference = [compute_logits(plain, batch["input_ids"]) for batch in batches]
        values = dict(plain.named_parameters())
        for unit in units:
            before = {name: values[name].clone() for name in unit.names}
            for name in unit.names:
                weight = made.store.compute_weight(name)
                values[name].copy_(weight.transpose(1, 2) if name in transposed else weight)
            logits = [compute_logits(plain, batch["input_ids"]) for batch in batches]
            for name, value in before.items():
                values[name].copy_(value)
            expected = torch.cat([plain_kl(*pair) for pair in zip(reference, logits, strict=True)])
            assert expected.min() > 1e-7
            np.testing.assert_allclose(found[unit.label, "w4a16"].values["kl"], expected.numpy(), rtol=1e-3, atol=1e-6)


def test_inputs_are_quantized_of_the_unit_alone() -> None:
    model = lively_model("mixtral")
    made, units, comparison = quantized(model, W4A4)
    assert made.inputs.is_enabled
    batch = tokens(1)
    for unit in units:
        with made.store.quantized_only(unit.names):
            enabled = [group for group in made.inputs.groups if made.inputs[group[0]].is_enabled]
            assert enabled == [group for group in made.inputs.groups if set(group) <= set(unit.names)]
            # A context inside leaves it as it was.
            with made.inputs.serving("w4a16"):
                assert not made.inputs.is_enabled
            assert enabled == [group for group in made.inputs.groups if made.inputs[group[0]].is_enabled]
    sets = {unit.label: unit.names for unit in (whole(units), *units)}
    found = comparison.measure(batch, sets, ["w4a16", "w4a4"])
    for label in sets:
        assert found[label, "w4a4"].means()["kl"] != found[label, "w4a16"].means()["kl"]
    assert all(made.inputs[group[0]].is_enabled for group in made.inputs.groups), "as before"
    # Nothing quantized is nothing lost.
    (none,) = comparison.measure(batch, {"none": []}, ["w4a4"]).values()
    assert none.means() == {"kl": 0, "top1_agreement": 1}


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_next", "zamba2"])
def test_restarted_forwards_give_the_same_bits(family: str) -> None:
    """Also where a layer is called several times, or layers are of several kinds."""
    _, units, comparison = quantized(lively_model(family))
    sets = {unit.label: unit.names for unit in (*units, *layers(units), *kinds(units), whole(units))}
    batches = tokens()
    expected = comparison.measure(batches, sets, ["w4a16"])
    assert comparison.prove_restarts(batches[0], sets, "w4a16") is None
    assert comparison.restarts
    restarted = comparison.measure(batches, sets, ["w4a16"])
    for key, found in expected.items():
        assert found.means()["kl"] > 0
        np.testing.assert_array_equal(restarted[key].values["kl"], found.values["kl"])
    assert comparison.cost(sets[ALL]) == 1
    assert min(map(comparison.cost, sets.values())) <= 0.5


def test_layers_that_hand_on_more_than_their_output_are_not_skipped() -> None:
    model = lively_model("llama", num_hidden_layers=3)

    class HandsOn(nn.Module):
        """Adds what the first layer wrote down to what the last one gives."""

        written: Tensor | None = None

    notes = HandsOn()
    first, *_, last = decoder_layers(model)
    with torch.no_grad():
        for layer, hook in (
            (first, lambda _, args, output: setattr(notes, "written", output)),
            (last, lambda _, args, output: output + notes.written * 2),
        ):
            layer.mlp.register_forward_hook(hook)
    _, units, comparison = quantized(model)
    sets = {unit.label: unit.names for unit in layers(units)}
    batches = tokens()
    # The first layer's note is of the last whole forward, with the second layer's weights unquantized: the same by chance. Not so
    # where the note is taken away.
    last.mlp.register_forward_hook(lambda _, args, output: setattr(notes, "written", torch.zeros(())))
    assert comparison.prove_restarts(batches[0], sets, "w4a16") == "model.layers.1"
    assert not comparison.restarts
    assert {comparison.cost(names) for names in sets.values()} == {1.0}
    found = comparison.measure(batches, sets, ["w4a16"])
    assert min(metrics.means()["kl"] for metrics in found.values()) > 0


def test_forwards_of_layers_are_given_back_after_an_error() -> None:
    model = lively_model("llama")
    own = [type(layer).forward for layer in decoder_layers(model)]
    outputs = LayerOutputsOfAForward(decoder_layers(model))

    def fail(context: AbstractContextManager) -> None:
        with context:
            assert all("forward" in layer.__dict__ for layer in decoder_layers(model))
            raise KeyboardInterrupt

    for context in (outputs.recording(), outputs.starting_at(1)):
        with pytest.raises(KeyboardInterrupt):
            fail(context)
        assert [layer.forward.__func__ for layer in decoder_layers(model)] == own


def make_hard(model: nn.Module, layer: int) -> None:
    """Ruin what NVFP4 makes of the output projection of a layer's attention, and nothing of what it computes.

    The first channel of every head is always 0, and its weights are so large that all others in their blocks are rounded to 0.
    """
    attention = model.model.layers[layer].self_attn
    with torch.no_grad():
        attention.v_proj.weight[::16] = 0
        attention.o_proj.weight[:, ::16] = 100 * attention.o_proj.weight.abs().max()


@pytest.mark.parametrize("layer", [0, 2])
def test_what_is_hard_is_found_and_left_in_bf16_first(layer: int) -> None:
    model = lively_model("llama", num_hidden_layers=4)
    make_hard(model, layer)
    _, units, comparison = quantized(model)
    measured = {unit.label: unit.names for unit in (whole(units), *units)}
    found = {label: metrics.means()["kl"] for (label, _), metrics in comparison.measure(tokens(), measured, ["w4a16"]).items()}
    hard = f"model.layers.{layer}.self_attn.o_proj"
    by_kl = sorted((unit for unit in units), key=lambda unit: found[unit.label])
    assert by_kl[-1].label == hard
    assert found[hard] > 3 * found[by_kl[-2].label]
    extra = next(unit.extra_bits for unit in units if unit.label == hard)
    bits = mean_bits(units) + extra / sum(unit.num_weights for unit in units)
    assert [unit.label for unit in most_sensitive(units, found, bits + 1e-9)] == [hard]
    assert most_sensitive(units, found, bits - 1e-3) == [], "every other unit is larger, or as large"
    left = [name for unit in units if unit.label != hard for name in unit.names]
    (without,) = comparison.measure(tokens(), {"left": left}, ["w4a16"]).values()
    assert without.means()["kl"] < 0.5 * found[ALL]


def test_positions_that_do_not_count_are_left_out() -> None:
    model = lively_model("llama")
    made, units, comparison = quantized(model)
    (batch,) = tokens(1)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[0, 5:9], mask[1, 3] = True, True
    (found,) = comparison.measure([batch | {"loss_mask": mask}], {ALL: whole(units).names}, ["w4a16"]).values()
    assert found.positions.tolist() == [4, 1]
    logits = {}
    with torch.no_grad():
        for name, names in (("reference", ()), ("quantized", whole(units).names)):
            with made.store.quantized_only(names):
                logits[name] = compute_logits(model, batch["input_ids"])
    of_first = plain_kl(*(logits[name][:1, 4:8] for name in ("reference", "quantized"))).item()
    assert found.values["kl"][0] == pytest.approx(of_first, rel=1e-4)


def test_logits_that_are_no_product_are_compared_whole() -> None:
    """The same numbers, whichever way the logits are made."""
    model = lively_model("llama")
    made, units, comparison = quantized(model)
    sets = {ALL: whole(units).names}
    assert find_logit_map(model, tokens()[0]["input_ids"]) is not None
    (expected,) = comparison.measure(tokens(), sets, ["w4a16"]).values()
    model.lm_head.register_forward_hook(lambda _, args, output: output + output.mean(-1, keepdim=True))
    assert find_logit_map(model, tokens()[0]["input_ids"]) is None
    (found,) = Comparison(model, made.store, made.inputs).measure(tokens(), sets, ["w4a16"]).values()
    # A number that is added to all logits of a position changes no distribution.
    np.testing.assert_allclose(found.values["kl"], expected.values["kl"], rtol=1e-3)


def test_a_config_with_a_fitted_rule_is_measured_too() -> None:
    _, units, comparison = quantized(lively_model("llama"), QuantConfig(rule="hessian", equalize=0.5))
    (found,) = comparison.measure(tokens(), {ALL: whole(units).names}, ["w4a16"]).values()
    assert 0 < found.means()["kl"] < np.inf
