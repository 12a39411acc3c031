from pathlib import Path

import pytest
from torch.distributed import TCPStore

from nvfp4_train.layer_table import append_rows
from nvfp4_train.run.resume import choose_checkpoint, keep_earlier_metrics


def test_all_ranks_continue_from_the_checkpoint_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On storage of its own a rank may find none, or another one, and would wait for the others forever."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in (
        ("RANK", "1"), ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "0"),
        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port)),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    for chosen in ("", str(tmp_path)):
        store.set("nvfp4_train/checkpoint/0", chosen)
        assert choose_checkpoint("auto", tmp_path / "checkpoints") == (chosen or None)
    store.set("nvfp4_train/checkpoint/0", str(tmp_path / "elsewhere.ckpt"))
    with pytest.raises(ValueError, match="storage that all ranks share"):
        choose_checkpoint("auto", tmp_path / "checkpoints")


def test_the_table_of_layers_goes_on_where_the_run_does(tmp_path: Path) -> None:
    table = tmp_path / "layers.csv"
    append_rows(table, 10, {"a.q": {"sqnr_db": 20.0}})
    (tmp_path / "metrics.csv").write_text("step\n")
    keep_earlier_metrics(tmp_path, "checkpoints/step-0000010.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.csv", "metrics.1.csv"]
    keep_earlier_metrics(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.1.csv", "metrics.1.csv"]
