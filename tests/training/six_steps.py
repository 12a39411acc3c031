"""A run of six steps, two of them before the switch, that several tests interrupt."""

from pathlib import Path

from running import assert_same, load_checkpoint, metrics

STEPS = (
    "+recipe=quickstart",
    "trainer.max_steps=6",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=5",
    "quant.start_step=2",
    "callbacks.checkpoint.save_top_k=-1",
    "callbacks.scale_stats.every_n_steps=3",
)


def trainer(ranks: int) -> str:
    return "trainer=ddp" if ranks else "trainer=cpu"


def dump(run_dir: Path) -> tuple[str, ...]:
    """Every rank writes what it holds in the end to `run_dir`/dump."""
    return ("+callbacks.dump._target_=dump_state.DumpState", f"+callbacks.dump.folder={run_dir}/dump")


def assert_same_end(whole: Path, resumed: Path) -> None:
    ends = [load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, resumed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "hyper_parameters"):
        assert_same(ends[0][key], ends[1][key], key)
    for name in ("val/loss_master", "val/loss_quantized", "val/loss_ptq", "quant/sqnr_db"):
        assert metrics(whole)[name] == metrics(resumed)[name], name
    assert (whole / "sequences.json").read_bytes() == (resumed / "sequences.json").read_bytes()
