"""What a model goes through once before it is quantized."""

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor

from nvfp4_train.models.build import BuiltModel, build_model
from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.models.prepare import first_sequences, prepare
from nvfp4_train.quant.policy import QuantConfig

BATCHES = [{"input_ids": torch.full((2, 3), number), "loss_mask": torch.ones(2, 3, dtype=torch.bool)} for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("num_sequences", "numbers"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 2]), (6, [1, 1, 2, 2, 3, 3]), (9, [1, 1, 2, 2, 3, 3])]
)
def test_first_sequences_are_single_rows_of_the_first_batches(num_sequences: int, numbers: list[int]) -> None:
    found = first_sequences(BATCHES, num_sequences)
    assert [int(batch["input_ids"][0, 0]) for batch, _ in found] == numbers
    assert all(is_counted for _, is_counted in found)
    assert all(batch["input_ids"].shape == batch["loss_mask"].shape == (1, 3) for batch, _ in found)


def test_no_batch_is_asked_for_that_is_not_needed() -> None:
    """A stream of training data has no end, and a batch of it may take long."""

    def stream():
        yield from BATCHES[:2]
        raise AssertionError("a third batch")

    assert len(first_sequences(stream(), 4)) == 4


def prepared(config: QuantConfig) -> tuple[BuiltModel, Tensor, list[str]]:
    """A model with its logits before, and what the user is told."""
    torch.manual_seed(0)
    built = build_model(tiny_config("llama"), config, torch.device("cpu"), compute_dtype=torch.float32)
    batches = [{"input_ids": torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(seed))} for seed in (1, 2)]
    before = compute_logits(built.model, batches[0]["input_ids"]).detach()
    return built, before, prepare(built.model, built.store, config, first_sequences(batches, 8))


@pytest.mark.parametrize("rule", ["max", "hessian"])
@pytest.mark.parametrize("equalize", [None, 0.5])
def test_it_fills_the_state_and_leaves_what_the_model_computes(equalize: float | None, rule: str) -> None:
    config = QuantConfig(rule=rule, equalize=equalize)
    built, before, notes = prepared(config)
    assert any("equalized" in note for note in notes) == (equalize is not None)
    assert built.inputs.is_calibrated
    state = built.store.state
    for group in built.store.manifest.groups:
        scale = state.input_scale(group[0])
        assert torch.frexp(scale).mantissa.item() == 0.5
        if rule == "hessian":
            assert (state.hessian(group[0]).diagonal(dim1=-2, dim2=-1) > 0).all()
    after = compute_logits(built.model, torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(1)))
    # Masters are rounded to bf16 when they are served, folded ones at other places.
    torch.testing.assert_close(after, before, rtol=0, atol=0.02 * before.abs().max().item() if equalize else 0)


def test_a_model_that_was_not_prepared_is_not_calibrated() -> None:
    built = build_model(tiny_config("llama"), QuantConfig(), torch.device("cpu"), compute_dtype=torch.float32)
    assert not built.inputs.is_calibrated


def test_headroom_is_that_of_the_config() -> None:
    scales = []
    for headroom in (1.0, 8.0):
        built, _, _ = prepared(QuantConfig(input_headroom=headroom))
        scales.append(torch.cat([built.store.state.input_scale(group[0]) for group in built.store.manifest.groups]))
    assert torch.equal(scales[1], 8 * scales[0])
