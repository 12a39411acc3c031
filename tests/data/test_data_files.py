"""Reading local files: every format, every compression, and what is said of files that are damaged or passed over."""

import bz2
import errno
import gzip
import json
import logging
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nvfp4_train.data import rows as rows_module
from nvfp4_train.data import sources
from nvfp4_train.data.sources import column_names, load_documents, load_rows

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(file: Path, content: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def write_parquet(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


def texts(path: Path, **options: Any) -> list[str]:
    return load_documents(str(path), **options)["text"][:]


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as info:
        load_documents(str(path), **options)
    message = str(info.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines({"text": "één"}, {"text": "two\u2028lines"})),
        ("a.json", json.dumps([{"text": "één"}, {"text": "two\u2028lines"}]).encode()),
        ("a.csv", "id,text\n1,één\n2,two\u2028lines\n".encode()),
        ("a.tsv", "id\ttext\n1\téén\n2\ttwo\u2028lines\n".encode()),
    ],
    ids=["jsonl", "json", "csv", "tsv"],
)
def test_compressed_tables_are_read(tmp_path: Path, name: str, content: bytes, suffix: str) -> None:
    file = write(tmp_path / f"{name}.{suffix}", COMPRESS[suffix](content))
    assert texts(file) == texts(tmp_path) == ["één", "two\u2028lines"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_read_in_all_its_parts(tmp_path: Path, suffix: str) -> None:
    """Files of several streams come from tools that compress in parallel, or append."""
    compress = COMPRESS[suffix]
    write(tmp_path / f"a.txt.{suffix}", compress(b"\xef\xbb\xbffirst part, ") + compress(b"second part"))
    assert texts(tmp_path) == ["first part, second part"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_that_are_cut_short_or_damaged_are_errors_with_their_name(tmp_path: Path, suffix: str) -> None:
    rows = lines(*({"text": f"document {i * 7919 % 1000}"} for i in range(3000)))
    whole = COMPRESS[suffix](rows)
    file = tmp_path / f"b.jsonl.{suffix}"
    write(tmp_path / "a.jsonl", lines({"text": "good"}))
    for cut in (whole[:-20], whole[: len(whole) // 2], whole[:3], b""):
        write(file, cut)
        assert "is cut short" in (message := error_of(tmp_path)) or "cannot be read" in message
        assert str(file) in message
    write(file, b"not compressed at all, but called so")
    assert f"{file} cannot be read" in error_of(tmp_path)
    middle = len(whole) // 2
    write(file, whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle : middle + 64]) + whole[middle + 64 :])
    assert str(file) in error_of(tmp_path)


def test_a_file_and_its_compressed_copy_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.jsonl", lines({"text": "a"}))
    write(tmp_path / "a.jsonl.gz", gzip.compress(lines({"text": "a"})))
    assert texts(tmp_path) == ["a"]
    assert "1 file was not read: a.jsonl.gz (a.jsonl is there)" in caplog.text


def test_frames_of_zstd_that_hold_no_data_are_skipped(tmp_path: Path) -> None:
    """Tools that compress in parallel write their sizes into such frames."""
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    write(tmp_path / "a.txt.zst", skippable + zstandard.compress(b"one ") + skippable + zstandard.compress(b"two") + skippable)
    assert texts(tmp_path) == ["one two"]


def test_zstd_frames_with_a_long_window_are_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    write(tmp_path / "a.txt.zst", compressor.compress(b"far " * 1000) + compressor.flush())
    assert texts(tmp_path) == ["far " * 1000]


def test_a_missing_zstandard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt.zst", zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert f"{file} is read with the package zstandard; install it" in error_of(file)


def test_a_pointer_of_git_lfs_is_not_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    assert f"{file} is a pointer of Git LFS" in error_of(file)


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one", "n": 1}, {"text": "two"}]',
        ' \n[\n  {\n    "text": "one"\n  },\n  {\n    "text": "two", "x": [1, {"y": "]"}]\n  }\n]\n',
        '\ufeff[{"text": "one"},{"text": "two"}]',
        '{"text": "one"}\n\n{"text": "two", "n": [1]}\n',
        '\n\ufeff{"text": "one"}\n{"text": "two"}'.removeprefix("\n"),
        '{"version": 1, "data": [{"text": "one"}, {"text": "two"}]}',
        '{\n "version": [1, 2],\n "data": [\n {"text": "one"},\n {"text": "two"}]}',
    ],
    ids=["array", "indented_array", "array_with_mark", "lines", "lines_with_mark", "object_with_list", "indented_object"],
)
def test_a_json_file_is_read_by_what_it_holds(tmp_path: Path, content: str) -> None:
    assert texts(write(tmp_path / "a.json", content)) == ["one", "two"]


def test_one_json_object_with_the_column_is_one_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '{\n "text": "one",\n "parts": [{"text": "two"}]\n}')
    assert texts(file) == ["one"]
    assert column_names(str(file)) == ["text", "parts"]


def test_a_large_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_JSON_CHUNK_CHARS", 16)
    expected = [f"document {i} " + 'é\\"]},{' * (i % 7) for i in range(50)]
    content = json.dumps([{"n": -(10**i), "text": text, "none": None} for i, text in enumerate(expected)], indent=1)
    assert texts(write(tmp_path / "a.json", content)) == expected
    cut = content[: content.index("document 30") + 5]
    assert f"row 31 of {tmp_path / 'a.json'} is not JSON" in error_of(write(tmp_path / "a.json", cut))
    damaged = content.replace('"none": null', '"none" null', 1)
    assert "row 1 of" in error_of(write(tmp_path / "a.json", damaged))
    assert "goes on after the end of its array" in error_of(write(tmp_path / "a.json", content + "[]"))


def test_csv_is_a_table(tmp_path: Path) -> None:
    long = "x" * 200_000
    file = write(tmp_path / "a.csv", f'\ufeffid,text\r\n1,"a, ""quoted""\nline"\r\n\r\n2,{long}\r\n')
    assert texts(file) == ['a, "quoted"\nline', long]
    assert column_names(str(file)) == ["id", "text"]
    write(file, 'id,text\n1,"two\nlines"\n2,b,c\n')
    assert f"row 4 of {file} has 3 fields; its header has 2" in error_of(file)
    write(file, 'id,text\n1,a\n2,"never closed\n')
    assert f"row 3 of {file} is not CSV" in error_of(file)
    write(file, "id,body\n1,a\n")
    assert "has the columns ['id', 'body']; got data.text_column='text'" in error_of(file)


def test_only_the_text_column_is_looked_at(tmp_path: Path) -> None:
    """Files whose other columns differ, or change their types from row to row."""
    write(tmp_path / "a.jsonl", lines({"text": "a", "id": 1}, {"id": "one", "text": "b", "x": {"y": []}}))
    write(tmp_path / "b.jsonl", lines({"text": "c"}))
    write(tmp_path / "c.jsonl", lines({"source": 1.5, "score": None, "text": "d"}))
    write_parquet(tmp_path / "d.parquet", text=["e"], id=[b"\xff"])
    assert texts(tmp_path) == ["a", "b", "c", "d", "e"]


def test_strings_that_look_like_something_else_stay_text(tmp_path: Path) -> None:
    expected = ["2024-01-01", "2024-01-01T00:00:00Z", "12", "null", "true"]
    assert texts(write(tmp_path / "a.jsonl", lines(*({"text": text} for text in expected)))) == expected
    assert texts(write(tmp_path / "b.csv", "text\n" + "\n".join(expected) + "\n")) == expected


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("12", "the number 12"),
        ("NaN", "the number nan"),
        ("true", "the truth value True"),
        ('["a", "b"]', "a list of 2"),
        ('{"body": "x"}', "an object with the keys ['body']; a name with a dot"),
        ('"\\ud800"', "holds U+D800, which is no character"),
    ],
    ids=["number", "nan", "bool", "list", "object", "surrogate"],
)
@pytest.mark.parametrize("name", ["b.jsonl", "b.json"])
def test_a_row_that_holds_no_string_is_an_error_with_file_and_row(tmp_path: Path, name: str, value: str, said: str) -> None:
    good = [f'{{"text": "document {i}"}}' for i in range(29)]
    write(tmp_path / "a.jsonl", "\n".join(good))
    file = tmp_path / name
    rows = [*good[:16], f'{{"text": {value}}}', *good[16:]]
    write(file, "\n".join(rows) if name == "b.jsonl" else f"[{', '.join(rows)}]")
    message = error_of(tmp_path)
    assert f"row 17 of {file}" in message
    assert said in message


def test_a_damaged_row_is_an_error_with_file_and_row(tmp_path: Path) -> None:
    good = lines({"text": "good"})
    write(tmp_path / "a.jsonl", good)
    file = tmp_path / "b.jsonl"
    for bad, said in (
        (b'{"text": "cut o', "is not JSON: Unterminated string"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 text: byte 0xe9 at position 13"),
        (b'["a", "list"]', "must be a JSON object; it is a list of 2"),
        (b'"a string"', "must be a JSON object; it is a string"),
        (b"[" * 100_000, "is not JSON"),
    ):
        write(file, good + b"\n" + good + bad + b"\n" + good)
        message = error_of(tmp_path)
        assert f"row 4 of {file} {said}" in message, message
    latin = b'[{"text": "good", "other": "caf\xe9"}, {"text": "caf\xe9"}]'
    json_file = write(tmp_path / "c" / "c.json", latin)
    assert f"row 2 of {json_file} holds the byte 0xe9, which is not UTF-8" in error_of(json_file.parent)


def test_a_file_without_the_column_is_an_error_with_its_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines({"text": "a"}))
    file = write(tmp_path / "b.jsonl", lines({"body": "a"}, {"title": "b", "body": "c"}))
    assert f"{file} has the columns ['body', 'title']; got data.text_column='text'" in error_of(tmp_path)
    file.unlink()
    file = write_parquet(tmp_path / "b.parquet", body=["x"])
    assert f"{file} has the columns ['body']; got data.text_column='text'" in error_of(tmp_path)


def test_rows_without_text_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "a.jsonl", lines({"text": "kept"}, {"text": None}, {"n": 1}, {"text": " \n"}, {"text": ""}))
    assert texts(tmp_path) == ["kept"]
    assert "4 rows without text were left out; 1 documents are there" in caplog.text


@pytest.mark.parametrize(
    "dtype",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=["string", "large_string", "string_view", "dictionary"],
)
def test_every_kind_of_string_column_of_parquet_is_read(tmp_path: Path, dtype: pa.DataType) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=pa.array(["a", None, "b", "a"]).cast(dtype))
    assert texts(file) == ["a", "b", "a"]


def test_other_columns_of_parquet_are_errors_that_say_what_they_hold(tmp_path: Path) -> None:
    struct = [{"body": "x", "n": 1}, {"body": "y", "n": 2}]
    file = write_parquet(tmp_path / "a.parquet", text=struct, raw=[b"x", b"y"], many=[["x"], ["y"]])
    assert f"column 'text' of {file} must hold strings; it holds struct<body: string, n: int64>; a name with a dot" in error_of(
        file
    )
    assert "must hold strings; it holds binary" in error_of(file, text_column="raw")
    assert "must hold strings; it holds list" in error_of(file, text_column="many")
    assert "must hold strings; it holds int64" in error_of(file, text_column="text.n")
    assert "has the columns ['text', 'raw', 'many']; got data.text_column='text.title'" in error_of(
        file, text_column="text.title"
    )
    broken = write(tmp_path / "b.parquet", file.read_bytes()[:-10])
    assert f"{broken} is not readable as parquet" in error_of(broken)


def test_a_name_with_dots_reaches_into_nested_values(tmp_path: Path) -> None:
    rows = [
        {"a": {"b": {"c": "one"}, "n": 1}, "x.y": "flat"},
        {"a": None, "x.y": "flat"},
        {"a": {"b": {"c": "two"}}, "x.y": "flat"},
    ]
    files = [
        write(tmp_path / "a.jsonl", lines(*rows)),
        write(tmp_path / "a.json", json.dumps(rows)),
        write_parquet(tmp_path / "a.parquet", **{name: [row[name] for row in rows] for name in rows[0]}),
    ]
    for file in files:
        assert texts(file, text_column="a.b.c") == ["one", "two"]
        assert texts(file, text_column="x.y") == ["flat"] * 3


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    train.save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == ["a", "b"]
    datasets.DatasetDict({"train": train, "test": train.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "two") == ["a", "b"]
    assert texts(tmp_path / "two", split="test") == ["b"]


def test_text_files_lose_the_byte_order_mark_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\ufeff\ufeffa\r\nb\x0c\n")
    write(tmp_path / "b.MD", "# title\n")
    assert texts(tmp_path) == ["\ufeffa\r\nb\x0c\n", "# title\n"]


def test_a_named_file_of_unknown_kind_must_be_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "corpus", "plain")) == ["plain"]
    assert texts(write(tmp_path / "notes.v2.gz", gzip.compress(b"packed"))) == ["packed"]
    assert "is not UTF-8 text: byte 0xff" in error_of(write(tmp_path / "a.bin", b"\xff\xfe\x00"))
    assert "is not text: it has zero bytes" in error_of(write(tmp_path / "b.bin", b"PK\x00\x01"))


def test_what_is_not_read_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.txt", "text")
    for name in ("b.pdf", "c/d.docx", "e.bin", "f.tar.gz", "g.parquet.gz"):
        write(tmp_path / name, b"\xff")
    write(tmp_path / "c" / "__pycache__" / "x.pyc", b"")
    write(tmp_path / ".hidden", b"")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert texts(tmp_path) == ["text"]
    line = f"data.path='{tmp_path}': 6 files were not read: b.pdf, c/d.docx, e.bin, f.tar.gz, g.parquet.gz, gone.txt (a broken link)"
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [line]


def test_files_of_several_kinds_are_read_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.txt", "1")
    write(tmp_path / "b.jsonl", lines({"text": "2"}))
    write(tmp_path / "c.jsonl.gz", gzip.compress(lines({"text": "3"})))
    write(tmp_path / "d.json", lines({"text": "4"}))
    write(tmp_path / "sub" / "e.csv", "text\n5\n")
    write_parquet(tmp_path / "f.parquet", text=["6"])
    assert texts(tmp_path) == ["1", "2", "3", "4", "6", "5"]
    assert "files of several kinds are read: 1 csv, 1 json, 2 jsonl, 1 parquet, 1 text" in caplog.text


def test_cards_notes_and_scripts_beside_tables_are_no_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "part.parquet", text=["document"])
    for name in ("README.md", "LICENSE", "LICENSE.txt", "loader.py", "notes.md", "dataset_infos.json", ".gitattributes"):
        write(tmp_path / name, "{}")
    write(tmp_path / "stats.json", '{"rows": 1}')
    write(tmp_path / "index.csv", "name,size\na,1\n")
    assert texts(tmp_path) == ["document"]
    line = (
        "8 files were not read: LICENSE, LICENSE.txt, README.md, dataset_infos.json, index.csv (no column 'text'), loader.py, "
        "notes.md, stats.json (no column 'text')"
    )
    assert line in caplog.text


def test_a_folder_of_sources_or_notes_is_read_with_settings_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "pkg" / "main.py", "x = 1")
    write(tmp_path / "pkg" / "tests" / "test_main.py", "assert x")
    write(tmp_path / "pkg" / "test" / "train.py", "train()")
    write(tmp_path / "setup.py", "setup()")
    write(tmp_path / "package.json", '{"name": "x"}')
    write(tmp_path / "tsconfig.json", '{"a": 1, // comment\n}')
    write(tmp_path / "README.md", "about")
    assert texts(tmp_path) == ["x = 1", "train()", "assert x", "setup()"]
    assert (
        "3 files were not read: README.md, package.json (no column 'text'), tsconfig.json (not readable as json)" in caplog.text
    )
    write(tmp_path / "docs" / "guide.md", "guide")
    assert texts(tmp_path) == ["about", "guide", "x = 1", "train()", "assert x", "setup()"]


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"a": 1, ', "is not JSON"), ('[{"body": "x"}]', "has the columns ['body']; got data.text_column='text'")],
    ids=["damaged", "other_column"],
)
def test_a_table_that_cannot_be_taken_is_an_error_where_it_is_what_is_there(tmp_path: Path, content: str, said: str) -> None:
    """Its card and its script do not become the training text in its place."""
    file = write(tmp_path / "data.json", content)
    write(tmp_path / "README.md", "a card")
    assert f"{file} {said}" in error_of(tmp_path)
    write(tmp_path / "prepare.py", "a script")
    assert f"{file} {said}" in error_of(tmp_path)


def test_text_files_beside_the_table_of_another_column_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.jsonl", lines({"body": "a"}))
    write(tmp_path / "notes.txt", "notes")
    assert texts(tmp_path, text_column="body") == ["a"]
    assert "1 file was not read: notes.txt (no column 'body')" in caplog.text
    assert texts(tmp_path / "notes.txt") == ["notes"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    write(outside / "b.jsonl", lines({"text": "b"}))
    write(root / "a.jsonl", lines({"text": "a"}))
    (root / "link").symlink_to(outside)
    (root / "again").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (outside / "back").symlink_to(root)
    (root / "same.jsonl").symlink_to(root / "a.jsonl")
    assert sorted(texts(root)) == ["a", "b"]


def test_files_of_a_hub_cache_are_links_to_nameless_files(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs" / "abc", lines({"text": "a"}))
    snapshot = tmp_path / "snapshots" / "rev" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "train-00000-of-00001.jsonl").symlink_to(blob)
    assert texts(snapshot.parent) == texts(tmp_path) == ["a"]


def test_a_link_does_not_make_a_test_file_one_for_training(tmp_path: Path) -> None:
    write(tmp_path / "data" / "test" / "a.jsonl", lines({"text": "test"}))
    write(tmp_path / "data" / "train" / "a.jsonl", lines({"text": "train"}))
    (tmp_path / "all").symlink_to(tmp_path / "data" / "test")
    (tmp_path / "latest.jsonl").symlink_to(tmp_path / "data" / "test" / "a.jsonl")
    assert texts(tmp_path) == ["train"]


def test_rows_of_other_columns_come_as_json_text(tmp_path: Path) -> None:
    """Nested values of different rows need no common type."""
    rows = [
        {"messages": [{"role": "user", "content": "é"}], "tools": None, "source": "a"},
        {"messages": [{"role": "user", "content": [{"type": "text"}], "x": 1}], "tools": [{"name": "f"}]},
        {"messages": None, "source": ""},
    ]
    file = write(tmp_path / "a.jsonl", lines(*rows))
    loaded = load_rows(str(file), columns={"messages": "json", "tools": "json", "source": "text"})
    assert loaded.column_names == ["messages", "tools", "source"]
    assert [json.loads(value) for value in loaded["messages"]] == [rows[0]["messages"], rows[1]["messages"]]
    assert loaded["tools"][:] == [None, '[{"name": "f"}]']
    assert loaded["source"][:] == ["a", None]
    assert column_names(str(file)) == ["messages", "tools", "source"]
    parquet = write_parquet(tmp_path / "a.parquet", messages=[rows[0]["messages"]], n=[1])
    loaded = load_rows(str(parquet), columns={"messages": "json", "tools": "json"})
    assert json.loads(loaded[0]["messages"]) == rows[0]["messages"]
    assert loaded[0]["tools"] is None
    assert column_names(str(parquet)) == ["messages", "n"]
    with pytest.raises(ValueError, match=r"has the columns \['messages', 'n'\]; none of them is 'conversations'"):
        load_rows(str(parquet), columns={"conversations": "json"})


def test_an_edited_table_is_read_again_and_an_equal_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", lines({"text": "old"}))
    assert texts(file) == ["old"]
    monkeypatch.setattr(rows_module, "_json_lines", None)
    assert texts(file) == ["old"]
    monkeypatch.undo()
    write(file, lines({"text": "new"}, {"text": "er"}))
    assert texts(file) == ["new", "er"]


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nope"))
    assert "the cache of datasets, /proc/nope, cannot be written" in error_of(file)


def test_a_full_disk_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_rows(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    file = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(sources, "read_rows", read_rows)
    message = error_of(file)
    assert message.startswith("the cache of datasets, ")
    assert "No space left on device); make room" in message


def test_a_folder_that_cannot_be_listed_is_an_error_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "closed" / "b.txt", "text")
    listed = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"the folder {tmp_path / 'closed'} cannot be read: Permission denied" in error_of(tmp_path)


def test_bytes_of_parquet_that_are_no_text_are_an_error_with_their_row(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=pa.array([b"good"] * 300 + [b"caf\xe9"], pa.binary()).view(pa.string()))
    assert f"row 301 of {file} is not UTF-8 text" in error_of(file)
