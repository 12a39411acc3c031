"""The core of `benchmarks/oscillation.py` on a small random model."""

import json
from pathlib import Path

import accuracy
import oscillation
import pytest
import torch
from accuracy import Text
from tiny_models import tiny_model

# Five runs of a benchmark, on the CPU.
pytestmark = pytest.mark.slow

STEPS, SEEDS = 12, [0, 1]
LEFT_OUT = ("w4a16 freeze", "w4a4 none", "w4a4 reset", "w4a4 freeze")
"""Arms that have the first seed alone."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> oscillation.Results:
    """Of all arms, but for the second seed of most."""
    folder = tmp_path_factory.mktemp("oscillation")
    model = tiny_model("llama", num_hidden_layers=1)
    model.save_pretrained(folder / "model")
    ids = torch.randint(3, 64, (8 + 2 * STEPS + 4, 32), generator=torch.Generator().manual_seed(0))
    text = Text(*ids.split([8, 2 * STEPS, 4]))
    options = oscillation.parse(
        [
            *("--model", str(folder / "model"), "--results", str(folder / "results.jsonl")),
            *("--steps", f"{STEPS}", "--batch", "2", "--length", "32", "--calibration", "8", "--held-out", "4"),
            *("--from-share", "0.5", "--every-n-steps", "2", "--min-reversals", "1"),
        ]
    )
    found, worker = oscillation.Results(options), oscillation.Worker(options, text)
    for trained, setting in oscillation.TRAINED.items():
        # Rates at which so small a model flips codes within a few steps.
        fast = setting._replace(setting=setting.setting._replace(rate=1e-2))
        oscillation.TRAINED[trained] = fast
    for arm in oscillation.ARMS:
        for run in found.missing(arm, SEEDS):
            if run.seed == 0 or run.kind not in LEFT_OUT:
                found.add(run, **worker(run), host=accuracy.host())
    return found


def rows_of(results: oscillation.Results) -> dict[tuple[str, int], dict]:
    return {(run.kind, run.seed): row for run, row in results.rows().items()}


def test_runs_of_one_seed_are_the_same_until_the_control_begins(results: oscillation.Results) -> None:
    rows = rows_of(results)
    assert len(rows) == 8
    for trained, seed in (("w4a16", 0), ("w4a16", 1), ("w4a4", 0)):
        same = [row for (kind, of_seed), row in rows.items() if kind.startswith(f"{trained} ") and of_seed == seed]
        assert len({row["flips before"] for row in same}) == 1
        assert 0 < same[0]["flips before"] < 1
        assert len({row[f"kl {trained}"] for row in same}) == len(same) > 1


def test_what_was_acted_on_is_known(results: oscillation.Results) -> None:
    for (kind, _), row in rows_of(results).items():
        # After steps 8 and 10, of which the codes are looked at a step later; those of the last step are not.
        assert len(row["acted on"]) == 2
        assert (sum(row["acted on"]) > 0) == ("none" not in kind)
        assert (row["frozen"] > 0) == ("freeze" in kind)
        assert row["frozen"] == pytest.approx(sum(row["acted on"]) if "freeze" in kind else 0)


def test_a_rerun_makes_what_is_missing(results: oscillation.Results) -> None:
    missing = [run for arm in oscillation.ARMS for run in results.missing(arm, SEEDS)]
    assert [(run.kind, run.seed) for run in missing] == [(arm, 1) for arm in LEFT_OUT]
    results.setup["every_n_steps"] += 1
    try:
        assert not results.rows(), "of other windows"
    finally:
        results.setup["every_n_steps"] -= 1
    assert len(results.path.read_text().splitlines()) == 8


def test_tables_have_a_line_for_every_arm_and_every_pair(results: oscillation.Results) -> None:
    means, pairs = "\n".join(oscillation.tables(results)).split("\n\n")
    assert [line.split(" | ")[0].removeprefix("| ") for line in means.splitlines()[2:]] == oscillation.ARMS
    rows = rows_of(results)
    first = pairs.splitlines()[2].split(" | ")
    assert first[0] == "| w4a16 reset"
    assert float(first[2]) == pytest.approx(rows["w4a16 reset", 0]["kl w4a16"] - rows["w4a16 none", 0]["kl w4a16"], abs=1e-5)
    assert len(pairs.splitlines()) == 2 + 5


def test_lines_are_plain_json(results: oscillation.Results) -> None:
    line = json.loads(Path(results.path).read_text().splitlines()[0])
    assert line["kind"] == "w4a16 none"
    assert line["setup"]["min_reversals"] == 1
    assert line["setting"] == [1e-2, 1.0]
