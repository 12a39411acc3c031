"""No rank holds the whole model while it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from memory import PROCESS, peak_growth, return_freed_memory, status
from ranks import run_ranks
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nvfp4_train.callbacks.run_summary import peak_memory
from nvfp4_train.models import build
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.quant.policy import QuantConfig

pytestmark = pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="needs Linux")

MB = 1_000_000
# 47 million parameters: 188 MB of masters, of which the largest tensor has 17.
LARGE = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
FILE_BYTES = 10 * MB
SLACK_BYTES = 16 * MB


def save(folder: Path, **fields: Any) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=FILE_BYTES)
    return str(folder)


def load(path: str, by_rows: bool) -> PreTrainedModel:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    open_folder = build.open_folder
    if not by_rows:
        build.open_folder = lambda *_: None
    try:
        made = build.build_model(
            ModelConfig(path=path), QuantConfig(), torch.device("cpu"), compute_dtype=torch.bfloat16, mesh=mesh
        )
    finally:
        build.open_folder = open_folder
    return made.model


def measure(small: str, large: str) -> dict[str, int]:
    """Peak growth of this rank in bytes, and the bytes of its share."""
    return_freed_memory()
    models = [load(small, by_rows) for by_rows in (True, False)]
    by_rows = peak_growth(lambda: models.append(load(large, True)))
    share = sum(parameter.to_local().nbytes for parameter in models[-1].parameters())
    del models[:]
    return {"by_rows": by_rows, "share": share, "whole": peak_growth(lambda: models.append(load(large, False)))}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_rank_holds_its_share_and_its_rows_of_one_file(num_ranks: int, tmp_path: Path) -> None:
    small, large = save(tmp_path / "small", **LARGE | {"num_hidden_layers": 1}), save(tmp_path / "large", **LARGE)
    for rank in run_ranks(num_ranks, measure, small, large, gpus=False):
        bound = rank["share"] + FILE_BYTES + SLACK_BYTES
        assert rank["by_rows"] <= bound
        assert rank["whole"] > bound, "the test would not notice a full load"


def peak_of_two() -> tuple[int, int]:
    # Zeros would take no memory.
    held = torch.ones(300 * MB if distributed.get_rank() == 1 else 1, dtype=torch.uint8)
    return *peak_memory(held.device), status("VmHWM")


def test_the_printed_peak_is_of_the_rank_that_held_most() -> None:
    first, second = run_ranks(2, peak_of_two, gpus=False)
    assert first[:2] == second[:2]
    assert first[2] + 100 * MB < first[0] <= second[2]
    assert first[1] == 0
