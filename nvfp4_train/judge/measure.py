"""Measures a model against a reference, sequence by sequence, on this rank's share of the held-out batches."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nvfp4_train.losses.base import Batch, num_positions_per_sequence
from nvfp4_train.losses.distillation import DistillationLoss
from nvfp4_train.ranks import gather_from_ranks, rank_and_world_size
from nvfp4_train.sequence_metrics import SequenceCollector, SequenceMetrics, check_num_positions

LOSS, KL, TOP1 = "loss", "kl", "top1_agreement"
"""Metrics: the next token's cross-entropy and the forward KL from the reference, in nats a position, and the share of positions at
which both hold the same token most likely. `losses.distillation` defines them; a run reports its own by it."""
_NAMES = {"cross_entropy": LOSS, "kl": KL, "top1_agreement": TOP1}
ALL = "all"
"""The name of all texts together."""


@torch.no_grad()
def measure(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], device: torch.device) -> SequenceMetrics:
    """The metrics of a model against a reference, which may be the model itself.

    Ranks share out whole batches, each with the whole of both models, so the numbers are the same bits on any number of equal ranks.
    `batches` are the same on all of them. Logits exist a few hundred tokens at a time. Raises ValueError if no position counts. A
    collective, if there is a process group.
    """
    loss = DistillationLoss()
    loss.teacher = reference
    rank, num_ranks = rank_and_world_size()
    own: dict[int, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    for number, batch in enumerate(batches):
        if number % num_ranks != rank:
            continue
        found = loss.per_sequence(model, {name: tensor.to(device) for name, tensor in batch.items()})
        collector = SequenceCollector()
        collector.add(num_positions_per_sequence(batch), {name: found[part] for part, name in _NAMES.items()})
        positions, values = collector.arrays()
        # A float32 share of n positions is k / n but for rounding, which would put equal models below 1.
        values[TOP1] = np.rint(values[TOP1] * positions) / np.maximum(positions, 1)
        own[number] = positions, values
    by_number = {number: of_batch for of_rank in gather_from_ranks(own) for number, of_batch in of_rank.items()}
    in_order = [by_number[number] for number in sorted(by_number)]
    positions = np.concatenate([counts for counts, _ in in_order])
    check_num_positions(positions.sum())
    values = {name: np.concatenate([means[name] for _, means in in_order]) for name in _NAMES.values()}
    return SequenceMetrics(positions, values)


def with_all(texts: Mapping[str, SequenceMetrics]) -> dict[str, SequenceMetrics]:
    """The metrics of every text, and before them those of all texts together where there are several."""
    if ALL in texts:
        return dict(texts)
    parts = list(texts.values())
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
    return {ALL: SequenceMetrics(np.concatenate([part.positions for part in parts]), values), **texts}


def only(metrics: SequenceMetrics, names: Sequence[str]) -> SequenceMetrics:
    """Some of the metrics."""
    return SequenceMetrics(metrics.positions, {name: metrics.values[name] for name in names})


def own_share(sequences: Sequence[Mapping[str, Tensor]]) -> list[tuple[Batch, bool]]:
    """This rank's part of calibration sequences that all ranks have, as `models.prepare` takes them, and whether each counts.

    Every rank has equally many: some repeat one that does not count.
    """
    rank, num_ranks = rank_and_world_size()
    places = range(rank, -(-len(sequences) // num_ranks) * num_ranks, num_ranks)
    return [(sequences[place % len(sequences)], place < len(sequences)) for place in places]
