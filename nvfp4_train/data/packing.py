"""From documents to sequences: tokenize, append the end token to each document, concatenate, cut. No padding.

The tokens stay in the Arrow file that `Dataset.map` wrote; a sequence is a slice of that memory map, so a corpus of any size
costs no memory and is not written twice.
"""

import logging

import numpy as np
import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase

from nvfp4_train.data.notices import notice
from nvfp4_train.data.sources import distinct_documents, split_documents

log = logging.getLogger(__name__)

_PIECE_CHARS = 1 << 18
"""Longer documents are tokenized in pieces: the tokenizer needs over 100 bytes per token, and works on pieces in parallel."""


class PackedSequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequence i is tokens [i * seq_len, (i + 1) * seq_len) of the concatenated documents; the remainder is dropped."""

    def __init__(self, tokens: Dataset, seq_len: int) -> None:
        """`tokens` has one row per document and the column `input_ids`, a list of int32."""
        self.tokens = tokens
        self.seq_len = seq_len
        chunks = tokens.with_format("arrow")[:]["input_ids"].chunks
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1])

    def __len__(self) -> int:
        return self.num_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start, needed = index * self.seq_len, self.seq_len
        chunk = int(np.searchsorted(self._ends, start, side="right"))
        offset = start - (int(self._ends[chunk - 1]) if chunk else 0)
        parts = []
        while needed:
            part = self._chunks[chunk][offset : offset + needed]
            parts.append(part)
            needed -= len(part)
            chunk, offset = chunk + 1, 0
        return {"input_ids": torch.from_numpy(np.concatenate(parts).astype(np.int64))}

    def __reduce__(self) -> tuple:
        # A spawned worker opens the Arrow file anew; the views would travel as copies.
        return PackedSequences, (self.tokens, self.seq_len)


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """One row `input_ids` per document, with the end token; computed once and then taken from the cache of `datasets`."""
    return documents.map(
        _encode,
        batched=True,
        batch_size=100,
        writer_batch_size=100,
        input_columns="text",
        remove_columns=documents.column_names,
        fn_kwargs={"tokenizer": tokenizer},
        features=Features({"input_ids": [Value("int32")]}),
        desc="Tokenizing",
    )


def pack_and_split(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, val_fraction: float
) -> tuple[Subset, Subset]:
    """(training sequences, held-out sequences), at least one of each.

    Documents are held out by the hash of their content. Where that leaves a side without a sequence, as with one big file, the
    last sequences are held out instead, and of equal documents one is kept: a copy would stand on both sides.
    """
    sides = split_documents(documents, val_fraction)
    if all(len(side) for side in sides):
        train, val = (PackedSequences(tokenize(side, tokenizer), seq_len) for side in sides)
        if len(train) and len(val):
            return Subset(train, range(len(train))), Subset(val, range(len(val)))
    num_given, documents = len(documents), distinct_documents(documents)
    if num_copies := num_given - len(documents):
        notice(
            f"Too few different documents to hold some out: {num_copies} of {num_given} documents are copies of others and left out, "
            "so that no text is both trained on and held out."
        )
    packed = PackedSequences(tokenize(documents, tokenizer), seq_len)
    if len(packed) < 2:
        raise ValueError(
            f"training needs at least 2 sequences, one of them held out; {len(documents)} documents with {packed.num_tokens} "
            f"tokens make {len(packed)} of data.seq_len={seq_len}. Lower data.seq_len or give more text (data.path)."
        )
    num_val = min(max(1, round(len(packed) * val_fraction)), len(packed) - 1)
    log.info("Too few documents to hold some out: the last %d of %d sequences are held out.", num_val, len(packed))
    cut = len(packed) - num_val
    return Subset(packed, range(cut)), Subset(packed, range(cut, len(packed)))


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[np.ndarray]]:
    pieces, num_pieces = [], []
    for text in texts:
        cuts = _pieces(text)
        pieces += cuts
        num_pieces.append(len(cuts))
    ids = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    arrays = iter(np.asarray(piece, dtype=np.int32) for piece in ids)
    end = np.asarray([tokenizer.eos_token_id], dtype=np.int32)
    return {"input_ids": [np.concatenate([*(next(arrays) for _ in range(count)), end]) for count in num_pieces]}


def _pieces(text: str) -> list[str]:
    """`text` cut after line ends into pieces of at most _PIECE_CHARS characters; a longer line is cut within."""
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS:
        stop = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]
