"""The mean over all tokens of a step that count, whatever their share in each micro-batch."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_data import chat_tokenizer, conversation, write_jsonl
from torch import Tensor

from nvfp4_train.data.module import DataConfig, TextDataModule
from nvfp4_train.data.stream import ScaledStream, StreamSampler
from nvfp4_train.losses.base import num_positions

ACCUMULATE = 3


@pytest.fixture
def chat(tmp_path: Path) -> dict[str, Any]:
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": conversation(i, answer="it is " * (i % 7))} for i in range(40)]
    return {"path": str(write_jsonl(tmp_path / "chat.jsonl", rows)), "tokenizer": str(tmp_path / "tokenizer")}


def loader(chat: dict[str, Any], rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    module = TextDataModule(DataConfig(**chat, **{"seq_len": 300, "batch_size": 2, "val_fraction": 0.2, **options}), seed=0)
    progress = SimpleNamespace(total=SimpleNamespace(ready=0))
    module.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        global_step=0,
        accumulate_grad_batches=ACCUMULATE,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    module.setup()
    return module.train_dataloader()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_average_of_a_step_is_the_mean_over_its_tokens(chat: dict[str, Any], world_size: int, num_workers: int) -> None:
    steps = 4
    by_rank = [
        list(islice(iter(loader(chat, rank, world_size, num_workers=num_workers)), ACCUMULATE * steps))
        for rank in range(world_size)
    ]
    counts = set()
    for step in range(steps):
        batches: list[dict[str, Tensor]] = [
            batch for rank in by_rank for batch in rank[step * ACCUMULATE : (step + 1) * ACCUMULATE]
        ]
        numbers = torch.tensor([num_positions(batch) for batch in batches], dtype=torch.float32)
        scales = torch.stack([batch["loss_scale"][0] for batch in batches])
        assert all((batch["loss_scale"] == batch["loss_scale"][0]).all() for batch in batches)
        torch.testing.assert_close(scales / len(batches), numbers / numbers.sum())
        counts |= set(numbers.tolist())
    assert len(counts) > 3


def test_batches_in_which_all_tokens_count_have_no_factor(corpus: Path) -> None:
    batch = next(iter(loader({"path": str(corpus)}, seq_len=32)))
    assert batch.keys() == {"input_ids"}


def test_a_step_without_a_token_that_counts_has_a_factor() -> None:
    stream = ScaledStream(StreamSampler(4, batch_size=2, seed=0), batches_per_step=2, num_counted=lambda sample: 0)
    assert [scale for batch in islice(stream, 4) for _, scale in batch] == [1.0] * 8


def test_samples_of_a_step_across_the_end_of_an_epoch_are_those_of_the_stream() -> None:
    plain = StreamSampler(5, batch_size=2, seed=3, start=4)
    scaled = ScaledStream(
        StreamSampler(5, batch_size=2, seed=3, start=4), batches_per_step=3, num_counted=lambda sample: sample + 1
    )
    pairs = list(zip(islice(plain, 9), islice(scaled, 9), strict=True))
    assert all([sample for sample, _ in theirs] == ours for ours, theirs in pairs)
    assert sum(scale for _, theirs in pairs[:3] for _, scale in theirs) == pytest.approx(6)
