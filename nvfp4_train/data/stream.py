"""The order in which sequences are trained on: an infinite stream that depends on the seed alone."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class StreamSampler(Sampler[list[int]]):
    """One rank's part of the infinite stream of micro-batches, from position `start` on. It has no length."""

    def __init__(
        self, num_samples: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._permutations: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start + self.rank * self.batch_size
        while True:
            yield [self.sample(p) for p in range(position, position + self.batch_size)]
            position += self.world_size * self.batch_size

    def sample(self, position: int) -> int:
        """The sample at a position of the stream."""
        epoch, place = divmod(position, self.num_samples)
        if epoch not in self._permutations:
            # Two at most: a batch, or the batches of a step, may lie on both sides of an epoch's end.
            self._permutations = {known: p for known, p in self._permutations.items() if known == epoch - 1}
            state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
            self._permutations[epoch] = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(int(state[0])))
        return int(self._permutations[epoch][place])


class ScaledStream(Sampler[list[tuple[int, float]]]):
    """The micro-batches of a `StreamSampler`, each sample with the factor of its micro-batch's mean loss.

    A step averages the means of its micro-batches over all ranks. With these factors that is the mean over all tokens of the step
    that count, whatever their share in each micro-batch. `start` of the stream must be where a step begins.
    """

    def __init__(self, stream: StreamSampler, *, batches_per_step: int, num_counted: Callable[[int], int]) -> None:
        """`batches_per_step` are a rank's; `num_counted` is the number of tokens of a sample that count."""
        self.stream = stream
        self.batches_per_step = batches_per_step
        self.num_counted = num_counted

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        stream, count = self.stream, self.num_counted
        num_batches = self.batches_per_step * stream.world_size
        samples_per_step = num_batches * stream.batch_size
        step_start, total = stream.start, 0
        for number, batch in enumerate(stream):
            if number % self.batches_per_step == 0:
                step = range(step_start, step_start + samples_per_step)
                total = sum(count(stream.sample(position)) for position in step)
                step_start += samples_per_step
            scale = sum(map(count, batch)) * num_batches / total if total else 1.0
            yield [(sample, scale) for sample in batch]


class ScaledSequences(Dataset[dict[str, Tensor]]):
    """Sequences by what `ScaledStream` gives: each carries the factor as `loss_scale`."""

    def __init__(self, sequences: Any) -> None:
        self.sequences = sequences

    def __getitem__(self, sample_and_scale: tuple[int, float]) -> dict[str, Tensor]:
        sample, scale = sample_and_scale
        return {**self.sequences[sample], "loss_scale": torch.tensor(scale)}
