import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from nvfp4_train.data import packing
from nvfp4_train.data.packing import PackedSequences, pack_and_split, tokenize
from nvfp4_train.data.sources import load_documents, split_documents
from nvfp4_train.data.tokenizer import byte_tokenizer

EOS = 256


def stream_of(texts: list[str]) -> list[int]:
    return [token for text in texts for token in (*text.encode("utf-8"), EOS)]


def tokens_of(sequences) -> list[int]:
    return [token for i in range(len(sequences)) for token in sequences[i]["input_ids"].tolist()]


@pytest.mark.parametrize("seq_len", [2, 7, 64, 1000])
def test_sequences_are_the_documents_with_end_tokens_cut_without_padding(corpus: Path, seq_len: int) -> None:
    documents = load_documents(str(corpus))
    expected = stream_of(documents["text"])
    packed = PackedSequences(tokenize(documents, byte_tokenizer()), seq_len)
    assert len(packed) == len(expected) // seq_len
    assert tokens_of(packed) == expected[: len(packed) * seq_len]
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_sequences_cross_the_chunks_of_the_arrow_file() -> None:
    """One Arrow chunk holds 100 documents: a sequence here lies in three of them."""
    texts = ["ab", "c"] * 130
    packed = PackedSequences(tokenize(Dataset.from_dict({"text": texts}), byte_tokenizer()), 500)
    assert len(packed._chunks) == 3
    assert tokens_of(packed) == stream_of(texts)[:500]


def test_long_documents_are_tokenized_in_pieces_to_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PIECE_CHARS", 10)
    texts = ["short", "a line\nanother line\n\nand a line without any break", "x" * 10, "y" * 11]
    assert all(len(piece) <= 10 for text in texts for piece in packing._pieces(text))
    assert packing._pieces("a line\nanother") == ["a line\n", "another"]
    assert tokens_of(PackedSequences(tokenize(Dataset.from_dict({"text": texts}), byte_tokenizer()), 1)) == stream_of(texts)


def test_tokens_are_read_from_the_arrow_file_in_place(corpus: Path) -> None:
    packed = PackedSequences(tokenize(load_documents(str(corpus)), byte_tokenizer()), 16)
    assert all(not chunk.flags.owndata and chunk.dtype == np.int32 for chunk in packed._chunks)
    pickled = pickle.dumps(packed)
    assert len(pickled) < packed.num_tokens
    assert tokens_of(pickle.loads(pickled)) == tokens_of(packed)


def test_a_second_process_takes_the_tokens_from_the_cache(corpus: Path, own_offline_caches: Path) -> None:
    code = (
        "import sys; from nvfp4_train.data.module import DataConfig, TextDataModule; "
        "TextDataModule(DataConfig(path=sys.argv[1], val_fraction=0.2), seed=int(sys.argv[2])).prepare_data()"
    )
    written = []
    for seed in ("0", "1"):
        env = {**os.environ, "HF_HOME": str(own_offline_caches), "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(corpus), seed], check=True, env=env, capture_output=True)
        written.append({file: file.stat().st_mtime_ns for file in own_offline_caches.rglob("*.arrow")})
    assert written[0]
    assert written[0] == written[1]


def test_training_and_held_out_sequences_come_from_different_documents(corpus: Path) -> None:
    documents = load_documents(str(corpus))
    train, val = pack_and_split(documents, byte_tokenizer(), seq_len=32, val_fraction=0.2)
    train_documents, val_documents = split_documents(documents, 0.2)
    assert tokens_of(train) == stream_of(train_documents["text"])[: len(train) * 32]
    assert tokens_of(val) == stream_of(val_documents["text"])[: len(val) * 32]


@pytest.mark.parametrize("val_fraction", [0.01, 0.25, 0.99])
def test_of_one_document_the_last_sequences_are_held_out(val_fraction: float) -> None:
    text = "".join(f"word {i} " for i in range(100))
    train, val = pack_and_split(Dataset.from_dict({"text": [text]}), byte_tokenizer(), seq_len=50, val_fraction=val_fraction)
    total = len(stream_of([text])) // 50
    assert len(val) == min(max(1, round(total * val_fraction)), total - 1)
    assert tokens_of(train) + tokens_of(val) == stream_of([text])[: total * 50]


def test_a_held_out_side_shorter_than_a_sequence_falls_back_to_the_tail(corpus: Path) -> None:
    documents = load_documents(str(corpus))
    seq_len = 1 + max(
        len(stream_of(side["text"])) // n for side, n in zip(split_documents(documents, 0.05), (4, 1), strict=True)
    )
    train, val = pack_and_split(documents, byte_tokenizer(), seq_len=seq_len, val_fraction=0.05)
    assert tokens_of(train) + tokens_of(val) == stream_of(documents["text"])[: (len(train) + len(val)) * seq_len]
    assert len(val) == 1


def test_text_too_short_for_two_sequences_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 documents with 11 tokens make 1 of data.seq_len=10. Lower data.seq_len"):
        pack_and_split(Dataset.from_dict({"text": ["0123456789"]}), byte_tokenizer(), seq_len=10, val_fraction=0.5)
