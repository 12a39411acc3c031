"""Files of a model folder beside weights, configs and tokenizer: of processors, chat templates and the model's own code."""

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "tiktoken.model",
    "*.tiktoken",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Other forms of a tokenizer, which some readers prefer to tokenizer.json."""
CODE_FILES = ("*.py", "*/*.py")


def copy_side_files(
    source: str | os.PathLike, target: Path, *, tokenizer: PreTrainedTokenizerBase | None, code: bool
) -> list[str]:
    """Copy what `target` has not yet, `code` too if it is the model's own. Returns the names.

    Forms of a tokenizer are copied only if `tokenizer` is that of the source. Raises OSError where a hub name cannot be reached.
    """
    is_own_tokenizer = tokenizer is not None and os.path.realpath(tokenizer.name_or_path) == os.path.realpath(source)
    patterns = (*PROCESSOR_FILES, *(TOKENIZER_FILES if is_own_tokenizer else ()), *(CODE_FILES if code else ()))
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    copied = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.count("/") > 1 or not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if not (target / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
            copied.append(name)
    return copied
