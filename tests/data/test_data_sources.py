import json
import os
from pathlib import Path

import datasets
import pytest

from nvfp4_train.data import sources
from nvfp4_train.data.sources import is_local, load_documents, split_documents, stdlib_files


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_stdlib_is_this_interpreters_sources_in_a_fixed_order() -> None:
    files = stdlib_files()
    assert files == stdlib_files()
    names = {file.as_posix().rpartition("/")[2] for file in files}
    assert {"argparse.py", "decoder.py"} <= names
    parts = {part for file in files for part in file.relative_to(Path(os.__file__).parent).parts}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    assert sum(file.stat().st_size for file in files) > 4_000_000


def test_stdlib_skips_what_does_not_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n\xe9\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert load_documents("python_stdlib")["text"] == ["x = 1\n"]


def test_text_files_are_one_document_each_in_path_order(corpus: Path) -> None:
    (corpus / "sub").mkdir()
    (corpus / "sub" / "99.txt").write_text("in a subfolder", encoding="utf-8")
    (corpus / ".hidden.txt").write_text("hidden", encoding="utf-8")
    (corpus / "ignored.bin").write_bytes(b"\xff")
    documents = load_documents(str(corpus))
    assert documents.column_names == ["text"]
    expected = [file.read_text(encoding="utf-8") for file in sorted(corpus.glob("[0-9]*.txt"))]
    assert documents["text"] == [*expected, "in a subfolder"]


def test_one_named_file_of_any_suffix_is_text(tmp_path: Path) -> None:
    (tmp_path / "notes.rst").write_text("a\r\nb", encoding="utf-8", newline="")
    assert load_documents(str(tmp_path / "notes.rst"))["text"] == ["a\r\nb"]


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old", encoding="utf-8")
    assert load_documents(str(file))["text"] == ["old"]
    file.write_text("newer", encoding="utf-8")
    assert load_documents(str(file))["text"] == ["newer"]


def test_jsonl_and_parquet_give_the_named_column(tmp_path: Path) -> None:
    rows = [{"body": "one", "n": 1}, {"body": "two", "n": 2}]
    folder = tmp_path / "with [brackets] and *"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows)
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    for path in (folder, folder / "a.jsonl", parquet):
        documents = load_documents(str(path), text_column="body")
        assert documents.column_names == ["text"]
        assert documents["text"] == ["one", "two"]


def test_empty_documents_are_dropped(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": None}, {"text": " \n"}, {"text": "kept"}])
    assert load_documents(str(file))["text"] == ["kept"]


def test_hub_datasets_are_loaded_by_name_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"text": ["from the hub"]})

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert load_documents("owner/name", split="train[:1%]", config_name="en")["text"] == ["from the hub"]
    assert asked == [("owner/name", "en", "train[:1%]")]


def test_what_is_written_like_a_path_or_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    local = ["/a/b", "./a", "../a", "~/a", "a/b/c", "folder/", "C:\\a", "a.jsonl", "dir/a.txt", "a.parquet", "here"]
    assert [path for path in local if not is_local(path)] == []
    assert [name for name in ("name", "owner/name", "owner/name-v1.5") if is_local(name)] == []


def test_a_missing_path_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"data.path='/nowhere/corpus' does not exist"):
        load_documents("/nowhere/corpus")


def test_an_address_is_no_path() -> None:
    with pytest.raises(ValueError, match=r"got the address 'https://host/a.jsonl'. Download it first"):
        load_documents("https://host/a.jsonl")


def test_an_unreachable_hub_name_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"data.path='nobody/nothing': it is no local file or folder, and no hub dataset"):
        load_documents("nobody/nothing")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.path='.*empty' holds no file of a kind that is read: .txt"):
        load_documents(str(tmp_path / "empty"))


def test_no_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"data.path='.*empty.txt': it holds no document with text in data.text_column='text'"):
        load_documents(str(tmp_path / "empty.txt"))


def test_a_wrong_column_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "n": 1}])
    with pytest.raises(ValueError, match=r"has the columns \['body', 'n'\]; got data.text_column='text'"):
        load_documents(str(file))
    with pytest.raises(ValueError, match=r"column 'n' in row 1 of .*a.jsonl must hold a string; it holds the number 1"):
        load_documents(str(file), text_column="n")


def test_the_held_out_side_depends_on_content_alone() -> None:
    texts = [f"text {i}" for i in range(400)]
    train, val = split_documents(datasets.Dataset.from_dict({"text": texts}), 0.1)
    assert sorted([*train["text"], *val["text"]]) == sorted(texts)
    assert 20 <= len(val) <= 60
    shuffled = datasets.Dataset.from_dict({"text": texts[::-1] + ["another"] + texts[:50]})
    again_train, again_val = split_documents(shuffled, 0.1)
    assert set(again_val["text"]) - {"another"} == set(val["text"])
    assert not set(again_train["text"]) & set(again_val["text"])
