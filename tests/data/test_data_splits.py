"""Which files of a folder are training text, and which documents are held out."""

import datetime
import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pytest

from nvfp4_train.data import sources
from nvfp4_train.data.module import DataConfig, TextDataModule
from nvfp4_train.data.packing import pack_and_split
from nvfp4_train.data.sources import distinct_documents, load_documents, load_rows, split_documents
from nvfp4_train.data.split_names import Name, choose, name_splits
from nvfp4_train.data.tokenizer import byte_tokenizer


def texts(path: Path, **options: Any) -> list[str]:
    return load_documents(str(path), **options)["text"][:]


def folder(root: Path, *names: str) -> Path:
    """A folder of files whose document is the name of the file."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            datasets.Dataset.from_dict({"text": [name]}).to_parquet(file)
        elif file.suffix == ".csv":
            file.write_text(f"text\n{name}\n")
        else:
            file.write_text(json.dumps({"text": name}) if "json" in file.suffix else name)
    return root


def split_of(path: str, *others: str) -> str | None:
    """The split of the file at `path` beside `others`."""
    paths = [PurePosixPath(name) for name in (path, *others)]
    return name_splits([Name(p, p.name.rpartition(".")[0], p.suffix not in (".txt", ".tokens")) for p in paths])[0]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/test-00000-of-00012-a9e1b2c3d4e5f607.parquet", "test"),
        ("validation.jsonl", "validation"),
        ("VALID.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("val_1.csv", "validation"),
        ("eval.json", "test"),
        ("my_train_file.jsonl", "train"),
        ("my-testing-file-3.jsonl", "test"),
        ("c4-validation.00000-of-00008.jsonl", "validation"),
        ("en-train-00000-of-00001.parquet", "train"),
        ("test/a.jsonl", "test"),
        ("data/training/0.jsonl", "train"),
        ("train/test_questions.jsonl", "train"),
        ("test-clean/a.jsonl", "test"),
        ("eval-harness/train.jsonl", "train"),
        ("train_test.jsonl", "test"),
        ("train_sft-00000-of-00003.parquet", "train_sft"),
        ("test_gen-00000-of-00001-0011aabb.parquet", "test_gen"),
        ("testset.jsonl", "test"),
        ("trainData.jsonl", "train"),
        ("holdout.jsonl", "test"),
        ("split=test/a.jsonl", "test"),
        ("held_out.jsonl", "test"),
        ("my-hold-out-2.jsonl", "test"),
        ("holding_outside.jsonl", None),
        ("tests.jsonl", None),
        ("development.jsonl", None),
        ("latest.jsonl", None),
        ("contest.jsonl", None),
        ("trainer.jsonl", None),
        ("tests/a.jsonl", None),
        ("a/part-00000-of-00002.parquet", None),
    ],
)
def test_tables_name_a_split_by_words_of_their_path(path: str, split: str | None) -> None:
    assert split_of(path) == split


def test_shards_beside_those_of_a_split_are_a_split_of_their_own() -> None:
    assert split_of("unsupervised-00000-of-00001.parquet", "train-00000-of-00001.parquet") == "unsupervised"
    assert split_of("unsupervised-00000-of-00001.parquet", "other-00000-of-00001.parquet") is None


@pytest.mark.parametrize(
    ("path", "others", "split"),
    [
        ("tests.jsonl", ("train.jsonl",), "test"),
        ("Devel.jsonl", ("Train.jsonl",), "validation"),
        ("development-1.txt", ("train-1.txt",), "validation"),
        ("data/tests/a.jsonl", ("data/train/a.jsonl",), "test"),
        ("tests/1.txt", ("train/1.txt",), "test"),
        ("development.jsonl", ("a.jsonl", "test.jsonl"), None),
        ("unit_tests.jsonl", ("train.jsonl",), None),
        ("tests/a.jsonl", ("train.jsonl",), None),
        ("docs/tests/a.jsonl", ("data/train/a.jsonl",), None),
        ("software-development.txt", ("train.txt",), None),
    ],
)
def test_other_words_name_a_split_beside_one_for_training(path: str, others: tuple[str, ...], split: str | None) -> None:
    assert split_of(path, *others) == split


@pytest.mark.parametrize(
    ("path", "others", "split"),
    [
        ("train.txt", (), "train"),
        ("test.txt", (), "test"),
        ("test-3.txt", (), "test"),
        ("wiki.test.tokens", ("wiki.train.tokens",), "test"),
        ("stories-valid.txt", ("stories-train.txt",), "validation"),
        ("test_poems.txt", ("train_poems.txt",), "test"),
        ("corpus_test.txt", ("corpus.txt",), "test"),
        ("unit_test.txt", ("unit_cost.txt",), None),
        ("the-test-of-time.txt", (), None),
        ("contest.txt", (), None),
        ("test/pos/1.txt", ("train/pos/1.txt",), "test"),
        ("data/train/1.txt", ("data/dev/1.txt",), "train"),
        ("test/1.txt", ("other/1.txt",), None),
    ],
)
def test_text_files_name_a_split_where_they_are_files_of_one(path: str, others: tuple[str, ...], split: str | None) -> None:
    assert split_of(path, *others) == split


def test_a_split_is_chosen_by_its_name_or_another_form_of_it() -> None:
    assert choose("train", ["train", "test", None]) == {"train", None}
    assert choose("val", ["train", "validation"]) == {"validation"}
    assert choose("devel", ["train", "validation"]) == {"validation"}
    assert choose("devel", ["train", "validation", "devel"]) == {"devel"}
    assert choose("held_out", ["train", "test"]) == {"test"}
    assert choose("eval", ["test", None]) == {"test"}
    assert choose("train", ["train_sft", "test_sft"]) == {"train_sft"}
    assert choose("train", ["train_sft", "train_gen"]) is None
    assert choose("train_gen", ["train_sft", "train_gen"]) == {"train_gen"}
    assert choose("train", ["test"]) is None
    assert choose("test", ["train", None]) is None


HUB = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")]


def test_of_a_snapshot_only_the_asked_split_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, *HUB, "README.md")
    assert texts(tmp_path) == [HUB[0]]
    assert "data.split='train' is read, 1 file; left out: test (1 file), validation (1 file)" in caplog.text
    assert texts(tmp_path, split="test") == [HUB[2]]
    assert texts(tmp_path, split="dev") == [HUB[1]]
    assert texts(tmp_path / "data") == [HUB[0]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "test.jsonl", "dev.jsonl"], ["train.jsonl"]),
        (["train/a.csv", "train/b.csv", "test/a.csv"], ["train/a.csv", "train/b.csv"]),
        (["a.jsonl", "test.jsonl"], ["a.jsonl"]),
        (["train.txt", "test.txt", "valid.txt", "README.md", "prepare.py"], ["train.txt"]),
        (["wiki.train.tokens", "wiki.test.tokens", "wiki.valid.tokens"], ["wiki.train.tokens"]),
        (["train/1.txt", "train/2.txt", "test/1.txt"], ["train/1.txt", "train/2.txt"]),
        (["unit_test.txt", "a.txt", "test.md", "train.py"], ["a.txt", "test.md", "train.py", "unit_test.txt"]),
        (["train/a.md", "test/b.md", "testing.md"], ["testing.md", "train/a.md"]),
        (["train/a.py", "test/b.py"], ["test/b.py", "train/a.py"]),
        (["latest.jsonl", "contest.jsonl"], ["contest.jsonl", "latest.jsonl"]),
    ],
    ids=lambda names: names[0],
)
def test_no_test_split_is_trained_on(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    assert texts(folder(tmp_path, *names)) == expected


def test_files_without_a_split_beside_others_are_training_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, "more.jsonl", "train.jsonl", "test.jsonl")
    assert texts(tmp_path) == ["more.jsonl", "train.jsonl"]
    assert "data.split='train' is read, 2 files, with 1 whose name tells of no split; left out: test (1 file)" in caplog.text
    assert texts(tmp_path, split="test") == ["test.jsonl"]
    assert (
        "data.split='test' is read, 1 file; left out: train (1 file); 1 file whose name tells of no split left out"
        in caplog.text
    )


def test_a_split_that_is_not_there_is_an_error_that_lists_what_is(tmp_path: Path) -> None:
    folder(tmp_path / "a", "train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet", "test.parquet")
    there = r"holds the splits test \(1 file\), train_gen \(1 file\), train_sft \(1 file\)"
    for split in ("train", "validation", "train[:1%]"):
        with pytest.raises(ValueError, match=there):
            texts(tmp_path / "a", split=split)
    assert texts(tmp_path / "a", split="train_sft") == ["train_sft-00000-of-00001.parquet"]
    with pytest.raises(
        ValueError, match=r"holds the splits test \(1 file\), by the names of its files; got data.split='train'"
    ):
        texts(folder(tmp_path / "b", "test.jsonl"))
    with pytest.raises(ValueError, match=r"has no splits: .* got data.split='test'. Leave it at 'train'"):
        texts(folder(tmp_path / "c", "a.jsonl"), split="test")


def test_a_file_named_outright_is_asked_for(tmp_path: Path) -> None:
    folder(tmp_path, "test.jsonl", "a.jsonl")
    assert texts(tmp_path / "test.jsonl") == texts(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]
    with pytest.raises(ValueError, match=r"a.jsonl' is one file; got data.split='test'"):
        texts(tmp_path / "a.jsonl", split="test")
    with pytest.raises(ValueError, match=r"has neither splits nor configurations; got data.split='test'"):
        load_documents("python_stdlib", split="test")


def test_a_configuration_of_a_local_snapshot_is_a_folder_of_it(tmp_path: Path) -> None:
    folder(tmp_path, "en/train-00000-of-00001.parquet", "en/test-00000-of-00001.parquet", "fr/train-00000-of-00001.parquet")
    assert texts(tmp_path, config_name="en") == ["en/train-00000-of-00001.parquet"]
    with pytest.raises(ValueError, match=r"got data.config_name='de', and data.path='.*' has no such folder"):
        texts(tmp_path, config_name="de")
    with pytest.raises(ValueError, match=r"is one file; got data.split='train', data.config_name='en'"):
        texts(tmp_path / "en" / "train-00000-of-00001.parquet", config_name="en")


CARD = """---
license: mit
configs:
- config_name: full
  data_files:
  - split: train
    path: "data/*/*.jsonl"
  - split: test
    path: ["held/a.jsonl", "held/b[0-9].jsonl"]
- config_name: sample
  data_files: "sample/**"
---
# A data set
"""


def test_the_card_of_a_snapshot_says_which_files_are_which_split_of_a_configuration(tmp_path: Path) -> None:
    names = [
        "data/x/a.jsonl",
        "data/y/test.jsonl",
        "held/a.jsonl",
        "held/b1.jsonl",
        "held/c.jsonl",
        "sample/z/a.jsonl",
        "sample/test.jsonl",
    ]
    folder(tmp_path, *names)
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(
        ValueError, match=r"has the configurations full, sample, by its card; set data.config_name to one of them"
    ):
        texts(tmp_path)
    with pytest.raises(ValueError, match=r"got data.config_name='other', and .* has the configurations full, sample"):
        texts(tmp_path, config_name="other")
    assert texts(tmp_path, config_name="full") == names[:2]
    assert texts(tmp_path, config_name="full", split="test") == names[2:4]
    assert texts(tmp_path, config_name="sample") == ["sample/z/a.jsonl"], "files that the card does not tell of by their names"
    (tmp_path / "README.md").write_text(CARD.replace("config_name: full", "config_name: default"))
    assert texts(tmp_path) == names[:2]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: held\n  data_dir: held\n---\n")
    assert texts(tmp_path) == names[2:5]
    (tmp_path / "README.md").write_text("---\nconfigs: [unclosed\n---\n")
    assert set(texts(tmp_path)) == {name for name in names if "test" not in name}


def test_a_stream_is_read_until_there_are_enough_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def rows() -> Any:
        for i in range(1000):
            taken.append(i)
            yield {"text": "" if i % 2 else f"document {i}", "n": i}

    def load_dataset(path: str, *, name: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (path, name, split, streaming) == ("owner/name", "en", "train", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    options: dict[str, Any] = {"config_name": "en", "streaming": True, "max_documents": 5}
    expected = [f"document {i}" for i in (0, 2, 4, 6, 8)]
    assert load_documents("owner/name", **options)["text"][:] == expected
    assert max(taken) < 200
    monkeypatch.setattr(sources, "load_dataset", None)
    assert load_documents("owner/name", **options)["text"][:] == expected, "from the cache, without the hub"


def test_a_stream_needs_an_end_and_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data.streaming=true reads until .* set data.max_documents"):
        load_rows("owner/name", columns={"text": "text"}, streaming=True)
    with pytest.raises(ValueError, match=r"data.streaming=true reads until .* set data.max_documents"):
        DataConfig(streaming=True)
    stream = datasets.Dataset.from_dict({"body": ["x"], "n": [1]}).to_iterable_dataset()
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **options: stream)
    with pytest.raises(ValueError, match=r"'owner/name' has the columns \['body', 'n'\]; got data.text_column='text'"):
        load_documents("owner/name", streaming=True, max_documents=3)
    with pytest.raises(ValueError, match=r"column 'n' of the hub dataset 'owner/name' must hold strings; it holds int64"):
        load_documents("owner/name", text_column="n", streaming=True, max_documents=3)


def test_a_stream_that_breaks_off_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "a"}
        raise ConnectionError("server disconnected")

    monkeypatch.setattr(sources, "load_dataset", lambda *args, **options: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(ValueError, match=r"the hub dataset 'owner/name' could not be streamed: server disconnected"):
        load_documents("owner/name", streaming=True, max_documents=3)


def test_local_files_are_streamed_as_far_as_needed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"text": "2"}\nnot read so far')
    module = TextDataModule(DataConfig(path=str(tmp_path / "a.jsonl"), streaming=True, max_documents=2, seq_len=2), seed=0)
    module.setup()
    assert module.train_sequences + module.val_sequences == 2
    with pytest.raises(ValueError, match=r"row 3 of .*a.jsonl is not JSON"):
        load_documents(str(tmp_path / "a.jsonl"))


def test_hub_columns_of_any_type_are_read_and_errors_name_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"text": "a", "nested": {"text": "x", "n": 1}},
        {"text": None, "nested": None},
        {"text": "c", "nested": {"text": "y", "n": 2}},
    ]
    dataset = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **options: dataset)
    assert load_documents("owner/name")["text"][:] == ["a", "c"]
    assert load_documents("owner/name", text_column="nested.text")["text"][:] == ["x", "y"]
    assert [json.loads(value) for value in load_rows("owner/name", columns={"nested": "json"})["nested"]] == [
        row["nested"] for row in rows if row["nested"]
    ]
    assert load_rows("owner/name", columns={"nested": "json", "at": "place"})["at"][:] == [
        f"row {number} of the hub dataset 'owner/name'" for number in (1, 3)
    ]
    with pytest.raises(ValueError, match=r"data.path='owner/name': column 'nested' of .* must hold strings; it holds struct"):
        load_documents("owner/name", text_column="nested")
    assert sources.column_names("owner/name") == ["text", "nested"]
    dated = datasets.Dataset.from_list([{"at": {"day": datetime.date(2024, 1, 1)}}])
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **options: dated)
    with pytest.raises(ValueError, match=r"column 'at' in row 1 of the hub dataset 'owner/name' cannot be written as JSON"):
        load_rows("owner/name", columns={"at": "json"})


def sides(texts: list[str], *, seq_len: int = 8, val_fraction: float = 0.05) -> tuple[set[tuple], set[tuple]]:
    documents = datasets.Dataset.from_dict({"text": texts})
    train, val = pack_and_split(documents, byte_tokenizer(), seq_len=seq_len, val_fraction=val_fraction)
    return tuple({tuple(side[i]["input_ids"].tolist()) for i in range(len(side))} for side in (train, val))


def test_equal_documents_never_stand_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    document = "".join(f"{i:03}" for i in range(200))
    train, val = sides([document] * 200)
    assert val
    assert not train & val
    assert "199 of 200 documents are copies of others and left out" in caplog.text
    with pytest.raises(ValueError, match=r"training needs at least 2 sequences, .* 1 documents with 6 tokens"):
        sides(["short"] * 1000)


def test_few_different_documents_with_copies_are_split_without_them() -> None:
    first, second = "".join(f"a{i:03}" for i in range(100)), "".join(f"b{i:03}" for i in range(100))
    train, val = sides([first, second] * 50, val_fraction=1e-6)
    assert val
    assert not train & val
    documents = datasets.Dataset.from_dict({"text": ["b", "a", "b", "c", "a"]})
    assert distinct_documents(documents)["text"][:] == ["b", "a", "c"]
    assert distinct_documents(documents.select([0, 1])).num_rows == 2


def share_lines(texts: list[str], val_fraction: float, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    split_documents(datasets.Dataset.from_dict({"text": texts}), val_fraction)
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_held_out_share_far_from_val_fraction_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """One large document among a thousand small ones is held out, or is not, by its content."""
    even = [f"document {i} " * 10 for i in range(1000)]
    assert share_lines(even, 0.1, caplog) == []
    held_out = next(text for i in range(1000) if sources.is_held_out(text := f"large {i} " * 10_000, 0.1))
    (line,) = share_lines([*even, held_out], 0.1, caplog)
    size = len(held_out) / (len(held_out) + sum(map(len, even)))
    assert float(line.split()[0]) == pytest.approx(size + 0.1 * (1 - size), abs=0.03)
    trained_on = next(text for i in range(1000) if not sources.is_held_out(text := f"large {i} " * 100_000, 0.1))
    (line,) = share_lines([*even, trained_on], 0.1, caplog)
    assert "documents; data.val_fraction=0.1 asks for another share" in line
