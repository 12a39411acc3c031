"""Every recipe that we ship composes and trains two steps, shrunk, through the real launcher."""

from pathlib import Path

import pytest
import yaml
from running import ROOT, SMALL_MODEL, SMALL_RUN, launch, metrics

from nvfp4_train.checkpoints import saved_step

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

SHRUNK = {
    "gemma3_12b": [
        *(f"text_config.{field}" for field in (*SMALL_MODEL, "head_dim=16", "vocab_size=272", "sliding_window=32")),
        *(f"vision_config.{field}" for field in SMALL_MODEL[:-1]),
        "vision_config.image_size=32",
        "vision_config.patch_size=8",
        "mm_tokens_per_image=4",
    ],
    "qwen3_30b_a3b": [*SMALL_MODEL, "vocab_size=272", "num_experts=8", "moe_intermediate_size=32"],
    "gpt_oss_20b": [*SMALL_MODEL, "vocab_size=272", "pad_token_id=0", "num_local_experts=8", "head_dim=16"],
}
"""Fields of the models that need others than most."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_two_steps(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    chosen = next(
        (e["override /model"] for e in yaml.safe_load(recipe.read_text()).get("defaults", []) if "override /model" in e), ""
    )
    fields = SHRUNK.get(chosen, [*SMALL_MODEL, "vocab_size=272"])
    launch(
        run_dir, f"+recipe={recipe.stem}", "trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1",
        "quant.start_step=1", "model.path=null",
        small=(*(f"model.config.{field}" for field in fields), *SMALL_RUN),
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
