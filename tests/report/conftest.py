from pathlib import Path

import pytest
from running import REPORTED, launch

OPTIONS = (
    "loss=distillation",
    "quant.activations=nvfp4",
    "quant.start_step=3",
    "optim.lr=1e-3",
    "trainer.max_steps=9",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "callbacks.scale_stats.every_n_steps=3",
)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a small run with a report, which tests only read."""
    run_dir = tmp_path_factory.mktemp("reported") / "run"
    return run_dir, launch(run_dir, *OPTIONS, small=REPORTED).stdout
