from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvfp4_train.data.module import DataConfig, StreamSampler, TextDataModule
from nvfp4_train.data.tokenizer import byte_tokenizer


def data_module(corpus: Path, *, seed: int = 0, rank: int = 0, world_size: int = 1, step: int = 0, **options) -> TextDataModule:
    module = TextDataModule(DataConfig(path=str(corpus), **{"seq_len": 32, "val_fraction": 0.2, **options}), seed=seed)
    progress = SimpleNamespace(total=SimpleNamespace(ready=step))
    module.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        global_step=step,
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    module.prepare_data()
    module.setup("fit")
    return module


def take(loader, count: int) -> torch.Tensor:
    return torch.stack([batch["input_ids"] for batch in islice(iter(loader), count)])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seq_len": 1}, "data.seq_len must be at least 2; got 1"),
        ({"batch_size": 0}, "data.batch_size must be at least 1; got 0"),
        ({"val_batch_size": 0}, "data.val_batch_size must be at least 1, or null; got 0"),
        ({"max_documents": 0}, "data.max_documents must be at least 1, or null; got 0"),
        ({"val_sequences": 0}, "data.val_sequences must be at least 1, or null; got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0; got -1"),
        ({"val_fraction": 1.5}, "data.val_fraction must be above 0 and at most 1; got 1.5"),
        ({"path": ""}, "data.path must not be empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_out_of_range_is_an_error_that_names_it(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**option)


def test_all_of_a_text_can_be_held_out_but_not_trained_on(corpus: Path) -> None:
    """As an evaluation wants it: every sequence, whatever is held out of a text that is trained on."""
    module = TextDataModule(DataConfig(path=str(corpus), seq_len=32, val_fraction=1.0, val_sequences=10_000), seed=0)
    module.prepare_data()
    module.setup("validate")
    other = data_module(corpus, val_sequences=10_000)
    assert module.train_sequences == 0
    assert 0 <= module.val_sequences - other.train_sequences - other.val_sequences <= 1
    with pytest.raises(ValueError, match="val_fraction=1 holds out all of .* nothing is left to train on"):
        module.calibration_batches(4)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        data_module(corpus, val_fraction=1.0)


def test_batches_are_int64_of_the_asked_shape(corpus: Path) -> None:
    module = data_module(corpus, batch_size=3)
    batch = next(iter(module.train_dataloader()))
    assert list(batch) == ["input_ids"]
    assert (batch["input_ids"].dtype, batch["input_ids"].shape) == (torch.int64, (3, 32))


def test_the_stream_visits_every_sample_once_per_permutation_and_depends_on_the_seed() -> None:
    def stream(seed: int) -> list[int]:
        return [i for batch in islice(StreamSampler(10, batch_size=4, seed=seed), 5) for i in batch]

    first = stream(7)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first[:10] != first[10:]
    assert first == stream(7)
    assert first != stream(8)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(corpus: Path, world_size: int) -> None:
    alone = take(data_module(corpus, batch_size=8).train_dataloader(), 100)
    ranks = [
        take(data_module(corpus, batch_size=8 // world_size, rank=rank, world_size=world_size).train_dataloader(), 100)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(ranks, dim=1), alone)


@pytest.mark.parametrize("start", [1, 6, 99])
def test_a_stream_can_begin_anywhere(start: int) -> None:
    whole = [i for batch in islice(StreamSampler(10, batch_size=1, seed=0), 120) for i in batch]
    part = [i for batch in islice(StreamSampler(10, batch_size=3, seed=0, start=start), 7) for i in batch]
    assert part == whole[start : start + 21]


def test_a_resumed_run_goes_on_in_the_stream_on_any_number_of_ranks(corpus: Path) -> None:
    """Four steps on two ranks, three on one with another batch size, two on three."""
    parts, state, step = [], None, 0
    for world_size, batch_size, steps in ((2, 8, 4), (1, 5, 3), (3, 2, 2)):
        modules = [
            data_module(corpus, rank=r, world_size=world_size, step=step, batch_size=batch_size) for r in range(world_size)
        ]
        for module in modules:
            if state is not None:
                module.load_state_dict(state)
        parts.append(torch.cat([take(module.train_dataloader(), steps) for module in modules], dim=1).flatten(0, 1))
        step += steps
        modules[0].trainer.global_step = step
        state = modules[0].state_dict()
    alone = take(data_module(corpus, batch_size=1).train_dataloader(), 2 * 8 * 4 + 5 * 3 + 3 * 2 * 2).flatten(0, 1)
    assert torch.equal(torch.cat(parts), alone)


def test_loaders_leave_the_global_generator_alone(corpus: Path) -> None:
    module = data_module(corpus)
    state = torch.get_rng_state()
    take(module.train_dataloader(), 3)
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_give_the_same_batches(corpus: Path) -> None:
    plain, workers = data_module(corpus, step=3), data_module(corpus, step=3, num_workers=2)
    assert torch.equal(take(workers.train_dataloader(), 40), take(plain.train_dataloader(), 40))
    for ours, theirs in zip(workers.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (3, 4), (3, 1), (3, 2), (7, 3)])
def test_ranks_share_the_held_out_sequences_in_equally_many_batches(corpus: Path, world_size: int, batch_size: int) -> None:
    alone = data_module(corpus, val_sequences=17)
    expected = torch.cat([batch["input_ids"] for batch in alone.val_dataloader()])
    assert alone.val_sequences == len(expected) == 17
    num_batches, seen = set(), {}
    for rank in range(world_size):
        module = data_module(corpus, val_sequences=17, val_batch_size=batch_size, rank=rank, world_size=world_size)
        batches = [batch["input_ids"] for batch in module.val_dataloader()]
        assert max(map(len, batches)) <= max(batch_size, 2)
        num_batches.add(len(batches))
        seen[rank] = torch.cat(batches)
    assert len(num_batches) == 1
    for rank, sequences in seen.items():
        assert torch.equal(sequences, expected[rank::world_size])


def test_the_held_out_choice_is_spread_over_the_held_out_text_and_ignores_the_seed(corpus: Path) -> None:
    def held_out(**options) -> list[tuple]:
        loader = data_module(corpus, **options).val_dataloader()
        return [tuple(row) for batch in loader for row in batch["input_ids"].tolist()]

    everything = held_out(val_sequences=10**6)
    chosen = held_out(val_sequences=5, seed=3, batch_size=2)
    assert chosen == [everything[i * len(everything) // 5] for i in range(5)]


@pytest.mark.parametrize(("world_size", "num_sequences"), [(1, 7), (2, 8), (2, 7), (3, 7), (4, 3)])
def test_all_ranks_together_calibrate_with_each_sequence_once(corpus: Path, world_size: int, num_sequences: int) -> None:
    """They are the first ones of the training stream. Where they do not divide evenly, some ranks repeat one that does not count."""
    expected = take(data_module(corpus, batch_size=1).train_dataloader(), num_sequences).flatten(0, 1)
    by_rank = [
        data_module(corpus, batch_size=5, rank=rank, world_size=world_size).calibration_batches(num_sequences)
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in by_rank} == {-(-num_sequences // world_size)}
    in_order = [batch for turn in zip(*by_rank, strict=True) for batch in turn]
    assert all(batch["input_ids"].shape == (1, 32) for batch, _ in in_order)
    assert [is_counted for _, is_counted in in_order] == [place < num_sequences for place in range(len(in_order))]
    assert torch.equal(torch.cat([batch["input_ids"] for batch, is_counted in in_order if is_counted]), expected)
    repeated = [batch["input_ids"][0].tolist() for batch, is_counted in in_order if not is_counted]
    assert all(ids in expected.tolist() for ids in repeated)


def test_calibration_takes_what_training_text_there_is_and_depends_on_the_seed_alone(corpus: Path) -> None:
    def calibration(num_sequences: int, **options) -> list[list[int]]:
        batches = data_module(corpus, **options).calibration_batches(num_sequences)
        assert all(is_counted for _, is_counted in batches)
        return [batch["input_ids"][0].tolist() for batch, _ in batches]

    everything = calibration(10**6)
    training = data_module(corpus)
    assert len(everything) == training.train_sequences
    own = take(data_module(corpus, batch_size=1).train_dataloader(), training.train_sequences).flatten(0, 1).tolist()
    assert sorted(everything) == sorted(own)
    assert calibration(5, step=3) == calibration(5), "also where training has gone on"
    assert calibration(5, seed=1) != calibration(5)


def test_max_documents_takes_the_first_documents(corpus: Path) -> None:
    all_of_them, few = data_module(corpus), data_module(corpus, max_documents=20)
    assert 0 < few.train_sequences < all_of_them.train_sequences


def test_a_rank_without_held_out_sequence_is_an_error(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"got 2 for 3 ranks, .* Raise data.val_sequences"):
        data_module(corpus, val_sequences=2, world_size=3)


def test_check_model_needs_no_data_and_names_what_does_not_fit() -> None:
    module = TextDataModule(DataConfig(path="/nowhere", seq_len=64), seed=0)
    module.check_model(257, 64)
    module.check_model(300, None)
    with pytest.raises(ValueError, match=r"model has 63 positions; got data.seq_len=64. Lower data.seq_len"):
        module.check_model(257, 63)
    with pytest.raises(ValueError, match=r"embeds 256 tokens; the tokenizer has 257 .* Set data.tokenizer"):
        module.check_model(256, 64)


def test_auto_is_the_tokenizer_of_the_model_or_bytes(tmp_path: Path) -> None:
    own = byte_tokenizer()
    own.add_tokens(["<tool>"])
    own.save_pretrained(tmp_path)
    assert len(TextDataModule(DataConfig(), seed=0, model_path=str(tmp_path)).tokenizer) == 258
    assert len(TextDataModule(DataConfig(tokenizer="byte"), seed=0, model_path=str(tmp_path)).tokenizer) == 257
    assert len(TextDataModule(DataConfig(), seed=0).tokenizer) == 257


def test_a_negative_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="seed must be at least 0; got -1"):
        TextDataModule(DataConfig(), seed=-1)
