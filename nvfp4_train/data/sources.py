"""Documents: where the text comes from, and which documents are held out.

Every source ends as a `datasets.Dataset` with the one column `text`, one document per row, in an order that depends on nothing
but the data. What is read lies in the cache of `datasets`; an edited file is read again.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

PYTHON_STDLIB = "python_stdlib"

TEXT_SUFFIXES = (".txt", ".text", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)

# Tests repeat one pattern; pydoc_data, encodings and lib2to3 are tables and grammar files rather than programs.
_STDLIB_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "_bundled",
    "test", "tests", "idle_test", "pydoc_data", "encodings", "lib2to3",
}  # fmt: skip


def load_documents(path: str, *, text_column: str = "text", split: str = "train", config_name: str | None = None) -> Dataset:
    """The documents of `path`: "python_stdlib", a local file or folder (text, jsonl or parquet), or a hub dataset.

    What exists on disk, or is written like a path, is local; anything else is a hub name. A text file is one document.
    """
    if path == PYTHON_STDLIB:
        dataset = _from_text_files(stdlib_files())
    elif is_local(path):
        if split != "train" or config_name is not None:
            raise ValueError(
                f"data.split and data.config_name choose a part of a hub dataset, and data.path={path!r} is local; got "
                f"data.split={split!r}, data.config_name={config_name!r}. Leave them at 'train' and null."
            )
        dataset = _from_local(Path(path).expanduser())
    else:
        dataset = _from_hub(path, split, config_name)
    if text_column not in dataset.column_names:
        raise ValueError(f"data.path={path!r} has the columns {dataset.column_names}; got data.text_column={text_column!r}")
    dtype = getattr(dataset.features[text_column], "dtype", "a nested type")
    if dtype not in ("string", "large_string"):
        raise ValueError(
            f"the text column must hold strings; data.text_column={text_column!r} of data.path={path!r} holds {dtype}"
        )
    dataset = dataset.select_columns([text_column])
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    documents = dataset.filter(_are_not_empty, input_columns="text", batched=True, desc="Dropping empty documents")
    if not len(documents):
        raise ValueError(f"data.path={path!r} holds no document with text in data.text_column={text_column!r}")
    return documents


def split_documents(documents: Dataset, val_fraction: float) -> tuple[Dataset, Dataset]:
    """(training documents, held-out documents): a document is held out when the hash of its text says so.

    So neither seed, order nor number of ranks moves a document, and copies of one stay together. A side may be empty.
    """

    def side(is_val: bool) -> Dataset:
        return documents.filter(
            _are_on_side,
            input_columns="text",
            batched=True,
            fn_kwargs={"val_fraction": val_fraction, "is_val": is_val},
            desc="Choosing held-out documents" if is_val else "Choosing training documents",
        )

    return side(False), side(True)


def is_held_out(text: str, val_fraction: float) -> bool:
    """Whether the hash of `text`, read as a number in [0, 1), is below `val_fraction`."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def is_local(path: str) -> bool:
    """Whether `path` is a file or folder rather than a hub name, `name` or `owner/name`."""
    is_written_like_a_path = (
        path.startswith((".", "~", "/"))
        or "\\" in path
        or path.count("/") > 1
        or path.endswith(("/", *TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES, ".json"))
    )
    return is_written_like_a_path or Path(path).exists()


def stdlib_files() -> list[Path]:
    """The running interpreter's own standard-library sources that decode as UTF-8, without tests and data tables, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, _STDLIB_SKIPPED_FOLDERS) if file.suffix == ".py" and _is_utf8(file)]
    # The name and the content of the build's configuration table depend on the machine.
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]
    if not files:
        raise ValueError(f"data.path='{PYTHON_STDLIB}' found no Python sources in {root}; set data.path to other text")
    return files


def _from_local(path: Path) -> Dataset:
    if not path.exists():
        raise ValueError(f"data.path={str(path)!r} does not exist; give a file, a folder, a hub dataset or '{PYTHON_STDLIB}'")
    if path.is_file():
        kind = _kind(path)
        # One file that is named outright is read as text whatever it is called.
        kind = "json" if path.suffix == ".json" else kind or "text"
        files = [path]
    else:
        by_kind: dict[str, list[Path]] = {}
        for file in _walk(path, set()):
            if found := _kind(file):
                by_kind.setdefault(found, []).append(file)
        if not by_kind:
            suffixes = " ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES))
            raise ValueError(f"the folder data.path={str(path)!r} holds no file of a kind that is read: {suffixes}")
        if len(by_kind) > 1:
            counts = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(by_kind.items()))
            raise ValueError(f"a folder must hold files of one kind; data.path={str(path)!r} holds {counts}")
        ((kind, files),) = by_kind.items()
    if kind == "text":
        return _from_text_files(files)
    try:
        # The cache is keyed on the files' times of change.
        names = [_escape_glob(str(file.absolute())) for file in files]
        return load_dataset(kind, data_files={"train": names}, split="train")
    except (DatasetGenerationError, OSError, ValueError, StopIteration) as error:
        # An empty file ends in a StopIteration without a word.
        raise ValueError(
            f"data.path={str(path)!r} is not readable as {kind}: {error.__cause__ or str(error) or 'it is empty'}"
        ) from error


def _from_text_files(files: list[Path]) -> Dataset:
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return Dataset.from_generator(_read_files, gen_kwargs={"files": [str(file) for file in files], "stamps": stamps})
    except DatasetGenerationError as error:
        raise ValueError(f"data.path is not readable as UTF-8 text: {error.__cause__ or error}") from error


def _from_hub(name: str, split: str, config_name: str | None) -> Dataset:
    try:
        return load_dataset(name, name=config_name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.path={name!r} is no local file or folder, and no hub dataset could be loaded by that name with "
            f"data.split={split!r}, data.config_name={config_name!r}: {error}"
        ) from error


def _read_files(files: list[str], stamps: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
    """`stamps` is there for the cache key: a changed file is another data set."""
    for file in files:
        try:
            yield {"text": Path(file).read_bytes().decode("utf-8")}
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {error}") from error


def _are_not_empty(texts: list[str | None]) -> list[bool]:
    return [bool(text and text.strip()) for text in texts]


def _are_on_side(texts: list[str], val_fraction: float, is_val: bool) -> list[bool]:
    return [is_held_out(text, val_fraction) == is_val for text in texts]


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """Every file below `root`, hidden ones and skipped folders left out, sorted by its path within `root`."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _kind(file: Path) -> str | None:
    suffix = file.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in JSON_SUFFIXES:
        return "json"
    return "parquet" if suffix in PARQUET_SUFFIXES else None


def _is_utf8(file: Path) -> bool:
    try:
        file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _escape_glob(name: str) -> str:
    """`load_dataset` reads file names as patterns: brackets, stars and question marks of a real name are escaped."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
