import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from running import launch
from six_steps import STEPS, dump, trainer


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of the run that nothing interrupts, in one process (0 ranks) or by two ranks."""

    @functools.cache
    def run(ranks: int) -> Path:
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        launch(run_dir, *STEPS, "callbacks.checkpoint.every_n_train_steps=3", trainer(ranks), *dump(run_dir), ranks=ranks)
        return run_dir

    return run
