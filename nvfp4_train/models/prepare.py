"""What a model goes through once before it is quantized: calibration, equalization, and the choice of its static input scales."""

from collections.abc import Callable, Iterable, Mapping

import torch
from transformers import PreTrainedModel

from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.models.equalize import equalize
from nvfp4_train.models.layout import shown
from nvfp4_train.quant.calibration import Batch, calibrate
from nvfp4_train.quant.policy import QuantConfig
from nvfp4_train.quant.store import WeightStore

PROOF_TOKENS = 32
"""Tokens of the sequence on which a fold is proven."""


def prepare(
    model: PreTrainedModel,
    store: WeightStore,
    config: QuantConfig,
    batches: Iterable[tuple[Batch, bool]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[str]:
    """Calibrate on batches of one sequence, each with whether it counts; equalize the masters in place; fill the state of the store.

    The store is updated by the caller. Masters keep their meaning: the model computes what it computed before. So does an optimizer
    that is given. Call it on every rank. Returns lines for the user. Raises ValueError for batches that cannot calibrate the model.
    """
    device = next(model.parameters()).device

    def run(batch: Batch) -> None:
        position_ids = batch.get("position_ids")
        compute_logits(model, batch["input_ids"].to(device), None if position_ids is None else position_ids.to(device))

    calibration = calibrate(model, store.manifest, progress(batches), run)
    statistics, notes = calibration.statistics, list(calibration.notes)
    if config.alpha is not None:
        length = min(PROOF_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROOF_TOKENS)
        vocab_size = model.config.get_text_config().vocab_size
        ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
        equalized = equalize(
            model, store.manifest, statistics, config.alpha, ids, optimizer=optimizer, round_to_pow2=config.equalize_pow2
        )
        statistics = equalized.statistics
        notes.append(f"equalized {len(equalized.folded)} norms and linears (quant.equalize={config.alpha:g})")
        notes += _listed(equalized.skipped)
    store.state.fill(statistics, headroom=config.input_headroom)
    return notes


def first_sequences(batches: Iterable[Batch], num_sequences: int) -> list[tuple[Batch, bool]]:
    """The first sequences of batches, as `prepare` takes them: fewer where there are no more."""
    sequences: list[tuple[Batch, bool]] = []
    for batch in batches:
        rows = range(min(len(batch["input_ids"]), num_sequences - len(sequences)))
        sequences += [({name: tensor[row : row + 1] for name, tensor in batch.items()}, True) for row in rows]
        if len(sequences) == num_sequences:
            break
    return sequences


def _listed(skipped: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the names that it is about."""
    reasons = dict.fromkeys(skipped.values())
    return [f"not equalized: {shown([name for name, own in skipped.items() if own == reason])}: {reason}" for reason in reasons]
