"""Intervals of held-out metrics, and differences that are told from noise."""

import numpy as np
import pytest
import torch

from nvfp4_train import sequence_metrics
from nvfp4_train.sequence_metrics import SequenceCollector, SequenceMetrics, interval, over_ranks


def metrics(values: np.ndarray, positions: np.ndarray | None = None) -> SequenceMetrics:
    return SequenceMetrics(np.ones(len(values)) if positions is None else positions, {"kl": values})


def test_means_are_over_positions() -> None:
    found = metrics(np.array([1.0, 4.0]), np.array([3.0, 1.0]))
    assert found.means() == {"kl": 1.75}
    assert found.interval("kl").mean == 1.75


def test_an_interval_is_that_of_the_normal_distribution_where_the_mean_has_one() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    found = interval(np.ones(400), values)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        found = interval(np.ones(64), draws.exponential(1.0, 64))
        inside += found.low <= 1.0 <= found.high
    assert 0.88 <= inside / 200 <= 0.98


@pytest.mark.parametrize("num", [2, 3, 5, 8, 16])
def test_noise_of_few_sequences_is_seldom_called_a_difference(num: int) -> None:
    draws = np.random.default_rng(num)
    found = [interval(np.ones(num), draws.normal(0.0, 1.0, num)).excludes_zero for _ in range(200)]
    assert sum(found) / 200 <= 0.11


def test_there_is_no_interval_where_a_sequence_is_not_finite() -> None:
    for value in (np.nan, np.inf):
        found = metrics(np.array([1.0, value, 1.1, 1.2])).interval("kl")
        assert (found.low, found.high) == (-np.inf, np.inf)
        assert not found.excludes_zero


def test_a_rank_without_a_sequence_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = SequenceCollector()
    collector.add(torch.tensor([4.0]), {"kl": torch.tensor([0.5])})
    monkeypatch.setattr(sequence_metrics, "gather_from_ranks", lambda own: [own, {"x": SequenceCollector().arrays()}])
    found = over_ranks({"x": collector})["x"]
    assert (found.positions.tolist(), found.values["kl"].tolist()) == ([4.0], [0.5])


def test_a_difference_is_found_under_noise_that_both_share() -> None:
    draws = np.random.default_rng(3)
    text = draws.normal(3.0, 1.0, 64)
    first, second = metrics(text), metrics(text + draws.normal(0.02, 0.02, 64))
    overlap = first.interval("kl").high > second.interval("kl").low
    assert overlap, "unpaired, the intervals say nothing"
    assert second.difference(first, "kl").excludes_zero
    noise = metrics(text + draws.normal(0.0, 0.02, 64))
    assert not noise.difference(first, "kl").excludes_zero


def test_sequences_without_positions_add_nothing() -> None:
    found = metrics(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 2.0]))
    assert found.means() == {"kl": 2.0}
    assert np.isfinite(found.interval("kl")).all()


def test_one_sequence_tells_nothing_of_others() -> None:
    found = metrics(np.array([1.0, 0.0]), np.array([2.0, 0.0])).interval("kl")
    assert found == (1.0, -np.inf, np.inf)
    assert not found.excludes_zero
    assert found.to_dict() == {"mean": 1.0, "low": None, "high": None}


def test_other_sequences_are_not_compared() -> None:
    with pytest.raises(ValueError, match="of the same sequences"):
        metrics(np.ones(3)).difference(metrics(np.ones(4)), "kl")


def test_metrics_survive_json() -> None:
    found = metrics(np.array([1.0, 0.1]), np.array([3.0, 1.0]))
    again = SequenceMetrics.from_dict(found.to_dict())
    assert again.means() == found.means()
    assert again.difference(found, "kl") == (0.0, 0.0, 0.0)
