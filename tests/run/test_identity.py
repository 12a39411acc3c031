from pathlib import Path

import pytest

from nvfp4_train.run.identity import choose_run_id, wandb_id


def test_ranks_that_cannot_agree_on_a_run_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another launcher than torchrun, to which nobody gave RUN_ID."""
    for name in ("RUN_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="set RUN_ID to one value on all ranks"):
        choose_run_id()
    monkeypatch.setenv("RUN_ID", "mine")
    assert choose_run_id() == "mine"


def test_folders_of_one_name_have_wandb_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wandb_id("a/run 1") == wandb_id(str(tmp_path / "a" / "run 1")) != wandb_id("b/run 1")
    assert wandb_id("a/run 1").startswith("run-1-")
