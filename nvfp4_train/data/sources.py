"""Documents: where the text comes from, and which documents are held out.

Every source ends as a `datasets.Dataset` with one document per row, in an order that depends on nothing but the data. What is read
lies in the cache of `datasets`, of a stream as well; an edited file is read again.
"""

import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

from nvfp4_train.data.cache import cache_errors
from nvfp4_train.data.file_bytes import ReadError, read_text
from nvfp4_train.data.local_files import LocalFile, find_files, is_named_as_data, text_files, walk
from nvfp4_train.data.notices import notice
from nvfp4_train.data.rows import Columns, Row, check_columns, converted, first_columns, lookup, read_rows, sought

log = logging.getLogger(__name__)

PYTHON_STDLIB = "python_stdlib"

# Tests repeat one pattern; pydoc_data, encodings and lib2to3 are tables and grammar files rather than programs.
_STDLIB_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "_bundled",
    "test", "tests", "idle_test", "pydoc_data", "encodings", "lib2to3",
}  # fmt: skip
# Part of the cache's key. To be raised where the same files are read into other rows.
_READING = 2
# Documents may be long, and so many are in memory at once.
_WRITER_BATCH_ROWS = 100
_MOST_FILES_FOR_COLUMNS = 16


def load_documents(
    path: str,
    *,
    text_column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    max_documents: int | None = None,
) -> Dataset:
    """The documents of `path`, in the column `text`: `load_rows` with one text column. A text file is one document.

    Raises ValueError for what the user can correct, with the file and the row where there is one.
    """
    rows = load_rows(
        path,
        columns={text_column: "text"},
        split=split,
        config_name=config_name,
        streaming=streaming,
        max_rows=max_documents,
    )
    return rows if text_column == "text" else rows.rename_column(text_column, "text")


def load_rows(
    path: str,
    *,
    columns: Columns,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
) -> Dataset:
    """The rows of `path`: "python_stdlib", a local file or folder (`local_files`, `rows`), or a hub dataset. All columns are strings.

    What exists on disk, or is written like a path, is local; anything else is a hub name. `columns` says of each column whether it is
    the text of strings, the JSON text of values of any type, that of a column beside these, or the row's place, "row 7 of a.jsonl".
    A value that is not there is None. Rows with none of the first two are dropped; of the rest the first `max_rows` are taken.

    With `streaming`, reading ends after `max_rows`, and of a hub dataset no more is fetched. What was read is cached under the name, so
    a resumed run has the same rows, and a data set that has changed on the hub is not read again.

    Raises ValueError for what the user can correct, with the file and the row where there is one.
    """
    if streaming and max_rows is None:
        raise ValueError("data.streaming=true reads until there are data.max_documents documents; set data.max_documents")
    limit = max_rows if streaming else None
    if path == PYTHON_STDLIB or is_local(path):
        files = _files(path, split, config_name, columns)
        rows = _generated(path, columns, _local_rows, files=files, limit=limit)
    elif streaming:
        rows = _generated(path, columns, _streamed_rows, name=path, config_name=config_name, split=split, limit=limit)
    else:
        rows = _hub_rows(path, split, config_name, columns)
    if max_rows is not None and max_rows < len(rows):
        rows = rows.select(range(max_rows))
    return rows


def column_names(path: str, *, split: str = "train", config_name: str | None = None, streaming: bool = False) -> list[str]:
    """The names of the columns of `path`, as its first rows or its schema have them. Raises ValueError as `load_rows` does."""
    try:
        if path == PYTHON_STDLIB or is_local(path):
            # Reading the rows tells what is passed over.
            files = _files(path, split, config_name, {}, tells=False)
            names = (name for file in files[:_MOST_FILES_FOR_COLUMNS] for name in first_columns(file.path, file.kind))
            return list(dict.fromkeys(names))
        dataset = _from_hub(path, split, config_name, streaming=streaming)
        return list(dataset.column_names or next(iter(dataset), {}))
    except ReadError as error:
        raise ValueError(f"data.path={path!r}: {error}") from error


def split_documents(documents: Dataset, val_fraction: float, *, column: str = "text") -> tuple[Dataset, Dataset]:
    """(training documents, held-out documents): a document is held out when the hash of its text, in `column`, says so.

    So neither seed, order nor number of ranks moves a document, and copies of one stay together. A side may be empty. Where the
    held-out side has a share of the text that is far from `val_fraction`, a warning says so.
    """

    def side(is_val: bool) -> Dataset:
        with cache_errors():
            return documents.filter(
                _are_on_side,
                input_columns=column,
                batched=True,
                fn_kwargs={"val_fraction": val_fraction, "is_val": is_val},
                desc="Choosing held-out documents" if is_val else "Choosing training documents",
            )

    train, val = side(False), side(True)
    if len(train) and len(val):
        share = _num_bytes(val, column) / max(_num_bytes(documents, column), 1)
        _check_share(share, len(val), len(documents), val_fraction)
    return train, val


def distinct_documents(documents: Dataset, *, column: str = "text") -> Dataset:
    """`documents` without those whose text, in `column`, was there before. The others keep their order."""
    seen, kept, place = set(), [], 0
    for batch in documents.select_columns([column]).iter(_WRITER_BATCH_ROWS):
        for text in batch[column]:
            digest = _digest(text, 16)
            if digest not in seen:
                seen.add(digest)
                kept.append(place)
            place += 1
    return documents if len(kept) == place else documents.select(kept)


def is_held_out(text: str, val_fraction: float) -> bool:
    """Whether the hash of `text`, read as a number in [0, 1), is below `val_fraction`."""
    return int.from_bytes(_digest(text, 8), "big") < val_fraction * 2**64


def is_local(path: str) -> bool:
    """Whether `path` is a file or folder rather than a hub name, `name` or `owner/name`."""
    is_written_like_a_path = (
        path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1 or path.endswith("/") or is_named_as_data(path)
    )
    return is_written_like_a_path or os.path.exists(path)


def stdlib_files() -> list[Path]:
    """The running interpreter's own standard-library sources that decode as UTF-8, without tests and data tables, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file for file in walk(root, _STDLIB_SKIPPED_FOLDERS, follows_links=False) if file.suffix == ".py" and _is_utf8(file)
    ]
    # The name and the content of the build's configuration table depend on the machine.
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]
    if not files:
        raise ValueError(f"data.path='{PYTHON_STDLIB}' found no Python sources in {root}; set data.path to other text")
    return files


def _files(path: str, split: str, config_name: str | None, columns: Columns, *, tells: bool = True) -> tuple[LocalFile, ...]:
    if "://" in path:
        raise ValueError(
            f"data.path is a local path or the name of a hub dataset; got the address {path!r}. Download it first."
        )
    if path != PYTHON_STDLIB:
        return find_files(Path(path).expanduser(), split=split, config_name=config_name, columns=columns, tells=tells)
    if split != "train" or config_name is not None:
        raise ValueError(
            f"data.path='{PYTHON_STDLIB}' has neither splits nor configurations; got data.split={split!r}, "
            f"data.config_name={config_name!r}. Leave them at 'train' and null."
        )
    return text_files(stdlib_files())


def _generated(path: str, columns: Columns, generator: Callable[..., Iterator[Row]], **arguments: Any) -> Dataset:
    """What `generator` yields, or what it yielded before for the same arguments."""
    try:
        with cache_errors():
            return Dataset.from_generator(
                generator,
                features=_features(columns),
                gen_kwargs={"columns": tuple(columns.items()), "reading": _READING, **arguments},
                writer_batch_size=_WRITER_BATCH_ROWS,
            )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ReadError):
            raise ValueError(f"data.path={path!r}: {cause}") from error
        if isinstance(cause, OSError):
            with cache_errors():
                raise cause from error
        raise


def _features(columns: Columns) -> Features:
    # Offsets of 32 bits end at 2 GiB of text in one batch.
    return Features({name: Value("large_string") for name in columns})


def _local_rows(files: tuple[LocalFile, ...], columns: tuple, reading: int, limit: int | None) -> Iterator[Row]:
    wanted = dict(columns)
    rows = (row for file in files for row in read_rows(file.path, file.kind, wanted))
    yield from _documents(rows, wanted, limit)


def _streamed_rows(
    name: str, config_name: str | None, split: str, columns: tuple, reading: int, limit: int | None
) -> Iterator[Row]:
    wanted = dict(columns)
    place = f"the hub dataset {name!r}"
    try:
        stream = _from_hub(name, split, config_name, streaming=True)
        if stream.features is not None:
            stream = stream.select_columns(check_columns(stream.features.arrow_schema, wanted, place)[1])
        elif not any(lookup(row, column) for row in islice(stream, 100) for column in sought(wanted)):
            raise ReadError(f"{place} has the columns {list(next(iter(stream), {}))}; got {', '.join(wanted)}")
        rows = (converted(row, wanted, number, place, is_columnar=True) for number, row in enumerate(stream, 1))
        yield from _documents(rows, wanted, limit)
    except ReadError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ReadError(f"{place} could not be streamed: {error}") from error


def _documents(rows: Iterator[Row], columns: Columns, limit: int | None) -> Iterator[Row]:
    """The first `limit` of `rows` that hold something."""
    count = num_empty = 0
    for row in rows:
        if not _holds_something(row, columns):
            num_empty += 1
            continue
        yield row
        count += 1
        if count == limit:
            break
    if not count:
        raise ReadError(_no_document(columns))
    if num_empty:
        log.info("%d rows without text were left out; %d documents are there.", num_empty, count)


def _holds_something(row: Row, columns: Columns) -> bool:
    return any(value and not value.isspace() for value in map(row.get, sought(columns)))


def _no_document(columns: Columns) -> str:
    options = " or ".join(f"data.text_column={name!r}" if columns[name] == "text" else repr(name) for name in sought(columns))
    return f"it holds no document with text in {options}"


def _hub_rows(name: str, split: str, config_name: str | None, columns: Columns) -> Dataset:
    place = f"the hub dataset {name!r}"
    try:
        dataset = _from_hub(name, split, config_name, streaming=False)
        _, heads = check_columns(dataset.features.arrow_schema, columns, place)
        with cache_errors():
            rows = dataset.select_columns(heads).map(
                _hub_batch,
                batched=True,
                batch_size=_WRITER_BATCH_ROWS,
                writer_batch_size=_WRITER_BATCH_ROWS,
                with_indices=True,
                remove_columns=heads,
                features=_features(columns),
                fn_kwargs={"columns": dict(columns), "place": place},
                desc="Reading documents",
            )
    except ReadError as error:
        raise ValueError(f"data.path={name!r}: {error}") from error
    if not len(rows):
        raise ValueError(f"data.path={name!r}: {_no_document(columns)}")
    return rows


def _hub_batch(batch: Mapping[str, list], indices: list[int], columns: Columns, place: str) -> dict[str, list[str | None]]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    read = [converted(row, columns, index + 1, place, is_columnar=True) for index, row in zip(indices, rows, strict=True)]
    kept = [row for row in read if _holds_something(row, columns)]
    return {name: [row[name] for row in kept] for name in columns}


def _from_hub(name: str, split: str, config_name: str | None, *, streaming: bool) -> Any:
    try:
        if streaming:
            return load_dataset(name, name=config_name, split=split, streaming=True)
        return load_dataset(name, name=config_name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ReadError(
            f"it is no local file or folder, and no hub dataset could be loaded by that name with data.split={split!r}, "
            f"data.config_name={config_name!r}: {error}"
        ) from error


def _are_on_side(texts: list[str], val_fraction: float, is_val: bool) -> list[bool]:
    return [is_held_out(text, val_fraction) == is_val for text in texts]


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _num_bytes(documents: Dataset, column: str) -> int:
    batches = documents.select_columns([column]).with_format("arrow").iter(1000)
    return sum(pc.sum(pc.binary_length(batch[column])).as_py() for batch in batches)


def _check_share(share: float, num_held_out: int, num_documents: int, val_fraction: float) -> None:
    if share > 0.5 > val_fraction or not val_fraction / 2 <= share <= val_fraction * 2:
        notice(
            f"{share:.2g} of the text is held out, in {num_held_out} of {num_documents} documents; data.val_fraction={val_fraction} "
            "asks for another share. A document is held out whole, by its content: cut long documents up, or change data.val_fraction."
        )


def _is_utf8(file: Path) -> bool:
    try:
        read_text(str(file))
    except ReadError:
        return False
    return True
