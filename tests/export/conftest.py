import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from export_models import Trained, trained


@pytest.fixture(scope="session")
def cases() -> Callable[[str], Trained]:
    """A model of CASES by name, built once."""
    built: dict[str, Trained] = {}

    def case(name: str) -> Trained:
        if name not in built:
            built[name] = trained(name)
        return built[name]

    return case


@pytest.fixture(scope="session")
def exported(cases: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported folder of a case, written once; tests only read it."""
    root = tmp_path_factory.mktemp("exports")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            cases(name).export(root / name)
        return root / name

    return folder


@pytest.fixture
def own_copy(exported: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an exported folder that a test may spoil."""
    return lambda name: Path(shutil.copytree(exported(name), tmp_path / name))
