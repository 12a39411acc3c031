"""Sequences of whole documents, and sequences whose documents are kept apart."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_train.data.sequences import PackedSequences, Sequences, WholeDocuments

PAD = 99


def tokens(documents: list[list[int]], masks: list[list[int]] | None = None) -> Dataset:
    columns = {"input_ids": documents} | ({} if masks is None else {"loss_mask": masks})
    features = {"input_ids": [Value("int32")]} | ({} if masks is None else {"loss_mask": [Value("uint8")]})
    return Dataset.from_dict(columns, features=Features(features))


def whole(documents: list[list[int]], masks: list[list[int]] | None = None, **options) -> WholeDocuments:
    return WholeDocuments(tokens(documents, masks), **{"seq_len": 8, "cut": True, "pad_id": PAD, **options})


def rows(sequences: Sequences, name: str = "input_ids") -> list[list[int]]:
    return [sequences[i][name].int().tolist() for i in range(len(sequences))]


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Document i holds the token i alone."""
    return [[number] * length for number, length in enumerate(lengths)]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_document_is_in_one_sequence_whole_with_padding_behind(lengths: list[int], cut: bool) -> None:
    sequences = whole(documents_of(lengths), cut=cut)
    found = [token for row in rows(sequences) for token in row]
    for number, length in enumerate(lengths):
        taken = min(length, 8) if cut else length if length <= 8 else 0
        places = [i for i, token in enumerate(found) if token == number]
        assert len(places) == taken
        assert not places or (places[-1] - places[0] == taken - 1 and places[0] // 8 == places[-1] // 8)
    for row, mask in zip(rows(sequences), rows(sequences, "loss_mask"), strict=True):
        assert mask == [token != PAD for token in row]
        assert row == sorted(row, key=lambda token: token == PAD)
    assert sequences.num_too_long == sum(length > 8 for length in lengths)
    assert sequences.num_taken_tokens == sum(token != PAD for token in found)


def test_documents_are_put_where_they_leave_the_least_room() -> None:
    """In their order they would take four sequences."""
    assert rows(whole(documents_of([3, 6, 5, 2]))) == [[0, 0, 0, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 3, 3]]


def test_a_mask_is_cut_with_its_document_and_one_without_a_marked_token_is_left_out() -> None:
    documents = documents_of([4, 10, 10, 3])
    masks = [[0, 0, 1, 1], [0] * 6 + [1] * 4, [0] * 9 + [1], [1, 0, 0]]
    sequences = whole(documents, masks)
    assert rows(sequences) == [[0] * 4 + [PAD] * 4, [1] * 8]
    assert rows(sequences, "loss_mask") == [[0, 0, 1, 1, 0, 0, 0, 0], [0] * 6 + [1] * 2]
    assert (sequences.num_too_long, sequences.num_unmarked) == (2, 2), "a first token has nothing to be predicted from"
    assert [sequences.num_counted(i) for i in range(2)] == [2, 2]


@pytest.mark.parametrize("masked", [False, True])
def test_isolated_documents_count_their_positions_and_do_not_predict_their_first_token(masked: bool) -> None:
    documents = documents_of([3, 5, 4])
    masks = [[1, 0, 1], [1, 1, 1, 0, 1], [1] * 4] if masked else None
    made = whole(documents, masks, isolate=True)
    assert rows(made) == [[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 2, PAD, PAD, PAD, PAD]]
    assert rows(made, "position_ids") == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3]]
    first = [0, 0, 1, 0, 1, 1, 0, 1] if masked else [0, 1, 1, 0, 1, 1, 1, 1]
    assert rows(made, "loss_mask") == [first, [0, 1, 1, 1, 0, 0, 0, 0]]


def test_a_document_that_goes_on_in_the_next_sequence_counts_from_0_there() -> None:
    made = PackedSequences(tokens(documents_of([3, 0, 7, 2, 4])), 4, isolate=True)
    assert rows(made) == [[0, 0, 0, 2], [2, 2, 2, 2], [2, 2, 3, 3], [4, 4, 4, 4]]
    assert rows(made, "position_ids") == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert rows(made, "loss_mask") == [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]
    assert [made.num_counted(i) for i in range(4)] == [2, 3, 2, 3]
    assert "loss_mask" not in PackedSequences(tokens(documents_of([3, 7])), 4)[0]


def test_masks_cross_the_chunks_of_the_arrow_file(tmp_path) -> None:
    """What `Dataset.map` writes has a chunk for every hundred documents or fewer."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 50, generator.integers(0, 9)).tolist() for _ in range(250)]
    masks = [generator.integers(0, 2, len(document)).tolist() for document in documents]
    given = tokens(documents, masks)
    written = given.map(lambda batch: batch, batched=True, batch_size=100, writer_batch_size=100, features=given.features)
    made = PackedSequences(written, 30)
    assert len(made._chunks) > 1
    flat, flat_mask = ([x for row in column for x in row][: len(made) * 30] for column in (documents, masks))
    assert [token for row in rows(made) for token in row] == flat
    assert [token for row in rows(made, "loss_mask") for token in row] == flat_mask
    first = made.tokens.first_marked()
    for number, mask in enumerate(masks):
        marked = [place for place, value in enumerate(mask) if value and place]
        assert first[number] == (marked[0] if marked else 1 << 62)


@pytest.mark.parametrize("isolate", [False, True])
def test_workers_get_the_same_sequences(isolate: bool) -> None:
    for made in (
        whole(documents_of([3, 6, 5, 2]), isolate=isolate),
        PackedSequences(tokens(documents_of([9, 9])), 4, isolate=isolate),
    ):
        copy = pickle.loads(pickle.dumps(made))
        for ours, theirs in zip((made[i] for i in range(len(made))), (copy[i] for i in range(len(made))), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
