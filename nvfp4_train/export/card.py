"""The model card of a folder: README.md, from what is known of a run and of the folder. What is not known is left out.

The part that depends on the format lies between two marks, so that a conversion can replace it and keep all else.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from nvfp4_train.quant import policy

FILE = "README.md"
BEGIN, END = "<!-- nvfp4_train: format -->", "<!-- nvfp4_train: end of format -->"
PACKAGES = ("nvfp4_train", "torch", "transformers", "compressed-tensors")
SERVINGS = {activations: name.upper() for name, activations in policy.SERVINGS.items()}
"""What is done to inputs -> the name of the serving."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Held-out numbers of a run at one moment."""

    label: str
    numbers: Mapping[str, float]
    """By the name of a column: `loss`, `kl`, `top1_agreement`."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run knows of its model. An export of a checkpoint knows less."""

    base_model: str | None = None
    """A hub name or a path; of a path only its last part is written."""
    command: Sequence[str] = ()
    """The launcher and its options; paths and what concerns this machine alone are left out."""
    method: str | None = None
    equalization: str | None = None
    steps: int | None = None
    """Optimizer steps."""
    start_step: int | None = None
    """The step from which on the forward was quantized."""
    tokens: int | None = None
    """Tokens of all ranks that were trained on."""
    stages: Sequence[Stage] = ()


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """What an export knows of the folder that it wrote."""

    format: str
    architecture: str
    """The class of transformers that loads it."""
    activations: str
    """`none` or `nvfp4`."""
    checked: Sequence[str]
    """What has checked the folder, and how."""
    note: str | None = None
    """What the format has to say about its readers; FOLDER stands for the folder."""
    scale_rule: str | None = None
    size: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def card(run: RunFacts, folder: FolderFacts) -> str:
    """The text of README.md."""
    serving = SERVINGS[folder.activations]
    base = None if run.base_model is None else public_name(run.base_model)
    inputs = "inputs of quantized linears too, with static input scales" if folder.activations == "nvfp4" else "weights alone"
    trained = None
    if run.steps:
        tokens = "" if run.tokens is None else f", {run.tokens:,} tokens"
        start = f", quantized from step {run.start_step} on" if run.start_step else ""
        trained = f"{run.steps:,} optimizer steps{tokens}{start}"
    rows = {
        "base model": base,
        "method": run.method,
        "command": f"`{shlex.join(public_command(run.command))}`" if run.command else None,
        "training": trained,
        "equalization": run.equalization,
        "quantized": f"{serving}: {inputs}",
        "scale rule": folder.scale_rule,
        "size": folder.size,
        "versions": ", ".join(f"{name} {version}" for name, version in folder.versions.items()) or None,
    }
    parts = [
        _front_matter(base, folder.format, serving),
        f"# {base or 'A model'} in NVFP4 ({serving})\n\n"
        "4-bit floating point (E2M1) in blocks of 16 with E4M3 block scales, written by nvfp4_train. Everything that is not listed as "
        "quantized is in the dtype in which the original is served.",
        "## How it was made\n\n" + _table(("", ""), [(name, value) for name, value in rows.items() if value]),
    ]
    if run.stages:
        parts.append("## What was measured\n\n" + _measured(run.stages))
    parts.append(format_section(folder.format, folder.architecture, folder.activations, folder.checked, folder.note))
    return "\n\n".join(parts) + "\n"


def format_section(format: str, architecture: str, activations: str, checked: Sequence[str], note: str | None) -> str:
    """The part of a card that a conversion replaces, with its marks."""
    known = _FORMATS.get(format)
    parts = []
    if known is not None:
        lines = list(known.commands)
        if known.transformers and note is None:
            lines.append(("transformers", known.transformers.format(architecture=architecture)))
        parts.append("## How to serve it\n\n" + "\n".join(f"- {reader}: `{line}`" for reader, line in lines))
    if note is not None:
        parts.append(note[0].upper() + note[1:] + ".")
    if known is not None and known.kernels:
        kernels = "\n".join(f"- {line}" for line in known.kernels[activations])
        parts.append(f"## What computes on which GPU\n\nAs read in vLLM 0.33, SGLang 0.5.23 and TensorRT-LLM:\n\n{kernels}")
    parts.append("## Which readers were checked\n\n" + "\n".join(f"- {line}" for line in checked))
    return "\n\n".join([BEGIN, *parts, END])


def adapted(text: str, old: str, new: str, section: str) -> str | None:
    """A card of a folder in the format `old` for the same folder in another; None where the text has no part that depends on it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return None
    for own, other in zip(_format_lines(old), _format_lines(new), strict=True):
        before = before.replace(f"{own}\n", f"{other}\n", 1)
    return before + section + after


def serve_commands(format: str, folder: str) -> list[tuple[str, str]]:
    """Readers of a folder, each with the line that serves it."""
    known = _FORMATS.get(format)
    return [(reader, line.replace("FOLDER", shlex.quote(folder))) for reader, line in known.commands] if known else []


def installed_versions() -> dict[str, str]:
    """Versions of what made the folder, of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def public_name(model: str) -> str:
    """A hub name, or the last part of a path."""
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model or Path(model).exists()
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] if is_path else model


def public_command(command: Sequence[str]) -> list[str]:
    """A command without what concerns one machine or one run alone, and with the last part of each path."""
    return [_without_paths(part) for part in command if not _PRIVATE.match(part)]


_PRIVATE = re.compile(r"[+~]*(run_dir|ckpt_path|logger|hydra|callbacks)\b[^=]*(=|$)")
_PATH = re.compile(r"(?<![\w.:-])(?:~|\.{1,2})?/[^\s,\]}'\"]*")


def _without_paths(part: str) -> str:
    name, equals, value = part.partition("=")
    if not equals:
        return part
    value = _PATH.sub(lambda found: public_name(found.group()), value)
    return f"{name}={public_name(value) if '/' in value and Path(value).exists() else value}"


@dataclass(frozen=True, kw_only=True)
class _FormatFacts:
    library: str
    tag: str
    commands: Sequence[tuple[str, str]]
    transformers: str | None
    kernels: Mapping[str, Sequence[str]] = field(default_factory=dict)


_VLLM = {
    "none": "vLLM: weight-only; CuTe-DSL on SM100 and SM103, Marlin on other GPUs from SM75 on",
    "nvfp4": "vLLM: FP4 products of weights and inputs (W4A4) on SM100, SM103 and SM12x; on other GPUs from SM75 on weight-only by "
    "Marlin, where inputs stay in bf16",
}
_SGLANG = {
    "none": "SGLang: weight-only by Marlin, from SM80 on",
    "nvfp4": "SGLang: FP4 products (W4A4) from SM100 on, by Marlin weight-only below",
}
_FORMATS = {
    "compressed_tensors": _FormatFacts(
        library="transformers",
        tag="compressed-tensors",
        commands=(("vLLM", "vllm serve FOLDER"), ("SGLang", "python -m sglang.launch_server --model-path FOLDER")),
        transformers='{architecture}.from_pretrained("FOLDER", dtype="bfloat16")',
        kernels={
            name: (_VLLM[name], _SGLANG[name], f"transformers: bf16 on every device, of decoded weights{inputs}")
            for name, inputs in (("none", ""), ("nvfp4", "; inputs are rounded to NVFP4 before each product"))
        },
    ),
    "modelopt": _FormatFacts(
        library="Model Optimizer",
        tag="modelopt",
        commands=(
            ("TensorRT-LLM", "trtllm-serve FOLDER"),
            ("vLLM", "vllm serve FOLDER"),
            ("SGLang", "python -m sglang.launch_server --model-path FOLDER"),
        ),
        transformers=None,
        kernels={
            "none": ("TensorRT-LLM: weight-only (`W4A16_NVFP4`)", _VLLM["none"], _SGLANG["none"]),
            "nvfp4": ("TensorRT-LLM: FP4 products (W4A4) on Blackwell", _VLLM["nvfp4"], _SGLANG["nvfp4"]),
        },
    ),
    "bf16": _FormatFacts(
        library="transformers",
        tag="bf16",
        commands=(("vLLM", "vllm serve FOLDER"),),
        transformers='{architecture}.from_pretrained("FOLDER", dtype="bfloat16")',
        kernels={
            name: (f"every reader: bf16 products of the decoded weights{inputs}",)
            for name, inputs in (("none", ""), ("nvfp4", ", whose inputs are not quantized here"))
        },
    ),
}


def _format_lines(format: str) -> tuple[str, str]:
    """Lines of the front matter that depend on the format."""
    known = _FORMATS.get(format)
    return (f"library_name: {known.library}", f"- {known.tag}") if known else ("library_name: transformers", f"- {format}")


def _front_matter(base: str | None, format: str, serving: str) -> str:
    library, tag = _format_lines(format)
    of_base = []
    if base is not None:
        name = base if re.fullmatch(r"[\w./-]+", base) else json.dumps(base)
        of_base = [f"base_model: {name}", "base_model_relation: quantized"]
    return "\n".join(["---", *of_base, library, "tags:", "- nvfp4", tag, f"- {serving.lower()}", "---"])


def _measured(stages: Sequence[Stage]) -> str:
    columns = {
        "loss": "loss",
        "kl": "KL to the original, nats a token",
        "top1_agreement": "same most likely token",
    }
    known = [name for name in columns if any(name in stage.numbers for stage in stages)]
    rows = [
        (stage.label, *(f"{stage.numbers[name]:.5g}" if name in stage.numbers else "" for name in known)) for stage in stages
    ]
    return "On held-out text:\n\n" + _table(("", *(columns[name] for name in known)), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
