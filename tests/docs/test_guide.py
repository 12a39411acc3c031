"""What the guide says in numbers that the repository can compute, it computes so."""

import re
from functools import cache
from typing import Any

import pytest
from pages import DOCS, ROOT

from nvfp4_train.export.card import _FORMATS
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES
from nvfp4_train.run.compose import compose_options
from nvfp4_train.run.planning import plan_recipe

GUIDE = {page.stem: page.read_text() for page in (DOCS / "guide").glob("*.md")}
COSTS = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+)M \|$", GUIDE["cost"], re.MULTILINE)


@pytest.fixture(autouse=True)
def run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ID", "docs")


@cache
def options_of(recipe: str) -> dict[str, Any]:
    options, _ = compose_options(ROOT, [f"+recipe={recipe}"])
    return options


def test_every_recipe_of_many_gpus_has_its_cost() -> None:
    sharded = {recipe.stem for recipe in (ROOT / "recipes").glob("*.yaml") if "trainer: fsdp2" in recipe.read_text()}
    assert {recipe for recipe, *_ in COSTS} == sharded


LARGE = ("qwen3_30b_a3b_qad", "llama3_70b_qat", "gemma3_12b_qad")
"""Recipes whose plans take seconds to make."""
ROWS = [pytest.param(*row, id=row[0], marks=[pytest.mark.slow] if row[0] in LARGE else []) for row in COSTS]


@pytest.mark.parametrize(("recipe", "gpus", "gib", "per_step", "millions"), ROWS)
def test_the_cost_of_a_recipe_is_what_the_plan_says(recipe: str, gpus: str, gib: str, per_step: str, millions: str) -> None:
    plan = plan_recipe(ROOT, [f"+recipe={recipe}"], int(gpus))
    (quantized,) = re.findall(r"^peak +[\d.]+ +([\d.]+) ", plan, re.MULTILINE)
    assert float(quantized) == pytest.approx(float(gib), abs=1.0)
    options = options_of(recipe)
    data, trainer = options["data"], options["trainer"]
    tokens = int(gpus) * data["seq_len"] * data["batch_size"] * trainer["accumulate_grad_batches"]
    assert f"{tokens:,}" == per_step
    assert f"{tokens * trainer['max_steps'] / 1e6:.1f}" == millions


def test_the_rates_are_those_of_the_recipes() -> None:
    (sentence,) = re.findall(r"The recipes of this repository take (.*?)\.\s", GUIDE["settings"], re.DOTALL)
    said = re.findall(r"([\d.]+e-\d) (?:at|from) ([\d.]+[BM])", sentence.replace("\n", " ").replace(" (measured)", ""))
    recipes = {"135M": "smollm2_135m_qad", "0.6B": "qwen3_0_6b_qad", "8B": "llama3_8b_qad", "70B": "llama3_70b_qat"}
    said += re.findall(r"([\d.]+e-\d) at (70B)", sentence)
    found = {size: float(rate) for rate, size in said}
    assert found.keys() == recipes.keys()
    for size, rate in found.items():
        assert options_of(recipes[size])["optim"]["lr"] == rate, size


def test_the_kernels_are_those_of_the_model_card() -> None:
    """The lines of a card, as it has them for the formats that serving engines read."""
    lines = {
        line
        for name in ("compressed_tensors", "modelopt")
        for of_activations in _FORMATS[name].kernels.values()
        for line in of_activations
    }
    assert len(lines) == 8
    for line in lines:
        assert f"- {line}\n" in GUIDE["serving"], line


def test_the_rules_are_all_described() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", GUIDE["settings"], re.MULTILINE))
    assert described == set(BLOCK_SCALE_RULES)
