"""The Lightning data module: packed sequences in an order that depends on seed and step alone.

Training is an infinite stream of samples. Position p of it is sample perm[p % N], where perm is permutation number p // N of
the seed. Micro-batch m takes the next world_size * batch_size positions, each rank one contiguous part, so a global batch is
the same on any number of ranks that share it. A checkpoint stores the position alone, so a resumed run goes on in the stream where
the last one stopped, on however many ranks and with whatever batch size.
"""

import signal
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase

from nvfp4_train.data import chat
from nvfp4_train.data.cache import cache_errors
from nvfp4_train.data.chat_tokens import check_template, ignores_tools, spell_special
from nvfp4_train.data.config import DataConfig
from nvfp4_train.data.identity import NUM_SEQUENCES, check_same_data, fingerprint, identity
from nvfp4_train.data.notices import notice
from nvfp4_train.data.packing import Packing, left_out_of, pack_and_split
from nvfp4_train.data.sequences import Sequences
from nvfp4_train.data.sources import column_names, load_documents, load_rows
from nvfp4_train.data.stream import ScaledSequences, ScaledStream, StreamSampler
from nvfp4_train.data.tokenizer import largest_id, load_tokenizer
from nvfp4_train.lightning_quirks import rewind_to_last_step


class TextDataModule(L.LightningDataModule):
    """Packed text or conversations for causal language models: batches {"input_ids": int64 [batch, seq_len]}.

    Where not every token is predicted there are "loss_mask" and in training "loss_scale", and where documents are isolated
    "position_ids", as `losses.base.Batch` says. After `setup`, `train_sequences` and `val_sequences` count the sequences in use over
    all ranks, and `held_out_fingerprint` says which held-out ones these are: losses of two of them are not to be compared.
    """

    train_sequences: int
    val_sequences: int
    held_out_sequences: int
    """Of the held-out text; `val_sequences` of them are taken."""
    held_out_fingerprint: str

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
        self._resumed: dict[str, Any] = {"step": 0, "position": 0}
        """Optimizer steps done, and samples that they took on all ranks, when the run was resumed."""
        self._fingerprint = ""
        self._vocab_size: int | None = None

    @property
    def isolates_documents(self) -> bool:
        """Whether documents of a row must not see each other, which the model has to be able to."""
        return self.config.isolate_documents

    @property
    def tokenizer_name(self) -> str:
        name = self.config.tokenizer
        return (self.model_path or "byte") if name == "auto" else name

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.tokenizer_name, trust_remote_code=self.trust_remote_code)
        if (template := self.config.chat_template) is not None:
            try:
                tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"data.chat_template={template!r} must be a file with a jinja template: {error}") from error
        return tokenizer

    def check_model(self, vocab_size: int, max_position_embeddings: int | None) -> None:
        """Raises ValueError when the sequences are longer, or the ids larger, than the model takes. Needs no data."""
        self.config.check_positions(max_position_embeddings)
        self._vocab_size = vocab_size
        # A special token that no text holds, and no template writes, may have no row: Gemma 3's image token in its text model.
        largest = largest_id(self.tokenizer, with_special=self.config.special_tokens == "control")
        if largest >= vocab_size:
            raise ValueError(
                f"the model embeds {vocab_size} tokens; the tokenizer has {len(self.tokenizer)} with ids up to {largest} "
                f"(data.tokenizer={self.config.tokenizer!r}). Set data.tokenizer to the model's own, or raise the model's vocab_size."
            )

    def prepare_data(self) -> None:
        # What is wrong is raised by `setup`, on every rank. Here it would leave the others waiting for this one.
        with suppress(ValueError):
            self._load()

    def setup(self, stage: str | None = None) -> None:
        if self._train is None or self._val is None:
            self._train, held_out = self._load()
            count = min(self.config.val_sequences or len(held_out), len(held_out))
            self.held_out_sequences = len(held_out)
            self._val = Subset(held_out, [i * len(held_out) // count for i in range(count)])
            self.train_sequences, self.val_sequences = len(self._train), count
            self._fingerprint = fingerprint(self._train, NUM_SEQUENCES)
            self.held_out_fingerprint = fingerprint(self._val)
        if stage == "fit":
            self._check_training_text()
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
        sequences, indices = _packed(self._train), self._train.indices
        if not sequences.has_mask:
            return self._loader(self._train, sampler)
        scaled = ScaledStream(
            sampler,
            batches_per_step=self.trainer.accumulate_grad_batches if self.trainer else 1,
            num_counted=lambda sample: sequences.num_counted(indices[sample]),
        )
        return self._loader(ScaledSequences(self._train), scaled)

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
        self._check_training_text()
        num_sequences = min(num_sequences, len(self._train))
        rank, world_size = self._rank_and_world_size()
        order = next(iter(StreamSampler(len(self._train), batch_size=num_sequences, seed=self.seed)))
        own = range(rank, -(-num_sequences // world_size) * world_size, world_size)
        return [
            ({name: x[None] for name, x in self._train[order[place % num_sequences]].items()}, place < num_sequences)
            for place in own
        ]

    def state_dict(self) -> dict[str, Any]:
        position = {"step": self.trainer.global_step, "position": self._position()} if self.trainer else dict(self._resumed)
        return position | self._data_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint's position counts the sequences of other data; see data.restart."""
        saved, given = state_dict, self._data_state()
        self._resumed = {"step": saved["step"], "position": saved["position"]}
        if not given:
            return
        if not self.config.restart:
            check_same_data(saved, given)
        elif saved.get("fingerprint") != given["fingerprint"] or not saved["restart"] or saved["identity"] != given["identity"]:
            self._resumed["position"] = 0

    def _data_state(self) -> dict[str, Any]:
        """What the position counts; nothing before `setup`."""
        if not self._fingerprint:
            return {}
        return {
            "identity": identity(self.config, seed=self.seed, tokenizer=self.tokenizer_name),
            "fingerprint": self._fingerprint,
            "held_out": self.held_out_fingerprint,
            "restart": self.config.restart,
        }

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
        column = self._chat_column()
        if column is None:
            documents = load_documents(
                config.path,
                text_column=config.text_column,
                split=config.split,
                config_name=config.config_name,
                streaming=config.streaming,
                max_documents=config.max_documents,
            )
        else:
            documents = self._load_conversations(column)
        packing = Packing(
            special_tokens=config.special_tokens,
            isolate_documents=config.isolate_documents,
            too_long=config.too_long or ("split" if column is None else "cut"),
            train_on=config.train_on or ("all" if column is None else chat.ASSISTANT),
            is_chat=column is not None,
        )
        sides = pack_and_split(
            documents, self.tokenizer, seq_len=config.seq_len, val_fraction=config.val_fraction, packing=packing
        )
        if column is not None:
            self._check_ids(sides)
        # Both may be parts of the same sequences.
        if left_out := left_out_of(list({id(packed): packed for packed in map(_packed, sides)}.values())):
            notice(f"data.path={config.path!r}: {left_out}")
        return sides

    def _chat_column(self) -> str | None:
        """The column of conversations, or None for text. Raises ValueError where the options do not fit what is there."""
        config, column = self.config, self.config.chat_column
        if column == "auto":
            try:
                names = column_names(
                    config.path, split=config.split, config_name=config.config_name, streaming=config.streaming
                )
            except ValueError:
                # It looks at more rows than may be asked for. What is wrong with those that are, reading them tells.
                names = []
            column = next(
                (name for name in chat.COLUMNS if name in names and config.text_column.split(".")[0] not in names), None
            )
        if column is None and config.train_on == chat.ASSISTANT:
            raise ValueError(
                f"data.train_on=assistant needs conversations, and data.path={config.path!r} is read as text; set data.chat_column to "
                "the column that holds them, or data.train_on=all"
            )
        return column

    def _load_conversations(self, column: str) -> Dataset:
        config = self.config
        check_template(self.tokenizer, self.tokenizer_name)
        rows = load_rows(
            config.path,
            columns=chat.columns_of(column),
            split=config.split,
            config_name=config.config_name,
            streaming=config.streaming,
            max_rows=config.max_documents,
        )
        conversations = chat.normalized(rows, column, config.path)
        with cache_errors():
            documents = conversations.filter(chat.has_messages, input_columns="text", batched=True)
        if not len(documents):
            raise ValueError(f"data.path={config.path!r} holds no conversation with messages in its column {column!r}")
        empty = len(conversations) - len(documents)
        notice(
            f"data.path={config.path!r}: {len(documents)} conversations of its column {column!r}"
            + (f"; {empty} rows without messages are left out" if empty else "")
        )
        self._tell_what_is_not_taken(documents)
        return documents

    def _tell_what_is_not_taken(self, conversations: Dataset) -> None:
        """Tools that the template ignores, and special tokens that stay text."""
        path = f"data.path={self.config.path!r}"
        with cache_errors():
            with_tools = conversations.filter(chat.has_tools, input_columns="tools", batched=True)
        if len(with_tools) and ignores_tools(with_tools[0]["text"], with_tools[0]["tools"], self.tokenizer):
            notice(
                f"{path}: the chat template leaves out the tools of {len(with_tools)} conversations; set data.chat_template to one "
                "that writes them"
            )
        if self.config.special_tokens != "text":
            return
        with cache_errors():
            spelled = conversations.filter(
                spell_special, input_columns=["text", "tools"], batched=True, fn_kwargs={"tokenizer": self.tokenizer}
            )
        if len(spelled):
            notice(
                f"{path}: {len(spelled)} conversations spell out special tokens, which stay text; data.special_tokens=control makes "
                "special tokens of them"
            )

    def _check_ids(self, sides: Iterable[Subset]) -> None:
        """Templates write special tokens, of which `check_model` does not know."""
        largest = max(_packed(side).tokens.largest_id() for side in sides)
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise ValueError(
                f"the model embeds {self._vocab_size} tokens; the conversations have ids up to {largest} (data.tokenizer="
                f"{self.config.tokenizer!r}). Set data.tokenizer to the model's own, or raise the model's vocab_size."
            )

    def _check_training_text(self) -> None:
        if not self._train:
            raise ValueError(
                f"data.val_fraction={self.config.val_fraction:g} holds out all of data.path={self.config.path!r}: nothing is left to "
                "train on, or to calibrate with; set one below 1"
            )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, sequences: Any, batches: Iterable[list[Any]]) -> DataLoader:
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


def _packed(side: Subset) -> Sequences:
    packed = side.dataset
    assert isinstance(packed, Sequences)
    return packed


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the workers as well, and the run has a step to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
