from pathlib import Path

import pytest
from torch.distributed import TCPStore

from nvfp4_train.run.resume import choose_checkpoint


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
