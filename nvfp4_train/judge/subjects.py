"""What there is to judge: from what a command line names to what it is, found by looking at it.

[LABEL@]PATH                              a Hugging Face folder or hub name in bf16; a folder that an export or a conversion wrote;
                                          a checkpoint, file or sharded; or the folder of a run, for its newest checkpoint
[LABEL@]ptq:PATH [quant.OPTION=VALUE ...] a bf16 model that is calibrated and quantized on the fly
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from nvfp4_train.checkpoints import (
    UNREADABLE,
    WEIGHTS_ONLY,
    first_line,
    inspect_checkpoint,
    is_sharded_checkpoint,
    newest_complete,
    read_unsharded,
)
from nvfp4_train.export.packed_folder import FORMAT_OF_METHOD, format_of
from nvfp4_train.export.registry import find_reader
from nvfp4_train.models.architecture import config_of, read_config, read_exported_config
from nvfp4_train.models.causal_lm import ModelConfig, load_config, looks_local

BF16, PTQ, CHECKPOINT, EXPORT = "bf16", "ptq", "checkpoint", "export"
"""Kinds of models."""

_GIVEN = re.compile(r"(?:(?P<label>[^@/:=\s]+)@)?(?P<ptq>ptq:)?(?P<path>.*?)(?P<options>(?:\s+[\w.+~]+=\S*)*)", re.DOTALL)
_OPTION = "quant."


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to judge."""

    label: str
    given: str
    """As on the command line."""
    kind: str
    path: str
    """A folder, a hub name, or a checkpoint."""
    options: tuple[str, ...] = ()
    """Those of quant.*, as OPTION=VALUE, for this model alone."""
    found: str
    """What was found, in words."""
    tokenizer: str | None
    """Where its tokenizer lies, if it has one."""


def find_subject(given: str) -> Subject:
    """Look at what a model is. Raises ValueError where it is none that can be judged. Reads no weights."""
    match = _GIVEN.fullmatch(given.strip())
    assert match is not None
    path, options = match["path"].strip(), tuple(match["options"].split())
    if not path:
        raise ValueError(f"model={given!r} must name a folder, a checkpoint or a hub name, got none")
    if match["ptq"]:
        other, where, _ = _kind_of(path)
        kind, found = PTQ, "bf16 model, quantized on the fly"
        if other != BF16:
            raise ValueError(f"model={given!r}: ptq: takes a model in bf16, got one that is quantized ({other})")
    else:
        kind, where, found = _kind_of(path)
    for option in options:
        if kind != PTQ or not option.startswith(_OPTION):
            raise ValueError(f"model={given!r}: options of one model are those of quant.* of a ptq: model, got {option}")
    label = match["label"] or _label(kind, where, options)
    return Subject(
        label=label, given=given, kind=kind, path=where, options=options, found=found, tokenizer=_tokenizer(kind, where)
    )


def find_subjects(given: Sequence[str]) -> list[Subject]:
    """`find_subject` of each. Raises ValueError where two have one label."""
    subjects = [find_subject(one) for one in given]
    labels = [subject.label for subject in subjects]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"models must have different names, got {label} twice; give them some: model=NAME@PATH")
    return subjects


def config_of_subject(subject: Subject, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model. Raises ValueError where it cannot be read, or its own code is not trusted."""
    if subject.kind in (BF16, PTQ):
        return load_config(ModelConfig(path=subject.path, trust_remote_code=trust_remote_code))
    try:
        if subject.kind == EXPORT:
            if trust_remote_code:
                read_config(subject.path, trust_remote_code=True)
            settings = json.loads((Path(subject.path) / "config.json").read_text())
            find_reader(format_of(Path(subject.path))).check_config(Path(subject.path), settings)
            return read_exported_config(Path(subject.path))
        saved = read_unsharded(Path(subject.path))["hyper_parameters"]["export"]["config"]
        return config_of(saved, Path(subject.path).parent / "tokenizer", trust_remote_code=trust_remote_code)
    except (OSError, *UNREADABLE) as error:
        # The errors of a damaged file have no words of their own.
        said = error if isinstance(error, ValueError) else f"is no checkpoint of a quantized run ({first_line(error)})"
        raise ValueError(f"{subject.path}: {said}") from error


def _kind_of(path: str) -> tuple[str, str, str]:
    """Kind, path and description of what lies at a path."""
    here = Path(path).expanduser()
    if here.is_file() or is_sharded_checkpoint(here):
        return _checkpoint(here)
    if (here / "config.json").is_file():
        method = _quant_method(here)
        if method in FORMAT_OF_METHOD:
            return EXPORT, str(here), f"exported folder ({FORMAT_OF_METHOD[method]})"
        return BF16, str(here), "bf16 folder" if method is None else f"folder in {method}, decoded to bf16"
    if here.is_dir():
        newest, _ = newest_complete(here / "checkpoints", verify=False)
        if newest is not None:
            return _checkpoint(newest)
        if (here / "export" / "config.json").is_file():
            return _kind_of(str(here / "export"))
        raise ValueError(
            f"model={path!r} must be a folder with a config.json, a checkpoint, or the folder of a run with checkpoints/ or export/; "
            "this folder has none of them"
        )
    if looks_local(path):
        raise ValueError(f"model={path!r} does not exist")
    return BF16, path, "hub name, in bf16"


def _checkpoint(path: Path) -> tuple[str, str, str]:
    facts = inspect_checkpoint(path, verify=False)
    if facts.fault not in (None, WEIGHTS_ONLY):
        raise ValueError(f"{facts}")
    return CHECKPOINT, str(path), f"checkpoint of step {facts.step}"


def _quant_method(folder: Path) -> str | None:
    try:
        settings: Any = json.loads((folder / "config.json").read_text())
        return (settings.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/config.json does not load: {error}") from error


def _label(kind: str, path: str, options: Sequence[str]) -> str:
    where = Path(path)
    if kind == CHECKPOINT and where.parent.name == "checkpoints":
        return f"{where.absolute().parent.parent.name}/{where.stem}"
    if kind == EXPORT and where.name.startswith("export"):
        return f"{where.absolute().parent.name}/{where.name}"
    if kind == PTQ:
        return " ".join([f"ptq:{where.name}", *(option.removeprefix(_OPTION) for option in options)])
    return where.name or str(where.absolute())


def _tokenizer(kind: str, path: str) -> str | None:
    """The place of a model's tokenizer; whether there is one is found out when it is read."""
    if kind != CHECKPOINT:
        return path
    beside = Path(path).parent / "tokenizer"
    return str(beside) if beside.is_dir() else None
