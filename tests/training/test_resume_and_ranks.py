"""Two ranks hold the same bits, and a resumed run ends where an uninterrupted one does."""

from pathlib import Path

import pytest
from running import assert_same, launch, load_checkpoint, metrics

STEPS = (
    "+recipe=quickstart",
    "trainer.max_steps=6",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=5",
    "quant.start_step=2",
    "callbacks.checkpoint.every_n_train_steps=3",
    "callbacks.checkpoint.save_top_k=-1",
    "callbacks.scale_stats.every_n_steps=3",
)
DUMP = ("+callbacks.dump._target_=dump_state.DumpState",)


@pytest.fixture(scope="module")
def two_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ddp") / "run"
    launch(run_dir, *STEPS, *DUMP, f"+callbacks.dump.folder={run_dir}/dump", "trainer=ddp", ranks=2)
    return run_dir


def test_ranks_hold_identical_masters_scales_and_codes(two_rank_run: Path) -> None:
    first, second = (load_checkpoint(two_rank_run / "dump" / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    assert first["all_reduces"] == [1] * 5, "the switch at step 2 and one update for each of steps 3 to 6"


def test_ranks_share_one_run_folder(two_rank_run: Path) -> None:
    assert {path.name for path in two_rank_run.iterdir()} == {
        ".hydra", "checkpoints", "dump", "export", "metrics.csv", "metrics.json",
    }  # fmt: skip
    assert load_checkpoint(two_rank_run / "checkpoints" / "last.ckpt")["global_step"] == 6


@pytest.mark.parametrize("ranks", [0, 2])
def test_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(ranks: int, two_rank_run: Path, tmp_path: Path) -> None:
    trainer = "trainer=ddp" if ranks else "trainer=cpu"
    whole = two_rank_run
    if not ranks:
        whole = tmp_path / "whole"
        launch(whole, *STEPS, trainer)
    resumed = tmp_path / "resumed"
    launch(resumed, *STEPS, trainer, f"ckpt_path={whole}/checkpoints/step-0000003.ckpt", ranks=ranks)
    ends = [load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, resumed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "hyper_parameters"):
        assert_same(ends[0][key], ends[1][key], key)
    for name in ("val/loss_master", "val/loss_quantized", "val/loss_ptq", "quant/sqnr_db"):
        assert metrics(whole)[name] == metrics(resumed)[name], name
