"""Work in threads comes back in order, and fails as it would without them."""

import threading
import time
from collections.abc import Iterator

import pytest

from nvfp4_train import parallel
from nvfp4_train.parallel import in_threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "usable_cores", lambda: 4)


def test_results_come_in_the_order_of_the_items_and_from_several_threads() -> None:
    together = threading.Barrier(4, timeout=60)

    def work(number: int) -> int:
        if number < 4:
            together.wait()
            time.sleep(0.01 * (4 - number))
        return number

    assert list(in_threads(work, range(50))) == list(range(50))


def test_of_several_errors_that_of_the_first_item_is_raised() -> None:
    failed = threading.Event()

    def work(number: int) -> int:
        if number == 5:
            assert failed.wait(60)
            raise ValueError("item 5")
        if number == 7:
            failed.set()
            raise ValueError("item 7")
        return number

    with pytest.raises(ValueError, match="item 5"):
        list(in_threads(work, range(50)))


def test_items_are_taken_as_they_are_needed() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = in_threads(lambda number: number, items())
    assert next(results) == 0
    assert len(taken) <= 9
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 9
