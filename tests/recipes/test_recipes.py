"""Every recipe that we ship composes and trains two steps, shrunk, through the real launcher."""

from pathlib import Path

import pytest
import yaml
from running import ROOT, launch, metrics

from nvfp4_train.checkpoints import saved_step

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_two_steps(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch(
        run_dir, f"+recipe={recipe.stem}", "trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1",
        "quant.start_step=1", "model.path=null", "model.config.vocab_size=272",
    )  # fmt: skip
    found = metrics(run_dir)
    assert found["step"] == saved_step(run_dir / "checkpoints" / "last.ckpt") == 2
    for name in ("val/loss_quantized", "val/loss_ptq", "train/tokens_per_s", "quant/sqnr_db", "export/bits_per_weight"):
        assert found[name] > 0, name
    for name in ("loss_master", "loss_quantized_w4a16", "loss_quantized_w4a4", "loss_ptq_w4a16", "loss_ptq_w4a4"):
        # A student of random weights is its own teacher until it is quantized.
        assert found[f"val/{name}"] >= 0, name
    assert (run_dir / "export" / "config.json").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_holds_only_deltas(recipe: Path) -> None:
    """A recipe says what it is in its first line, and repeats no default of the groups that it uses."""
    text = recipe.read_text()
    assert text.startswith("# ")
    content = yaml.safe_load(text)
    chosen = {"model": "tiny", "data": "text", "quant": "nvfp4", "optim": "adamw", "trainer": "cpu", "callbacks": "default"}
    for entry in content.pop("defaults", []):
        ((group, option),) = entry.items()
        chosen[group.removeprefix("override /")] = option
    for group, values in content.items():
        if not isinstance(values, dict):
            continue
        option = yaml.safe_load((ROOT / "configs" / group / f"{chosen[group]}.yaml").read_text())
        base = yaml.safe_load((ROOT / "configs" / group / "default.yaml").read_text()) if group == "trainer" else {}
        for name, value in values.items():
            assert (base | option).get(name) != value, f"{group}.{name} repeats the default"
