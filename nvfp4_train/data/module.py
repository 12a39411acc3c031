"""The Lightning data module: packed sequences in an order that depends on seed and step alone.

Training is an infinite stream of samples. Position p of it is sample perm[p % N], where perm is permutation number p // N of
the seed. Micro-batch m takes the next world_size * batch_size positions, each rank one contiguous part, so a global batch is
the same on any number of ranks that share it. A checkpoint stores the position alone, so a resumed run goes on in the stream where
the last one stopped, on however many ranks and with whatever batch size.
"""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import PreTrainedTokenizerBase

from nvfp4_train.data.packing import pack_and_split
from nvfp4_train.data.sources import PYTHON_STDLIB, load_documents
from nvfp4_train.data.tokenizer import load_tokenizer
from nvfp4_train.lightning_quirks import rewind_to_last_step


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is cut, and how much of it is held out."""

    path: str = PYTHON_STDLIB
    """"python_stdlib", a text, jsonl, json, csv or parquet file or a folder of them, or the name of a hub dataset."""
    text_column: str = "text"
    """The column of a table or a hub dataset that holds the text; `a.b` is the field `b` of the column `a`."""
    split: str = "train"
    """The split of a hub dataset, or of a folder whose files are named as splits."""
    config_name: str | None = None
    """The configuration of a hub dataset, where it has several, or a folder inside of a local one."""
    streaming: bool = False
    """Read until there are max_documents, and of a hub dataset fetch no more than that."""
    tokenizer: str = "auto"
    """"byte", a folder or hub name; "auto" is the tokenizer of the model's folder or hub name, or "byte" without one."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per rank and micro-batch."""
    val_batch_size: int | None = None
    """Sequences per rank and validation batch; null takes batch_size."""
    val_fraction: float = 0.05
    """Share of the documents that is held out."""
    val_sequences: int = 64
    """At most so many held-out sequences are used, over all ranks, spread evenly over the held-out text."""
    max_documents: int | None = None
    """Only the first so many documents are used; null takes all."""
    num_workers: int = 0
    """Processes that load batches, per rank and loader."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("batch_size", 1), ("val_sequences", 1), ("num_workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"data.{name} must be at least {least}; got {value}")
        for name in ("val_batch_size", "max_documents"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, or null; got {value}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction must lie between 0 and 1; got {self.val_fraction}")
        if self.streaming and self.max_documents is None:
            raise ValueError("data.streaming=true reads until there are data.max_documents documents; set data.max_documents")
        for name in ("path", "text_column", "split", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} must not be empty")

    def check_positions(self, max_position_embeddings: int | None) -> None:
        """Raises ValueError when the sequences are longer than the model takes."""
        if max_position_embeddings is not None and self.seq_len > max_position_embeddings:
            raise ValueError(
                f"the model has {max_position_embeddings} positions; got data.seq_len={self.seq_len}. Lower data.seq_len."
            )


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

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start + self.rank * self.batch_size
        epoch, permutation = -1, torch.empty(0)
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                if p // self.num_samples != epoch:
                    epoch = p // self.num_samples
                    permutation = self._permutation(epoch)
                batch.append(int(permutation[p % self.num_samples]))
            yield batch
            position += self.world_size * self.batch_size

    def _permutation(self, epoch: int) -> Tensor:
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(int(state[0])))


class TextDataModule(L.LightningDataModule):
    """Packed text for causal language models: batches {"input_ids": int64 [batch, seq_len]}.

    After `setup`, `train_sequences` and `val_sequences` count the sequences in use over all ranks.
    """

    train_sequences: int
    val_sequences: int

    def __init__(
        self, config: DataConfig, *, seed: int, model_path: str | None = None, trust_remote_code: bool = False
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed must be at least 0; got {seed}")
        self.config = config
        self.seed = seed
        self.model_path = model_path
        self.trust_remote_code = trust_remote_code
        self._train: Subset | None = None
        self._val: Subset | None = None
        self._resumed = {"step": 0, "position": 0}
        """Optimizer steps done, and samples that they took on all ranks, when the run was resumed."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        name = self.config.tokenizer
        name = (self.model_path or "byte") if name == "auto" else name
        return load_tokenizer(name, trust_remote_code=self.trust_remote_code)

    def check_model(self, vocab_size: int, max_position_embeddings: int | None) -> None:
        """Raises ValueError when the sequences are longer, or the ids larger, than the model takes. Needs no data."""
        self.config.check_positions(max_position_embeddings)
        num_tokens = len(self.tokenizer)
        if num_tokens > vocab_size:
            raise ValueError(
                f"the model embeds {vocab_size} tokens; the tokenizer has {num_tokens} (data.tokenizer="
                f"{self.config.tokenizer!r}). Set data.tokenizer to the model's own, or raise the model's vocab_size."
            )

    def prepare_data(self) -> None:
        self._load()

    def setup(self, stage: str | None = None) -> None:
        if self._train is None or self._val is None:
            self._train, held_out = self._load()
            count = min(self.config.val_sequences, len(held_out))
            self._val = Subset(held_out, [i * len(held_out) // count for i in range(count)])
            self.train_sequences, self.val_sequences = len(self._train), count
        _, world_size = self._rank_and_world_size()
        if self.val_sequences < world_size:
            raise ValueError(
                f"every rank needs a held-out sequence; got {self.val_sequences} for {world_size} ranks, with "
                f"data.val_sequences={self.config.val_sequences} and data.val_fraction={self.config.val_fraction}. "
                "Raise data.val_sequences; if the held-out text has no more, raise data.val_fraction."
            )

    def train_dataloader(self) -> DataLoader:
        """Starts after the optimizer steps done so far, which Lightning has restored by now."""
        assert self._train is not None, "setup comes first"
        if self.trainer:
            rewind_to_last_step(self.trainer)
        rank, world_size = self._rank_and_world_size()
        sampler = StreamSampler(
            len(self._train),
            batch_size=self.config.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            start=self._position(),
        )
        return self._loader(self._train, sampler)

    def val_dataloader(self) -> DataLoader:
        """The rank's held-out sequences, rank::world_size, in equally many batches on every rank.

        The numbers are equal because a forward of a sharded model is a collective. So batch sizes differ by at most one, and a batch
        size of 1 may give a batch of 2.
        """
        assert self._val is not None, "setup comes first"
        rank, world_size = self._rank_and_world_size()
        batch_size = self.config.val_batch_size or self.config.batch_size
        most, least = -(-self.val_sequences // world_size), self.val_sequences // world_size
        num_batches = min(-(-most // batch_size), least)
        own = np.arange(rank, self.val_sequences, world_size)
        return self._loader(self._val, [part.tolist() for part in np.array_split(own, num_batches)])

    def calibration_batches(self, num_sequences: int) -> list[tuple[dict[str, Tensor], bool]]:
        """This rank's part of the first sequences of the training stream, as batches of one, and whether each counts.

        All ranks together have each of them once, whatever their number. Where it does not divide evenly, some ranks repeat one that
        does not count, because a forward of a sharded model is a collective. Where the training text has fewer sequences, it is all of
        them.
        """
        assert self._train is not None, "setup comes first"
        num_sequences = min(num_sequences, len(self._train))
        rank, world_size = self._rank_and_world_size()
        order = next(iter(StreamSampler(len(self._train), batch_size=num_sequences, seed=self.seed)))
        own = range(rank, -(-num_sequences // world_size) * world_size, world_size)
        return [
            ({"input_ids": self._train[order[place % num_sequences]]["input_ids"][None]}, place < num_sequences)
            for place in own
        ]

    def state_dict(self) -> dict[str, int]:
        return {"step": self.trainer.global_step, "position": self._position()} if self.trainer else self._resumed

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resumed = dict(state_dict)

    def _position(self) -> int:
        """Position in the stream at which the optimizer steps so far end."""
        if not self.trainer:
            return self._resumed["position"]
        steps = self.trainer.global_step - self._resumed["step"]
        samples_per_step = self.trainer.accumulate_grad_batches * self.trainer.world_size * self.config.batch_size
        return self._resumed["position"] + steps * samples_per_step

    def _load(self) -> tuple[Subset, Subset]:
        """(training, held-out) sequences. Where `prepare_data` ran before, all of it comes from the cache of `datasets`."""
        config = self.config
        documents = load_documents(
            config.path,
            text_column=config.text_column,
            split=config.split,
            config_name=config.config_name,
            streaming=config.streaming,
            max_documents=config.max_documents,
        )
        return pack_and_split(documents, self.tokenizer, seq_len=config.seq_len, val_fraction=config.val_fraction)

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, sequences: Subset, batches: Iterable[list[int]]) -> DataLoader:
        return DataLoader(
            sequences,
            batch_sampler=batches,
            num_workers=self.config.num_workers,
            persistent_workers=self.config.num_workers > 0,
            worker_init_fn=_ignore_interrupt,
            pin_memory=torch.cuda.is_available(),
            # Workers take their base seed from this generator. Without it a loader would draw from the global one.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the workers as well, and the run has a step to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
