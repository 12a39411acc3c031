"""layers.csv: a row for each layer and look, whatever stops in between."""

import math
from pathlib import Path

import pytest

from nvfp4_train.layer_table import LayerRow, append_rows, read_rows, rewind

FIRST = {"a.q": {"sqnr_db": 0.1 + 0.2, "scale_min": 2.0**-6}, "a.k": {"sqnr_db": math.inf}}
SECOND = {"a.q": {"sqnr_db": 20.0, "scale_min": 1.0}, "a.k": {"sqnr_db": 19.0, "scale_min": 0.5}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "layers.csv"
    append_rows(path, 10, FIRST, statistics=["sqnr_db", "flip_rate"])
    append_rows(path, 20, SECOND)
    return path


def steps(path: Path) -> list[int]:
    return [row.step for row in read_rows(path)]


def test_rows_come_back_as_they_were(path: Path) -> None:
    assert path.read_text().splitlines()[:2] == [
        "step,layer,sqnr_db,flip_rate,scale_min",
        "10,a.q,0.30000000000000004,,0.015625",
    ]
    assert read_rows(path) == [
        LayerRow(step, layer, look[layer]) for step, look in ((10, FIRST), (20, SECOND)) for layer in look
    ]


def test_a_run_that_goes_back_replaces_what_it_does_again(path: Path) -> None:
    append_rows(path, 30, SECOND)
    append_rows(path, 20, FIRST)
    assert [(row.step, row.values) for row in read_rows(path)] == [
        (10, FIRST["a.q"]), (10, FIRST["a.k"]), (20, FIRST["a.q"]), (20, FIRST["a.k"])
    ]  # fmt: skip
    rewind(path, 15)
    assert steps(path) == [10, 10]
    rewind(path, 5)
    append_rows(path, 10, SECOND)
    assert steps(path) == [10, 10]


def test_a_line_that_was_cut_is_no_row(path: Path) -> None:
    path.write_text(path.read_text()[:-3])
    assert steps(path) == [10, 10, 20]
    # The look of step 20 was never finished, and a run that continues before it does it again.
    append_rows(path, 20, SECOND)
    assert steps(path) == [10, 10, 20, 20]
    assert read_rows(path)[-1].values == SECOND["a.k"]


def test_an_empty_file_has_no_rows_and_gives_way(path: Path) -> None:
    path.write_text("")
    assert read_rows(path) == []
    rewind(path, 10)
    append_rows(path, 30, SECOND)
    assert steps(path) == [30, 30]


def test_a_file_without_a_column_is_kept_and_a_new_one_begun(path: Path) -> None:
    before = path.read_bytes()
    append_rows(path, 30, {"a.q": {"sqnr_db": 1.0, "zero_share": 0.25}})
    assert path.with_name("layers.1.csv").read_bytes() == before
    assert read_rows(path) == [LayerRow(30, "a.q", {"sqnr_db": 1.0, "zero_share": 0.25})]


def test_fewer_statistics_leave_cells_empty(path: Path) -> None:
    append_rows(path, 30, {"a.q": {"scale_min": 0.5}})
    assert read_rows(path)[-1] == LayerRow(30, "a.q", {"scale_min": 0.5})
    assert not path.with_name("layers.1.csv").exists()


def test_the_end_of_a_long_file_is_enough(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp4_train.layer_table._TAIL_BYTES", 40)
    monkeypatch.setattr("nvfp4_train.layer_table._lines", None)
    for step in range(30, 60, 10):
        append_rows(path, step, SECOND)
    monkeypatch.undo()
    assert steps(path) == [step for step in range(10, 60, 10) for _ in range(2)]
