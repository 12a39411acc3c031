"""The options of launch/evaluate.py beside the models: those of configs/evaluate.yaml, which says what they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvfp4_train.judge.measure import ALL
from nvfp4_train.judge.results import Limits
from nvfp4_train.models.causal_lm import COMPUTE_DTYPES
from nvfp4_train.quant.policy import SERVINGS, QuantConfig
from nvfp4_train.run.compose import compose_options, make
from nvfp4_train.run.options import check_options, check_targets

CONFIG = "evaluate"
DOMAINS = "domains."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checked, as plain data."""

    data: dict
    quant: dict
    servings: Sequence[str]
    domains: dict
    fail_if: dict
    tasks: Sequence[str]
    tasks_path: str | None
    task_limit: int | None
    run_dir: str
    output: str
    keep_sequences: bool
    device: str
    compute_dtype: str
    attn_implementation: str | None
    trust_remote_code: bool
    seed: int

    def __post_init__(self) -> None:
        if not self.servings or set(self.servings) - SERVINGS.keys():
            raise ValueError(f"servings must be some of {', '.join(SERVINGS)}, got {list(self.servings)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.compute_dtype not in ("auto", *COMPUTE_DTYPES):
            raise ValueError(f"compute_dtype must be auto, bfloat16 or float32, got {self.compute_dtype!r}")
        if self.task_limit is not None and self.task_limit < 1:
            raise ValueError(f"task_limit must be at least 1, or null, got {self.task_limit}")
        if Path(self.output).is_dir():
            raise ValueError(f"output must be a file, got the folder {self.output}")
        if ALL in self.domains:
            raise ValueError(f"domains must not have the name {ALL}, which is that of all texts together")


def override(argument: str) -> str:
    """As Hydra takes an argument of the command line: domains have names that no config knows, and `Limits` knows its own. With a
    + before it or without.

    domains.NAME=PATH is domains.NAME.path=PATH, so that options of the text may stand beside it.
    """
    name, equals, value = argument.lstrip("+").partition("=")
    is_open = name == "tasks" or name.startswith((DOMAINS, "fail_if."))
    if name.startswith(DOMAINS) and name.count(".") == 1 and not value.startswith("{"):
        return f"++{name}.path{equals}{value}"
    return f"++{name}{equals}{value}" if is_open else argument


def read_options(root: Path, overrides: Sequence[str]) -> Options:
    """Raises ValueError for a command line that cannot be composed, or an option that is none or out of range."""
    composed, _ = compose_options(root, overrides, CONFIG)
    if isinstance(composed.get("tasks"), str):
        composed["tasks"] = [composed["tasks"]]
    check_targets(composed)
    check_options(Options, composed, CONFIG)
    check_options(Limits, composed["fail_if"], "fail_if")
    return Options(**composed)


def read_quant(root: Path, overrides: Sequence[str]) -> QuantConfig:
    """How a model is quantized on the fly. Raises ValueError as `read_options` does."""
    composed, _ = compose_options(root, overrides, CONFIG)
    check_targets(composed["quant"], "quant")
    return make(composed["quant"], "quant")
