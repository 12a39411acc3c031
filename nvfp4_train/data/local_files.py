"""Which files of a local path are read: their kinds, the split that is asked for, and what is passed over.

Every file below a folder is looked at, in linked folders too. Hidden ones are left out; whatever else is not read is named in one line.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import datasets

from nvfp4_train.data.card import Configuration, configurations, split_by
from nvfp4_train.data.file_bytes import COMPRESSIONS, ReadError
from nvfp4_train.data.notices import notice
from nvfp4_train.data.rows import Columns, has_any, sought
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
# Documents whatever their names; but beside tables they are cards, notes and loading scripts.
_NOTES_AND_SCRIPTS = (".md", ".markdown", ".rst", ".py")
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


def find_files(
    path: Path, *, split: str, config_name: str | None, columns: Columns, tells: bool = True
) -> tuple[LocalFile, ...]:
    """The files of `path`, in the order of their names. What is passed over is told where `tells` is true.

    A file that is named outright is read whatever it is called. Of a folder whose files are named as splits, those of `split` are read,
    and files without such a name belong to training. `config_name` is a configuration that its card tells of, or a folder inside of it.
    A .json, .csv or .tsv file of a folder that has none of `columns` is passed over.

    Raises ValueError where nothing is left to read, or the split or the configuration is not there.
    """
    shown = f"data.path={str(path)!r}"
    try:
        path.stat()
    except PermissionError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise ValueError(f"{shown} does not exist; give a file, a folder, a hub dataset or 'python_stdlib'") from error
    if path.is_dir():
        path, configuration = _configured(path, config_name)
        files, notices = _of_folder(path, split, columns, configuration)
        for line in notices if tells else ():
            notice(f"{shown}: {line}")
        return files
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
    # What was read before may lie among what is read.
    cache = os.path.realpath(datasets.config.HF_DATASETS_CACHE)
    while pending:
        for folder, subfolders, names in os.walk(pending.pop(0), onerror=_raise_unreadable):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(
                name
                for name in subfolders
                if name not in skipped and not name.startswith(".") and os.path.realpath(Path(folder, name)) != cache
            )
            if follows_links:
                pending += [link for name in subfolders if (link := Path(folder, name)).is_symlink()]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _raise_unreadable(error: OSError) -> None:
    raise ReadError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


def _configured(root: Path, config_name: str | None) -> tuple[Path, Configuration | None]:
    """(the folder to read, what its card says of the files of the configuration, where it says something)."""
    by_name, default = configurations(root)
    there = f"data.path={str(root)!r} has the configurations {', '.join(by_name)}" if by_name else ""
    if config_name is None:
        if by_name and default is None:
            raise ValueError(f"{there}, by its card; set data.config_name to one of them")
        return root, by_name[default] if default else None
    if config_name in by_name:
        return root, by_name[config_name]
    if (root / config_name).is_dir():
        return root / config_name, None
    raise ValueError(
        "data.config_name is a configuration of a hub dataset, or a folder inside of a local one; got "
        f"data.config_name={config_name!r}, and {there or f'data.path={str(root)!r} has no such folder. Set data.config_name=null.'}"
    )


def _of_folder(
    root: Path, split: str, columns: Columns, configuration: Configuration | None
) -> tuple[tuple[LocalFile, ...], list[str]]:
    """(the files of the folder `root` that are read, lines that say what is not)."""
    shown = f"data.path={str(root)!r}"
    passed_over: list[str] = []
    candidates: list[_Candidate] = []
    paths = dict.fromkeys(walk(root, _SKIPPED_FOLDERS, follows_links=True))
    for path in paths:
        stem, suffix, kind = _parts(path)
        within = PurePosixPath(path.relative_to(root).as_posix())
        if kind == "arrow" and not path.with_name("state.json").exists():
            kind = None
        if path.suffix.lower() in COMPRESSIONS and path.with_suffix("") in paths:
            passed_over.append(f"{within} ({path.stem} is there)")
        elif kind is None or not path.is_file() or path.name.lower() in _DESCRIPTIONS:
            passed_over.append(str(within) if path.exists() else f"{within} (a broken link)")
        else:
            candidates.append(_Candidate(path, within, kind, stem, suffix))
    by_card = {file: split_by(configuration, file.within) for file in candidates} if configuration else {}
    if any(name is not None for name in by_card.values()):
        passed_over += [str(file.within) for file, name in by_card.items() if name is None]
        candidates = [file for file, name in by_card.items() if name is not None]
    candidates = _with_columns(_without_second_names(candidates), columns, passed_over)
    split_of = _split_names(candidates, by_card)
    documents = _without_files_about(split_of, passed_over)
    if not documents:
        raise ValueError(f"the folder {shown} holds no file of a kind that is read: {' '.join(SUFFIXES)}")
    chosen, lines = _of_split({file: split_of[file] for file in documents}, split, shown)
    if passed_over:
        were = "file was" if len(passed_over) == 1 else "files were"
        lines.insert(0, f"{len(passed_over)} {were} not read: {_listed(sorted(passed_over))}")
    real: dict[str, _Candidate] = {}
    for file in chosen:
        real.setdefault(os.path.realpath(file.path), file)
    kinds = Counter(file.kind for file in real.values())
    if "text" in kinds and len(kinds) > 1:
        lines.append(
            f"files of several kinds are read: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
        )
    return tuple(_stamped(file.path, file.kind) for file in real.values()), lines


def _split_names(files: Sequence[_Candidate], by_card: Mapping[_Candidate, str | None]) -> dict[_Candidate, str | None]:
    """The split of each file: what the card says, or its name."""
    names = {
        file: Name(file.within, "" if file.suffix in _NOTES_AND_SCRIPTS else file.stem, file.kind != "text")
        for file in files
        if file.suffix != ".py"
    }
    by_name = dict(zip(names, name_splits(list(names.values())), strict=True))
    return {file: canonical(told) if (told := by_card.get(file)) else by_name.get(file) for file in files}


def _of_split(split_of: Mapping[_Candidate, str | None], split: str, shown: str) -> tuple[list[_Candidate], list[str]]:
    """(the files of `split`, lines that say which others there are)."""
    counts = Counter(split_of.values())
    chosen = choose(split, counts)
    if set(counts) == {None}:
        if chosen is None:
            raise ValueError(
                f"{shown} has no splits: no name of a file or folder tells of one; got data.split={split!r}. Leave it at 'train'."
            )
        return list(split_of), []

    def counted(names: Iterable[str | None]) -> str:
        return ", ".join(f"{name} ({_counted(counts[name])})" for name in sorted(filter(None, names)))

    if chosen is None:
        raise ValueError(
            f"{shown} holds the splits {counted(counts)}, by the names of its files; got data.split={split!r}. Set data.split, or "
            "name a file outright."
        )
    line = f"data.split={split!r} is read, {_counted(sum(counts[name] for name in chosen))}"
    if None in chosen:
        line += f", with {counts[None]} whose name tells of no split"
    if left_out := counted(set(counts) - chosen):
        line += f"; left out: {left_out}"
    if None not in chosen and counts[None]:
        line += f"; {_counted(counts[None])} whose name tells of no split left out"
    files = [file for file, name in split_of.items() if name in chosen]
    return files, [line] if len(files) < len(split_of) else []


def _without_second_names(files: list[_Candidate]) -> list[_Candidate]:
    """`files` without links to files that are among them under a name of their own."""
    links = {file for file in files if file.path.is_symlink()}
    own = {os.path.realpath(file.path) for file in files if file not in links} if links else set()
    return [file for file in files if file not in links or os.path.realpath(file.path) not in own]


def _with_columns(files: list[_Candidate], columns: Columns, passed_over: list[str]) -> list[_Candidate]:
    """`files` without those that are no documents: settings, lists and the like, .json and .csv files that have none of the columns.

    Where nothing else is there, or little, they stay, and reading them tells what is wrong.
    """
    if not columns or len(files) == 1:
        return files
    reasons, broken = {}, {}
    for file in files:
        if file.kind == "text" and "text" not in columns:
            reasons[file] = f"no column {' or '.join(map(repr, sought(columns)))}"
        elif file.kind in ("json", "csv", "tsv"):
            try:
                if not has_any(str(file.path.absolute()), file.kind, columns):
                    reasons[file] = f"no column {' or '.join(map(repr, sought(columns)))}"
            except ReadError:
                broken[file] = f"not readable as {file.kind}"
    others = [file for file in files if file not in reasons and file not in broken]
    if not any(file.kind != "text" for file in others):
        # Among text files these are settings in a dialect of JSON; among tables they are damaged.
        reasons |= broken
        if sum(file.stem.lower() not in _ABOUT for file in others) <= len(reasons):
            return files
    passed_over += [f"{file.within} ({reason})" for file, reason in reasons.items()]
    return [file for file in files if file not in reasons]


def _without_files_about(split_of: Mapping[_Candidate, str | None], passed_over: list[str]) -> list[_Candidate]:
    """The files without those that tell about the others: cards, licences, and the notes and scripts beside tables and splits."""
    files = list(split_of)
    folders = {file.within.parent for file in files if file.kind != "text" or split_of[file]}
    suffixes = Counter(file.suffix for file in files if file.stem.lower() not in _ABOUT)

    def is_about(file: _Candidate) -> bool:
        if file.kind != "text":
            return False
        is_beside = bool(folders) and (file.within.parent in folders or len(file.within.parts) == 1)
        if file.stem.lower() in _ABOUT:
            return is_beside or not suffixes[file.suffix]
        return is_beside and file.suffix in _NOTES_AND_SCRIPTS

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


def _counted(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
