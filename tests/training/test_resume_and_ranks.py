"""Two ranks hold the same bits, and a resumed run ends where an uninterrupted one does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from running import assert_same, launch, load_checkpoint
from six_steps import STEPS, assert_same_end, trainer


def test_ranks_hold_identical_masters_scales_and_codes(whole_run: Callable[[int], Path]) -> None:
    first, second = (load_checkpoint(whole_run(2) / "dump" / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    assert first["all_reduces"] == [1] * 5, "the switch at step 2 and one update for each of steps 3 to 6"


def test_ranks_share_one_run_folder(whole_run: Callable[[int], Path]) -> None:
    assert {path.name for path in whole_run(2).iterdir()} == {
        ".hydra", "checkpoints", "dump", "export", "layers.csv", "metrics.csv", "metrics.json", "sequences.json",
    }  # fmt: skip
    assert load_checkpoint(whole_run(2) / "checkpoints" / "last.ckpt")["global_step"] == 6


@pytest.mark.parametrize("ranks", [0, 2])
def test_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    ranks: int, whole_run: Callable[[int], Path], tmp_path: Path
) -> None:
    whole, resumed = whole_run(ranks), tmp_path / "resumed"
    launch(resumed, *STEPS, trainer(ranks), f"ckpt_path={whole}/checkpoints/step-0000003.ckpt", ranks=ranks)
    assert_same_end(whole, resumed)
