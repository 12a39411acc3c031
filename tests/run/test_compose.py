"""Options of configs/ and recipes/, on copies to which a test adds."""

import shutil
from pathlib import Path

import pytest
from running import ROOT

from nvfp4_train.run.compose import compose_options, groups


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "recipes").mkdir()
    return tmp_path


def test_groups_are_those_of_the_defaults_list(root: Path) -> None:
    """So a new group is a folder of configs/ and a line of configs/train.yaml."""
    config = root / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("  - optim: adamw\n", "  - optim: adamw\n  - new: warm\n"))
    (root / "configs" / "new").mkdir()
    (root / "configs" / "new" / "warm.yaml").write_text("temperature: 1.0\n")
    (root / "recipes" / "colder.yaml").write_text("# Sets an option of the new group.\nnew: {temperature: 0.5}\n")
    before, _ = compose_options(ROOT, ["run_dir=x"])
    options, _ = compose_options(root, ["+recipe=colder", "run_dir=x"])
    assert {*groups(options)} == {*groups(before), "new"} == {*options} - {"seed", "run_dir", "ckpt_path"}
    assert options["new"] == {"temperature": 0.5}
    assert compose_options(root, ["+recipe=colder", "run_dir=x", "new.temperature=0.25"])[0]["new"] == {"temperature": 0.25}


def test_an_unknown_name_at_the_top_of_a_recipe_is_refused(root: Path) -> None:
    (root / "recipes" / "misspelt.yaml").write_text("# A recipe with a slip.\nquannt: {enabled: false}\n")
    with pytest.raises(ValueError, match="(?s)recipe/misspelt.*quannt"):
        compose_options(root, ["+recipe=misspelt", "run_dir=x"])


def test_interpolations_are_resolved_or_left_as_they_are_written() -> None:
    options, written = compose_options(
        ROOT, ["trainer=hsdp", "trainer.strategy.replicate_size=2", "run_dir=a/b", "logger=wandb"]
    )
    assert options["logger"]["wandb"]["name"] == "b"
    assert written["logger"]["wandb"]["name"] == "${basename:${run_dir}}"
    assert isinstance(options["trainer"]["devices"], int)
    assert "LOCAL_WORLD_SIZE" in written["trainer"]["devices"]
