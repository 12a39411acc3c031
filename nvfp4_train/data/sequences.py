"""Sequences of seq_len tokens, cut from documents that are tokenized: slices of their stream, or whole documents with padding.

The tokens stay in the Arrow file that `Dataset.map` wrote; a sequence is made of slices of that memory map, so a corpus of any size
costs no memory and is not written twice.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

_NOWHERE = 1 << 62


class Tokens:
    """The columns `input_ids` and, where there is one, `loss_mask` of tokenized documents, each as one long array."""

    def __init__(self, documents: Dataset) -> None:
        """`documents` has one row per document: a list of int32, and one of uint8 as long."""
        self.documents = documents
        table = documents.with_format("arrow")[:]
        self._lists = table["input_ids"].chunks
        self.chunks = {
            name: [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in table[name].chunks] for name in table.column_names
        }
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks["input_ids"]], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def has_mask(self) -> bool:
        return "loss_mask" in self.chunks

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.concatenate([*(_lengths(chunk) for chunk in self._lists), np.empty(0, dtype=np.int64)])

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins, int64."""
        return np.cumsum(self.lengths) - self.lengths

    def read(self, column: str, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the concatenated documents."""
        chunk = int(np.searchsorted(self.ends, start, side="right"))
        offset, needed, parts = start - (int(self.ends[chunk - 1]) if chunk else 0), stop - start, []
        while needed:
            part = self.chunks[column][chunk][offset : offset + needed]
            parts.append(part)
            needed -= len(part)
            chunk, offset = chunk + 1, 0
        return np.concatenate([*parts, self.chunks[column][0][:0]])

    def first_marked(self) -> np.ndarray:
        """Place in each document of the first token that the mask marks and that has one before it, int64; 2^62 where there is none."""
        found = []
        for mask, lists in zip(self.chunks["loss_mask"], self._lists, strict=True):
            lengths = _lengths(lists)
            starts = np.cumsum(lengths) - lengths
            marked = np.flatnonzero(mask)
            marked = np.append(marked[~np.isin(marked, starts)], _NOWHERE)
            following = marked[np.searchsorted(marked, starts)] - starts
            found.append(np.where(following < lengths, following, _NOWHERE))
        return np.concatenate([*found, np.empty(0, dtype=np.int64)])

    def largest_id(self) -> int:
        """Reads all tokens once."""
        return max((int(chunk.max()) for chunk in self.chunks["input_ids"] if len(chunk)), default=-1)


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]], ABC):
    """What both ways to make sequences share.

    An item is {"input_ids": int64 [T]}, and where it is not the same for all tokens "loss_mask": bool [T], the tokens to be predicted.
    Where documents are isolated, "position_ids": int64 [T] starts at 0 with each of them, and their first token is not predicted.
    """

    def __init__(self, tokens: Dataset, seq_len: int, *, isolate: bool = False) -> None:
        self.tokens = Tokens(tokens)
        self.seq_len = seq_len
        self.isolate = isolate
        self._chunks = self.tokens.chunks["input_ids"]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def has_mask(self) -> bool:
        """Whether items have a `loss_mask`."""
        return self.isolate or self.tokens.has_mask

    def num_counted(self, index: int) -> int:
        """The tokens of sequence `index` that are predicted."""
        return int(self[index]["loss_mask"][1:].sum()) if self.has_mask else self.seq_len - 1

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    def _item(self, ids: np.ndarray, mask: np.ndarray | None, starts: np.ndarray) -> dict[str, Tensor]:
        """`starts` are places in the sequence at which a document begins."""
        item = {"input_ids": torch.from_numpy(ids.astype(np.int64))}
        if self.isolate:
            mask = np.ones(self.seq_len, dtype=bool) if mask is None else mask
            mask[starts] = False
            place = np.arange(self.seq_len)
            last_start = np.zeros_like(place)
            last_start[starts] = starts
            item["position_ids"] = torch.from_numpy(place - np.maximum.accumulate(last_start))
        if mask is not None:
            item["loss_mask"] = torch.from_numpy(mask)
        return item

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")


class PackedSequences(Sequences):
    """Sequence i is tokens [i * seq_len, (i + 1) * seq_len) of the concatenated documents; the remainder is dropped."""

    def __len__(self) -> int:
        return self.num_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self._check(index)
        start, stop = index * self.seq_len, (index + 1) * self.seq_len
        mask = self.tokens.read("loss_mask", start, stop).astype(bool) if self.tokens.has_mask else None
        starts = np.empty(0, dtype=np.int64)
        if self.isolate:
            first, last = np.searchsorted(self.tokens.starts, (start, stop))
            # Documents without tokens start where the next one does.
            starts = np.unique(self.tokens.starts[first:last] - start)
        return self._item(self.tokens.read("input_ids", start, stop), mask, starts)

    def __reduce__(self) -> tuple:
        # A spawned worker opens the Arrow file anew; the views would travel as copies.
        return _unpickled, (PackedSequences, self.tokens.documents, self.seq_len, {"isolate": self.isolate})


class WholeDocuments(Sequences):
    """Every sequence holds whole documents, with padding behind them that is not predicted.

    Documents longer than a sequence are cut, or dropped. So are those of which nothing is to be predicted. The others are put where
    they leave the least room (best fit), the longest first, so little is padding.
    """

    def __init__(self, tokens: Dataset, seq_len: int, *, cut: bool, pad_id: int, isolate: bool = False) -> None:
        super().__init__(tokens, seq_len, isolate=isolate)
        self.cut = cut
        self.pad_id = pad_id
        lengths = self.tokens.lengths
        self.num_too_long = int((lengths > seq_len).sum())
        taken = np.minimum(lengths, seq_len) if cut else np.where(lengths > seq_len, 0, lengths)
        self.num_unmarked = 0
        if self.tokens.has_mask:
            is_marked = self.tokens.first_marked() < taken
            self.num_unmarked = int(((taken > 0) & ~is_marked).sum())
            taken = np.where(is_marked, taken, 0)
        self._taken = taken
        self.num_taken_tokens = int(taken.sum())
        self._documents, self._firsts = _best_fit(taken, seq_len)

    @property
    def has_mask(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self._check(index)
        ids = np.full(self.seq_len, self.pad_id, dtype=np.int64)
        mask = np.zeros(self.seq_len, dtype=bool)
        starts, place = [], 0
        for document in self._documents[self._firsts[index] : self._firsts[index + 1]]:
            start, length = int(self.tokens.starts[document]), int(self._taken[document])
            own = slice(place, place + length)
            ids[own] = self.tokens.read("input_ids", start, start + length)
            mask[own] = self.tokens.read("loss_mask", start, start + length) if self.tokens.has_mask else True
            starts.append(place)
            place += length
        if place < self.seq_len:
            starts.append(place)
        return self._item(ids, mask, np.array(starts))

    @property
    def num_documents(self) -> int:
        return len(self._taken)

    def __reduce__(self) -> tuple:
        options = {"cut": self.cut, "pad_id": self.pad_id, "isolate": self.isolate}
        return _unpickled, (WholeDocuments, self.tokens.documents, self.seq_len, options)


def _lengths(lists: Any) -> np.ndarray:
    """Of each list of a chunk, int64."""
    return lists.value_lengths().to_numpy().astype(np.int64)


def _best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents, firsts): sequence i holds documents[firsts[i] : firsts[i + 1]], in their order. Documents of length 0 are left out.

    Sequences are in the order of their first documents.
    """
    order = np.argsort(-lengths, kind="stable")
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for document in order[: int((lengths > 0).sum())].tolist():
        length = int(lengths[document])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(sequences), seq_len
            sequences.append([])
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        sequences[number].append(document)
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(number)
    sequences = sorted(sorted(sequence) for sequence in sequences)
    firsts = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    return np.array([document for sequence in sequences for document in sequence], dtype=np.int64), firsts


def _unpickled(kind: Any, tokens: Dataset, seq_len: int, options: dict[str, Any]) -> Sequences:
    return kind(tokens, seq_len, **options)
