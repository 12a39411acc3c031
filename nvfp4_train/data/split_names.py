"""Which split of a data set a file belongs to, by its name and the folders that it lies in.

The names are those that data sets on the hub have: the words train, validation, test and their other forms, set off by what is no
letter. So `train-00000-of-00004.parquet`, `data/my_test_file.jsonl`, `testset.csv` and `dev/a.jsonl` name a split; `latest.jsonl` and
`tests/` do not. Words that mean other things as well, as `tests.jsonl` and `development.jsonl` do, name one as the whole name of a file
beside one for training, or of a folder beside such a folder.

Tables (jsonl, json, csv, parquet): a folder that is called like a split decides, then the name of the file, then a folder with such a
word in its name. In `train_sft-00000-of-00003.parquet`, where the name goes on, `train_sft` is a split of its own; and beside such
files `unsupervised-00000-of-00001.parquet` is one.

Text files are documents, with names of their own: `unit_test.txt` is one. So the whole name must be such a word (`train.txt`,
`test-3.txt`), or what is left of it must be the name of another file of the folder (`wiki.test.tokens` beside `wiki.train.tokens`), or
the folder is called so and lies beside one for training (`train/`, `test/`). For Markdown only the folders count, for sources nothing
does: `testing.md` and `test/a.py` are documents.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
_SPLIT_OF_WORD = {word + tail: split for split, words in _KEYWORDS.items() for word in words for tail in ("", "set", "data")}
_BESIDE_TRAIN = {"tests": "test", "evals": "test", "devel": "validation", "development": "validation"}
"""Words that name a split beside one for training alone."""
_HELD_OUT = re.compile(r"(held|hold)[^a-z]out")
_SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


@dataclass(frozen=True)
class Name:
    """What the split of a file is read from: its path within the folder that is read, and its name without suffixes, or "" for none."""

    path: PurePosixPath
    stem: str
    is_table: bool


def canonical(split: str) -> str:
    """The split's one name: `val`, `dev` and the like are validation."""
    return _SPLIT_OF_WORD.get(_one_word(split), split)


def name_splits(names: Sequence[Name]) -> list[str | None]:
    """The split of each file, or None where neither its name nor a folder says one."""
    tables = [name for name in names if name.is_table]
    texts = [name for name in names if not name.is_table]
    of_tables = {name.path: _split_of_table(name) for name in tables}
    folders_of_splits = {name.path.parent for name in tables if _shard_name(name) and of_tables[name.path]}
    for name in tables:
        if of_tables[name.path] is None and name.path.parent in folders_of_splits:
            of_tables[name.path] = _shard_name(name)
    found = of_tables | _splits_of_texts(texts)
    beside_train = _beside_train(names)
    return [found.get(name.path) or beside_train.get(name.path) for name in names]


def choose(split: str, found: Iterable[str | None]) -> set[str | None] | None:
    """The splits of `found` that `split` asks for; None where it is not there.

    Files without a split, None in `found`, are for training. `train` is also `train_sft`, where that is the only one of its kind.
    """
    named = {name for name in found if name is not None}
    asked = {name for name in named if name in (split, canonical(split))}
    if not asked:
        kin = {name for name in named if (words := _words(name)) and canonical(words[0]) == canonical(split)}
        if len(kin) > 1:
            return None
        asked = kin
    if not asked and (other := _BESIDE_TRAIN.get(split.lower())):
        asked = {other} & named
    without_name = {None} if canonical(split) == "train" and None in found else set()
    return (asked | without_name) or None


def _split_of_table(name: Name) -> str | None:
    folders = name.path.parts[:-1]
    for folder in folders:
        if split := _whole(folder):
            return split
    shard = _shard_name(name)
    words = _words(shard or name.stem)
    if shard and len(words) > 1 and words[0] in _SPLIT_OF_WORD:
        return shard
    if split := _among(words):
        return split
    return next(filter(None, (_among(_words(folder)) for folder in reversed(folders))), None)


def _beside_train(names: Sequence[Name]) -> dict[PurePosixPath, str]:
    """The splits of files that are called, or lie in a folder that is called, as one is only beside `train`."""
    parts = {name.path: [*name.path.parts[:-1], name.stem] for name in names}
    # (what a file or folder called for training lies in, whether it is a folder)
    trains = {
        (tuple(own[:depth]), depth + 1 < len(own))
        for own in parts.values()
        for depth, part in enumerate(own)
        if _whole(part) == "train"
    }
    return {
        path: split
        for path, own in parts.items()
        for depth, part in enumerate(own)
        if (split := _whole(part, _BESIDE_TRAIN)) and (tuple(own[:depth]), depth + 1 < len(own)) in trains
    }


def _splits_of_texts(names: Sequence[Name]) -> dict[PurePosixPath, str]:
    inside: dict[PurePosixPath, dict[PurePosixPath, str]] = {}
    for folder in {folder for name in names for folder in name.path.parents if folder.name}:
        if split := _whole(folder.name):
            inside.setdefault(folder.parent, {})[folder] = split
    of_folder = {
        folder: split
        for folders in inside.values()
        if len(set(folders.values())) > 1 and "train" in folders.values()
        for folder, split in folders.items()
    }
    # What is left of a name without the word, by folder.
    rests: dict[tuple[PurePosixPath, tuple[str, ...]], set[str | None]] = {}
    for name in names:
        rests.setdefault(_rest(name), set()).add(_among(_words(name.stem)))
    found = {}
    for name in names:
        split = next((of_folder[folder] for folder in reversed(name.path.parents) if folder in of_folder), None)
        own = _among(_words(name.stem))
        if split is None and own and (_whole(name.stem) or len(rests[_rest(name)]) > 1):
            split = own
        if split:
            found[name.path] = split
    return found


def _rest(name: Name) -> tuple[PurePosixPath, tuple[str, ...]]:
    return name.path.parent, tuple(word for word in _words(name.stem) if word not in _SPLIT_OF_WORD)


def _shard_name(name: Name) -> str | None:
    shard = _SHARD.fullmatch(name.stem)
    return shard["name"] if shard else None


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", _one_word(name))


def _one_word(name: str) -> str:
    """In lower case, with `held out` as one word."""
    return _HELD_OUT.sub(r"\1out", name.lower())


def _whole(name: str, splits: Mapping[str, str] = _SPLIT_OF_WORD) -> str | None:
    """The split that `name` is called after, numbers aside."""
    words = _words(name)
    return splits.get(words[0]) if len(words) == 1 else None


def _among(words: Iterable[str]) -> str | None:
    """The split among `words`. Where several are named, it is not the one for training."""
    found = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
    return next((split for split in ("test", "validation", "train") if split in found), None)
