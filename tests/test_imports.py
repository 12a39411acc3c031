"""Imports go down only: kernels <- quant <- (models, export) <- module <- callbacks <- run <- launch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nvfp4_train"

FRAMEWORKS = {
    "lightning",
    "hydra",
    "omegaconf",
    "transformers",
    "wandb",
    "wandb_workspaces",
    "tensorboard",
    "datasets",
    "matplotlib",
}
ALLOWED = {
    # room: (rooms of ours, frameworks) that it may import; torch and the standard library are open to all.
    # What a REPL asks for by name, imported then.
    "__init__": ({"models", "quant"}, set()),
    "errors": (set(), set()),
    "metrics": (set(), set()),
    "progress": (set(), set()),
    "finite": (set(), set()),
    "load_errors": (set(), set()),
    "ranks": (set(), set()),
    "sequence_metrics": ({"ranks"}, set()),
    "earlier": (set(), set()),
    "pictures": (set(), {"matplotlib"}),
    "layer_table": ({"disk", "earlier"}, set()),
    "layer_pictures": ({"layer_table", "metrics", "pictures", "quant", "worst_layers"}, {"matplotlib"}),
    "drawing": ({"pictures", "quant"}, {"lightning", "matplotlib", "wandb"}),
    "worst_layers": ({"metrics", "quant"}, set()),
    "loggers": (set(), {"lightning", "wandb", "tensorboard"}),
    "report": (
        {"disk", "layer_pictures", "layer_table", "metrics", "pictures", "quant", "sequence_metrics", "worst_layers", "report"},
        {"matplotlib"},
    ),
    "losses": ({"models", "losses"}, set()),
    "lightning_quirks": (set(), {"lightning"}),
    "parallel": (set(), set()),
    "disk": (set(), set()),
    "checksums": ({"parallel"}, set()),
    "checkpoints": ({"checksums"}, set()),
    "saving": ({"checkpoints", "checksums", "disk"}, set()),
    "plan_sizes": ({"quant", "models"}, {"transformers"}),
    "plan": ({"kernels", "quant", "models", "losses", "plan_sizes"}, {"transformers"}),
    "optim": (set(), set()),
    "kernels": ({"kernels"}, set()),
    "quant": ({"kernels", "quant", "metrics", "ranks"}, set()),
    "models": ({"kernels", "quant", "progress", "load_errors", "models"}, {"transformers"}),
    "data": ({"lightning_quirks", "load_errors", "ranks", "data"}, {"lightning", "transformers", "datasets"}),
    "export": ({"kernels", "quant", "models", "checkpoints", "disk", "parallel", "progress", "export"}, {"transformers"}),
    "strategy": ({"checkpoints", "disk", "saving"}, {"lightning"}),
    "module": (
        {
            "kernels",
            "quant",
            "models",
            "losses",
            "optim",
            "finite",
            "checkpoints",
            "lightning_quirks",
            "sequence_metrics",
            "strategy",
        },
        {"lightning", "transformers"},
    ),
    "callbacks": (
        {
            "kernels",
            "quant",
            "models",
            "losses",
            "disk",
            "export",
            "saving",
            "strategy",
            "lightning_quirks",
            "finite",
            "module",
            "metrics",
            "progress",
            "loggers",
            "drawing",
            "layer_pictures",
            "layer_table",
            "ranks",
            "report",
            "sequence_metrics",
            "callbacks",
        },
        {"lightning", "transformers", "wandb"},
    ),
    # It judges what a run or an export has left, by the numbers that a run reports itself.
    "judge": (
        {
            "kernels",
            "quant",
            "models",
            "losses",
            "export",
            "checkpoints",
            "module",
            "pictures",
            "progress",
            "ranks",
            "sequence_metrics",
            "judge",
        },
        {"transformers"},
    ),
    "run": (
        {
            "ranks",
            "earlier",
            "judge",
            "layer_table",
            "loggers",
            "metrics",
            "quant",
            "sequence_metrics",
            "lightning_quirks",
            "models",
            "losses",
            "checkpoints",
            "saving",
            "disk",
            "export",
            "strategy",
            "data",
            "module",
            "progress",
            "callbacks",
            "plan",
            "run",
        },
        {"lightning", "hydra", "omegaconf", "wandb", "wandb_workspaces"},
    ),
}


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield f"{node.module}"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    rooms, frameworks = ALLOWED[room]
    for name in imported_modules(file):
        top, *rest = name.split(".")
        if top == "nvfp4_train" and rest:
            assert rest[0] in rooms | {"errors"}, f"{room} must not import {name}"
        assert top not in FRAMEWORKS - frameworks, f"{room} must not import {name}"


def users(framework: str) -> set[str]:
    """Files of the package that import it."""
    return {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == framework for name in imported_modules(file))
    }


def test_hydra_and_its_objects_stop_at_one_file() -> None:
    assert users("hydra") == users("omegaconf") == {"run/compose.py"}


def test_triton_is_imported_by_triton_files_only() -> None:
    """Machines without Triton (macOS, Windows) import everything else."""
    assert {Path(name).name for name in users("triton")} == {
        "input_kernels.py",
        "triton_arithmetic.py",
        "triton_kernels.py",
        "triton_scales.py",
        "triton_search.py",
        "multi_tensor_kernels.py",
        "divergence_kernel.py",
        "code_history_kernel.py",
        "statistics_kernels.py",
    }


# Inside export/: (modules of ours, packages) that a room may import; torch and the standard library are open to formats alone.
EXPORT_ROOMS = {
    "formats": ({"nvfp4_train.export.formats", "nvfp4_train.models", "nvfp4_train.quant"}, {"torch"}),
    # compressed_tensors checks the config that it reads, where it is installed.
    "readers": ({"nvfp4_train.export.readers"}, {"numpy", "compressed_tensors"}),
}


@pytest.mark.parametrize(
    "file",
    [file for room in EXPORT_ROOMS for file in sorted((PACKAGE / "export" / room).rglob("*.py"))],
    ids=lambda file: f"{file.parent.name}/{file.name}",
)
def test_readers_share_nothing_with_writers(file: Path) -> None:
    ours, packages = EXPORT_ROOMS[file.parent.name]
    for name in imported_modules(file):
        top = name.split(".")[0]
        is_own = any(name == room or name.startswith(f"{room}.") for room in ours)
        assert is_own or top in packages | sys.stdlib_module_names, f"export/{file.parent.name} must not import {name}"
