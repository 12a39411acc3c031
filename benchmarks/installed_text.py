"""Technical English that every machine has: the documentation of the installed Python packages and of the standard library.

Docstrings of `.py` files, and the texts that packages ship beside them (`.md`, `.rst`, `.txt`, the description in `METADATA`).
Paragraphs that occur twice are kept once, in the file that comes first, so that no held-out paragraph is trained on.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

HELD_OUT = 32
"""One file of this many, by a hash of its path, is held out."""

TEXT_SUFFIXES = (".md", ".rst", ".txt")
MIN_CHARACTERS = 80
"""Shorter paragraphs are headings, signatures and lists of names."""
MAX_BYTES = 2**20
"""Larger files are data."""
MAX_FILES = 2**14
"""In the order of a hash of their names. They have ten million tokens or so."""
TEXTS_AT_ONCE = 512


def text_of(path: Path) -> str:
    """The documentation in one file; empty where it has none or cannot be read."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.name == "METADATA":
            return content.partition("\n\n")[2]
        return "\n\n".join(docstrings(content)) if path.suffix == ".py" else content
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ""


def docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


def installed_folders() -> list[Path]:
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def documents(folders: Iterable[Path]) -> tuple[list[str], list[str]]:
    """Training and held-out documents, one a file."""
    files = {
        f"{path.relative_to(folder)}": path
        for folder in folders
        for path in folder.rglob("*")
        if (path.suffix in (".py", *TEXT_SUFFIXES) or path.name == "METADATA")
        and path.is_file()
        and path.stat().st_size <= MAX_BYTES
    }
    names = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())[:MAX_FILES]
    with ProcessPoolExecutor() as pool:
        texts = pool.map(text_of, [files[name] for name in names], chunksize=64)
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in zip(names, texts, strict=True):
        paragraphs = [p for p in text.split("\n\n") if len(p) >= MIN_CHARACTERS and p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            parts[is_held_out(name)].append("\n\n".join(paragraphs))
    return parts


def sequences(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.Tensor:
    """The first texts, each ended by the end-of-text token, as rows: int64 [count, length]. Raises ValueError if there are too few."""
    tokens: list[int] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        if len(tokens) >= count * length:
            break
        rows = tokenizer(texts[start : start + TEXTS_AT_ONCE], add_special_tokens=False, verbose=False)["input_ids"]
        tokens += [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    if len(tokens) < count * length:
        raise ValueError(f"{count} sequences of {length} tokens are needed, the installed packages have {len(tokens)} tokens")
    return torch.tensor(tokens[: count * length]).view(count, length)
