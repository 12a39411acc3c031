"""Which files of a local path are read: their kinds, the split that is asked for, and what is passed over.

Every file below a folder is looked at, in linked folders too. Hidden ones are left out; whatever else is not read is named in one line.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nvfp4_train.data.notices import notice
from nvfp4_train.data.reading import COMPRESSIONS, ReadError
from nvfp4_train.data.rows import Columns, has_any
from nvfp4_train.data.split_names import Name, canonical, choose, name_splits

KINDS = {
    "text": (".txt", ".text", ".tokens", ".md", ".markdown", ".rst", ".py"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
"""Suffixes of files that are read. All but the last two kinds may be compressed: `.jsonl.gz`."""

SUFFIXES = tuple(suffix for suffixes in KINDS.values() for suffix in suffixes)

_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
_NEVER_COMPRESSED = ("parquet", "arrow")
# Files of a data set that describe it, in the layout of the hub and of `save_to_disk`.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_ABOUT = {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "requirements"}
# Beside tables, these are cards, notes and loading scripts.
_BESIDE_TABLES = (".md", ".markdown", ".rst", ".py")
_SKIPPED_FOLDERS = {"__pycache__", "__MACOSX"}
_MOST_NAMES = 8


@dataclass(frozen=True)
class LocalFile:
    """A file that is read. Its size and time of change are part of the key under which its rows are cached."""

    path: str
    kind: str
    size: int
    changed_ns: int


@dataclass(frozen=True)
class _Candidate:
    """A file of a kind that is read."""

    path: Path
    within: PurePosixPath
    kind: str
    stem: str
    suffix: str


def find_files(path: Path, *, split: str, config_name: str | None, columns: Columns) -> tuple[LocalFile, ...]:
    """The files of `path`, in the order of their names.

    A file that is named outright is read whatever it is called. Of a folder whose files are named as splits, those of `split` are read,
    and files without such a name belong to training. `config_name` is a folder inside of it. A .json, .csv or .tsv file of a folder
    that has none of `columns` is passed over.

    Raises ValueError where nothing is left to read, or the split or the configuration is not there.
    """
    shown = f"data.path={str(path)!r}"
    if not path.exists():
        raise ValueError(f"{shown} does not exist; give a file, a folder, a hub dataset or 'python_stdlib'")
    if path.is_dir():
        if config_name is not None:
            if not (path / config_name).is_dir():
                raise ValueError(
                    f"data.config_name is a configuration of a hub dataset, or a folder inside of a local one; got "
                    f"data.config_name={config_name!r}, and {shown} has no such folder. Set data.config_name=null."
                )
            path = path / config_name
        return _of_folder(path, f"data.path={str(path)!r}", split, columns)
    if not path.is_file():
        raise ValueError(f"{shown} must be a file or a folder; it is a device, a socket or a pipe")
    stem, _, kind = _parts(path)
    (named,) = name_splits([Name(PurePosixPath(path.name), stem, is_table=True)])
    if config_name is not None or (canonical(split) != "train" and canonical(split) != named):
        raise ValueError(
            f"data.split and data.config_name choose a part of a folder or a hub dataset, and {shown} is one file; got "
            f"data.split={split!r}, data.config_name={config_name!r}. Leave them at 'train' and null."
        )
    return (_stamped(path, kind or "unknown"),)


def is_named_as_data(path: str) -> bool:
    """Whether the suffix of `path` is that of a file that is read."""
    return _parts(Path(path))[2] is not None


def text_files(paths: Iterable[Path]) -> tuple[LocalFile, ...]:
    """`paths` as text files, one document each."""
    return tuple(_stamped(path, "text") for path in paths)


def walk(root: Path, skipped: set[str], *, follows_links: bool) -> list[Path]:
    """Every file below `root`, hidden ones and skipped folders left out, sorted by its path within `root`.

    Folders come once: a link to one that is there already, or to one above, is not followed. Real folders come before links, so
    a file has the name that it was given.
    """
    found, seen, pending = [], set(), [root]
    while pending:
        for folder, subfolders, names in os.walk(pending.pop(0), onerror=_raise_unreadable):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if name not in skipped and not name.startswith("."))
            if follows_links:
                pending += [link for name in subfolders if (link := Path(folder, name)).is_symlink()]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _raise_unreadable(error: OSError) -> None:
    raise ReadError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


def _of_folder(root: Path, shown: str, split: str, columns: Columns) -> tuple[LocalFile, ...]:
    passed_over: list[str] = []
    candidates: list[_Candidate] = []
    for path in _without_second_names(walk(root, _SKIPPED_FOLDERS, follows_links=True)):
        stem, suffix, kind = _parts(path)
        within = PurePosixPath(path.relative_to(root).as_posix())
        if kind is None or not path.is_file() or path.name.lower() in _DESCRIPTIONS:
            passed_over.append(str(within) if path.exists() else f"{within} (a broken link)")
        else:
            candidates.append(_Candidate(path, within, kind, stem, suffix))
    candidates = _with_columns(candidates, columns, passed_over)
    splits = name_splits([Name(file.within, file.stem, file.kind != "text") for file in candidates])
    documents = _without_files_about(candidates, any(splits), passed_over)
    if passed_over:
        notice(f"{shown}: {_counted(len(passed_over), 'file')} not read: {_listed(sorted(passed_over))}")
    if not documents:
        raise ValueError(f"the folder {shown} holds no file of a kind that is read: {' '.join(SUFFIXES)}")
    split_of = {file.within: name for file, name in zip(candidates, splits, strict=True)}
    documents = _of_split(documents, [split_of[file.within] for file in documents], split, shown)
    real: dict[str, _Candidate] = {}
    for file in documents:
        real.setdefault(os.path.realpath(file.path), file)
    kinds = Counter(file.kind for file in real.values())
    if len(kinds) > 1:
        notice(f"{shown}: read are " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) + " files")
    return tuple(_stamped(file.path, file.kind) for file in real.values())


def _of_split(files: Sequence[_Candidate], splits: Sequence[str | None], split: str, shown: str) -> list[_Candidate]:
    counts = Counter(splits)
    chosen = choose(split, splits)
    if set(counts) == {None}:
        if canonical(split) != "train":
            raise ValueError(
                f"{shown} names no split in the names of its files or folders; got data.split={split!r}. Leave it at 'train'."
            )
        return list(files)
    there = ", ".join(f"{name} ({_counted(counts[name], 'file')})" for name in sorted(filter(None, counts)))
    if chosen is None:
        raise ValueError(f"{shown} holds the splits {there}, by the names of its files; got data.split={split!r}")
    left_out = ", ".join(f"{name} ({_counted(counts[name], 'file')})" for name in sorted(filter(None, set(counts) - chosen)))
    without = f"; {_counted(counts[None], 'file')} without a split in the name taken as training text" if None in chosen else ""
    without = without or (f"; {_counted(counts[None], 'file')} without a split in the name left out" if counts[None] else "")
    if left_out or without:
        notice(
            f"{shown}: data.split={split!r} takes {_counted(sum(counts[name] for name in chosen), 'file')}"
            f"{'; left out ' + left_out if left_out else ''}{without}"
        )
    return [file for file, name in zip(files, splits, strict=True) if name in chosen]


def _without_second_names(paths: list[Path]) -> list[Path]:
    """`paths` without links to files that are among them under a name of their own."""
    own = {os.path.realpath(path) for path in paths if not path.is_symlink()}
    return [path for path in paths if not path.is_symlink() or os.path.realpath(path) not in own]


def _with_columns(files: list[_Candidate], columns: Columns, passed_over: list[str]) -> list[_Candidate]:
    """`files` without settings and lists that are no documents: .json and .csv files that have none of the columns."""
    if not columns or len(files) == 1:
        return files
    reasons, broken = {}, {}
    for file in files:
        if file.kind in ("json", "csv", "tsv"):
            try:
                if not has_any(str(file.path.absolute()), file.kind, columns):
                    reasons[file.within] = f"no column {' or '.join(map(repr, columns))}"
            except ReadError:
                broken[file.within] = "no JSON of rows" if file.kind == "json" else f"no {file.kind.upper()}"
    if all(file.kind == "text" or file.within in reasons or file.within in broken for file in files):
        # Among text files, these are settings in a dialect of JSON; among tables they are damaged, which reading them says.
        reasons |= broken
    if len(reasons) == len(files):
        return files
    passed_over += [f"{within} ({reason})" for within, reason in reasons.items()]
    return [file for file in files if file.within not in reasons]


def _without_files_about(files: list[_Candidate], has_splits: bool, passed_over: list[str]) -> list[_Candidate]:
    """`files` without those that tell about the others: cards, licences, and notes and scripts beside tables."""
    folders = {file.within.parent for file in files if file.kind != "text"}
    suffixes = Counter(file.suffix for file in files if file.stem.lower() not in _ABOUT)

    def is_about(file: _Candidate) -> bool:
        if file.kind != "text":
            return False
        is_beside = bool(folders) and (file.within.parent in folders or len(file.within.parts) == 1)
        if file.stem.lower() in _ABOUT:
            return is_beside or has_splits or not suffixes[file.suffix]
        return file.suffix in _BESIDE_TABLES and is_beside

    kept = [file for file in files if not is_about(file)]
    if not kept:
        return files
    passed_over += [str(file.within) for file in files if is_about(file)]
    return kept


def _parts(path: Path) -> tuple[str, str, str | None]:
    """(name of a file without suffixes, its suffix before that of a compression, the kind of file that this is)."""
    is_compressed = path.suffix.lower() in COMPRESSIONS
    name = PurePosixPath(path.stem if is_compressed else path.name)
    suffix = name.suffix.lower()
    kind = _KIND_OF_SUFFIX.get(suffix)
    return name.stem, suffix, None if is_compressed and kind in _NEVER_COMPRESSED else kind


def _stamped(path: Path, kind: str) -> LocalFile:
    status = path.stat()
    return LocalFile(str(path.absolute()), kind, status.st_size, status.st_mtime_ns)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
