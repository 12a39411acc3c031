"""From documents to sequences of training and of held-out text: tokenize, split, pack.

A plain document becomes what its tokenizer puts before a text, the ids of the whole text, and the end token. Where a long text can be
cut without a change of its ids it is tokenized in pieces.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from datasets import Dataset, Features, Value
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase

from nvfp4_train.data.cache import cache_errors
from nvfp4_train.data.chat_tokens import encode_chats
from nvfp4_train.data.notices import notice
from nvfp4_train.data.sequences import PackedSequences, Sequences, WholeDocuments
from nvfp4_train.data.sources import distinct_documents, split_documents
from nvfp4_train.data.tokenizer import surroundings

log = logging.getLogger(__name__)

_PIECE_CHARS = 1 << 18
"""Longer documents are tokenized in pieces: the tokenizer needs over 100 bytes per token, and works on pieces in parallel."""
_NEIGHBOURS = 1 << 10
"""Characters on both sides of a cut that are tokenized with and without it."""
_PLACES = 8
"""Places of a kind at which a cut is tried."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become sequences. See the options of the same names; they have been checked, and null has been decided."""

    special_tokens: str = "text"
    isolate_documents: bool = False
    too_long: str = "split"
    train_on: str = "all"
    is_chat: bool = False
    """Whether documents are conversations as `chat.normalized` gives them."""


PLAIN = Packing()
"""Of text as it is, in one stream."""


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase, packing: Packing = PLAIN) -> Dataset:
    """One row per document: `input_ids`, and `loss_mask` where only some tokens are trained on. Computed once and then taken from the
    cache of `datasets`."""
    options = {"tokenizer": tokenizer, "special_tokens": packing.special_tokens}
    columns = {"input_ids": [Value("int32")]}
    if packing.is_chat and packing.train_on == "assistant":
        columns["loss_mask"] = [Value("uint8")]
    with cache_errors():
        return documents.map(
            partial(encode_chats, with_mask="loss_mask" in columns) if packing.is_chat else _encode,
            batched=True,
            batch_size=100,
            writer_batch_size=100,
            input_columns=["text", "tools", "place"] if packing.is_chat else "text",
            remove_columns=documents.column_names,
            fn_kwargs=options,
            features=Features(columns),
            desc="Tokenizing",
        )


def pack_and_split(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    val_fraction: float,
    packing: Packing = PLAIN,
) -> tuple[Subset, Subset]:
    """(training sequences, held-out sequences), at least one of each; of a `val_fraction` of 1 all are held out.

    Documents are held out by the hash of their content. Where that leaves a side without a sequence, as with one big file, the
    last sequences are held out instead, and of equal documents one is kept: a copy would stand on both sides.
    """
    if val_fraction == 1:
        packed = _pack(tokenize(documents, tokenizer, packing), tokenizer, seq_len, packing)
        if not len(packed):
            raise ValueError(
                f"an evaluation needs a sequence; {len(documents)} documents with {packed.num_tokens} tokens make none of "
                f"data.seq_len={seq_len}. Lower data.seq_len or give more text (data.path)."
            )
        return Subset(packed, range(0)), Subset(packed, range(len(packed)))
    content = "said" if packing.is_chat else "text"
    sides = split_documents(documents, val_fraction, column=content)
    if all(len(side) for side in sides):
        train, val = (_pack(tokenize(side, tokenizer, packing), tokenizer, seq_len, packing) for side in sides)
        if len(train) and len(val):
            return Subset(train, range(len(train))), Subset(val, range(len(val)))
    num_given, documents = len(documents), distinct_documents(documents, column=content)
    if num_copies := num_given - len(documents):
        notice(
            f"Too few different documents to hold some out: {num_copies} of {num_given} documents are copies of others and left out, "
            "so that no text is both trained on and held out."
        )
    packed = _pack(tokenize(documents, tokenizer, packing), tokenizer, seq_len, packing)
    if len(packed) < 2:
        left_out = left_out_of([packed])
        raise ValueError(
            f"training needs at least 2 sequences, one of them held out; {len(documents)} documents with {packed.num_tokens} "
            f"tokens make {len(packed)} of data.seq_len={seq_len}{left_out and f' ({left_out})'}. Lower data.seq_len or give more text "
            "(data.path)."
        )
    num_val = min(max(1, round(len(packed) * val_fraction)), len(packed) - 1)
    log.info("Too few documents to hold some out: the last %d of %d sequences are held out.", num_val, len(packed))
    cut = len(packed) - num_val
    return Subset(packed, range(cut)), Subset(packed, range(cut, len(packed)))


def left_out_of(packed: Sequence[Sequences]) -> str:
    """What of the documents is in no sequence, and how much of the sequences is padding, where they hold whole documents; else ""."""
    whole = [sequences for sequences in packed if isinstance(sequences, WholeDocuments)]
    if not whole:
        return ""
    num_documents, num_tokens, taken, too_long, unmarked = (
        sum(getattr(sequences, name) for sequences in whole)
        for name in ("num_documents", "num_tokens", "num_taken_tokens", "num_too_long", "num_unmarked")
    )
    places = sum(len(sequences) for sequences in whole) * whole[0].seq_len
    how = "cut" if whole[0].cut else "left out"
    parts = [f"{too_long} of {num_documents} documents are longer than data.seq_len={whole[0].seq_len} and {how}"]
    if unmarked:
        parts.append(f"{unmarked} have no token to be predicted and are left out")
    parts.append(f"{1 - taken / max(num_tokens, 1):.1%} of all tokens are in no sequence")
    parts.append(f"{1 - taken / max(places, 1):.1%} of the sequences is padding")
    return "; ".join(parts)


def _pack(tokens: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, packing: Packing) -> Sequences:
    if packing.too_long == "split":
        return PackedSequences(tokens, seq_len, isolate=packing.isolate_documents)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return WholeDocuments(tokens, seq_len, cut=packing.too_long == "cut", pad_id=pad_id, isolate=packing.isolate_documents)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, special_tokens: str = "text") -> dict[str, list[np.ndarray]]:
    before, behind = surroundings(tokenizer)

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=special_tokens == "text",
        )["input_ids"]

    pieces, num_pieces = [], []
    for text in texts:
        cuts = _pieces(text, partial(_changes_nothing, ids_of))
        pieces += cuts
        num_pieces.append(len(cuts))
    arrays = iter(np.asarray(piece, dtype=np.int32) for piece in ids_of(pieces))
    prefix, suffix = (np.asarray(ids, dtype=np.int32) for ids in (before, behind))
    return {"input_ids": [np.concatenate([prefix, *(next(arrays) for _ in range(count)), suffix]) for count in num_pieces]}


def _pieces(text: str, can_cut: Callable[[str, int], bool] = lambda text, place: True) -> list[str]:
    """`text` in pieces of at most _PIECE_CHARS characters, cut where it can be; what is left is whole if it cannot.

    A cut is tried after line ends, before spaces, and at last anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS:
        places = _places(text, start, start + _PIECE_CHARS)
        stop = next((place for place in places if can_cut(text, place)), len(text))
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]] if start < len(text) or not pieces else pieces


def _places(text: str, start: int, stop: int) -> Iterator[int]:
    """Places in (start, stop], the last ones of each kind first."""
    for char, offset in (("\n", 1), (" ", 0)):
        end = stop
        for _ in range(_PLACES):
            end = text.rfind(char, start + 1 - offset, end)
            if end < 0:
                break
            yield end + offset
    yield from range(stop, max(start, stop - _PLACES), -1)


def _changes_nothing(ids_of: Callable[[list[str]], list[list[int]]], text: str, place: int) -> bool:
    """Whether both sides of a cut have the ids that they have together, among their neighbours.

    Two neighbourhoods of different lengths are tried: in one, a run of digits or of one letter may happen to be split at its middle.
    """
    parts = []
    for length in (_NEIGHBOURS, _NEIGHBOURS - 1):
        left, right = text[max(0, place - length) : place], text[place : place + length]
        parts += [left + right, left, right]
    ids = ids_of(parts)
    return all(ids[i] == ids[i + 1] + ids[i + 2] for i in (0, 3))
