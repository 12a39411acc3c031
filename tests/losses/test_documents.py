"""Losses of rows that hold several documents, of which some tokens count."""

from typing import Any

import pytest
import torch
from test_distillation import build, gradients
from torch import Tensor

from nvfp4_train.losses.base import num_positions
from nvfp4_train.losses.next_token import NextTokenLoss

LENGTHS = (4, 7, 5)
HIDDEN: dict[str, Any] = {"divergence": "jsd", "cross_entropy": 0.25}


def packed() -> dict[str, Tensor]:
    """One row of three documents; the first token of each is not predicted."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    mask = (torch.rand(ids.shape, generator=generator) < 0.6) & (position_ids > 0)
    return {"input_ids": ids, "position_ids": position_ids, "loss_mask": mask}


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each document as a batch of its own, without positions."""
    return [
        {"input_ids": ids, "loss_mask": mask}
        for ids, mask in zip(batch["input_ids"].split(LENGTHS, 1), batch["loss_mask"].split(LENGTHS, 1), strict=True)
    ]


@pytest.mark.parametrize("kind", ["next_token", "by chunks", "whole logits"])
def test_loss_and_gradients_are_those_of_the_documents_alone(kind: str) -> None:
    # The logits of MiniCPM3 are kept whole.
    built, distillation = build("minicpm3" if kind == "whole logits" else "llama", **HIDDEN)
    loss = NextTokenLoss() if kind == "next_token" else distillation
    batch = packed()
    value, _ = loss(built.model, batch)
    value.backward()
    found = gradients(built.model)
    parts = [(num_positions(own), loss(built.model, own)[0]) for own in alone(batch)]
    expected = sum(count * part for count, part in parts) / num_positions(batch)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, gradient in gradients(built.model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("kind", ["next_token", "distillation"])
def test_a_batch_without_a_token_that_counts_costs_0_and_has_gradients_of_0(kind: str) -> None:
    built, distillation = build(hidden=0.5, **HIDDEN)
    loss = NextTokenLoss() if kind == "next_token" else distillation
    batch = packed() | {"loss_mask": torch.zeros(1, sum(LENGTHS), dtype=torch.bool)}
    value, metrics = loss(built.model, batch)
    value.backward()
    assert value.item() == 0
    assert all(metric.item() == 0 for metric in metrics.values())
    assert not any(gradient.any() for gradient in gradients(built.model).values())
    with torch.no_grad():
        value, metrics = loss(built.model, batch)
    assert value.item() == 0
    assert all(metric.item() == 0 for metric in metrics.values())


def test_tokens_that_do_not_count_change_no_metric_of_distillation() -> None:
    """Of the last document nothing counts, so it may be any."""
    built, loss = build(**HIDDEN)
    batch = packed()
    batch["loss_mask"][:, -LENGTHS[-1] :] = False
    other = batch | {
        "input_ids": torch.cat((batch["input_ids"][:, : -LENGTHS[-1]], batch["input_ids"][:, -LENGTHS[-1] :].flip(1)), 1)
    }
    with torch.no_grad():
        (value, metrics), (again, others) = loss(built.model, batch), loss(built.model, other)
    assert value.item() == pytest.approx(again.item(), rel=1e-5)
    assert metrics.keys() == others.keys() >= {"kl", "top1_agreement", "cross_entropy"}
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(others[name].item(), rel=1e-5), name
