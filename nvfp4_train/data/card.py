"""What the card of a data set, the README.md of a hub snapshot, says of its configurations: which files are which split of which.

The card begins with YAML between two lines of dashes. Each entry of its list `configs` has a `config_name`, and `data_files`: a
pattern, a list of them, or a list of {split, path}. Without them, everything in its folder `data_dir` is meant.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

Configuration = list[tuple[str, "re.Pattern[str]"]]
"""(split, pattern of the paths of its files). The split is "" where the card leaves it to the names of the files."""

_FRONT_MATTER = re.compile(r"\s*---\s*\n(?P<yaml>.*?)\n---\s*(\n|\Z)", re.DOTALL)


def configurations(folder: Path) -> tuple[dict[str, Configuration], str | None]:
    """(the configurations of the data set in `folder` by name, the one that is taken without a name). Without a card there is none."""
    try:
        front = _FRONT_MATTER.match((folder / "README.md").read_text(encoding="utf-8"))
        content = yaml.safe_load(front["yaml"]) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        # Without one that can be read, the names of the files tell.
        content = None
    entries = content.get("configs") if isinstance(content, dict) else None
    found: dict[str, Configuration] = {}
    default = None
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or not {"data_files", "data_dir"} & entry.keys():
            continue
        name = str(entry.get("config_name", "default"))
        patterns = list(_patterns(entry.get("data_files", "**"), str(entry.get("data_dir") or "")))
        if patterns:
            found[name] = patterns
            if name == "default" or entry.get("default") is True:
                default = name
    return found, default or (next(iter(found)) if len(found) == 1 else None)


def split_by(configuration: Configuration, path: PurePosixPath) -> str | None:
    """The split of the file at `path` within the folder, "" where its name tells, or None where the configuration does not have it."""
    return next((split for split, pattern in configuration if pattern.fullmatch(path.as_posix())), None)


def _patterns(files: Any, folder: str) -> Iterable[tuple[str, "re.Pattern[str]"]]:
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                yield str(split or ""), _compiled((PurePosixPath(folder) / path).as_posix())


def _compiled(pattern: str) -> "re.Pattern[str]":
    """A pattern of paths: `*` stays within a folder, `**` does not, and `[...]` is one character of several."""
    forms = {"**/": r"(.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[\w!-]+\])", pattern)
    classes = (part.replace("[!", "[^") if re.fullmatch(r"\[[\w!-]+\]", part) else None for part in parts)
    return re.compile("".join(forms.get(part) or of or re.escape(part) for part, of in zip(parts, classes, strict=True)))
