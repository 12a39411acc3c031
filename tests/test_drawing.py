"""What loggers are given to draw: one entry for each kind of logger."""

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nvfp4_train import drawing
from nvfp4_train.drawing import Drawings, Table, can_draw, draw, markdown
from nvfp4_train.loggers import SegmentedTensorBoardLogger

HISTOGRAM = (
    torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64),
    torch.tensor([-1.0, 0.0, 0.5, 2.0, 9.0], dtype=torch.float64),
)


def test_histograms_are_those_of_the_bins(tmp_path: Any) -> None:
    wandb_logger, tensorboard = (
        WandbLogger(save_dir=tmp_path, offline=True),
        SegmentedTensorBoardLogger(str(tmp_path / "tensorboard")),
    )
    empty = torch.zeros(4, dtype=torch.float64), HISTOGRAM[1]
    drawings = Drawings(histograms={"histograms/code": HISTOGRAM, "histograms/none": empty})
    draw([CSVLogger(tmp_path), wandb_logger, tensorboard], drawings, 7)
    summary = wandb_logger.experiment.summary
    assert summary["trainer/global_step"] == 7
    assert dict(summary["histograms/code"]) == {
        "_type": "histogram", "values": [0.0, 1.0, 2.0, 0.0], "bins": [-1.0, 0.0, 0.5, 2.0, 9.0]
    }  # fmt: skip
    wandb_logger.experiment.finish()
    tensorboard.save()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert shown.Tags()["histograms"] == ["histograms/code"], "nothing to show of one without counts"
    (event,) = shown.Histograms("histograms/code")
    value = event.histogram_value
    # 0.25 once and 1.25 twice, in the middles of their bins.
    assert (event.step, value.min, value.max, value.num, value.sum) == (7, 0.0, 2.0, 3.0, 2.75)
    assert value.sum_squares == 0.25**2 + 2 * 1.25**2
    assert (value.bucket_limit, value.bucket) == ([0.0, 0.5, 2.0, 9.0], [0.0, 1.0, 2.0, 0.0])


def test_another_logger_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Drawings, int]] = []
    drawings = Drawings(images={"heat_maps/mine": Figure()})
    loggers = [DummyLogger()]
    assert not can_draw(loggers)
    draw(loggers, drawings, 3)
    monkeypatch.setitem(drawing.DRAWERS, DummyLogger, lambda logger, drawings, step: given.append((drawings, step)))
    assert can_draw(loggers)
    draw(loggers, drawings, 3)
    assert given == [(drawings, 3)]


def test_pixels_are_those_of_the_figure() -> None:
    figure = Figure(figsize=(2, 1), dpi=50, facecolor="#ff8000")
    assert np.array_equal(drawing.pixels(figure), np.broadcast_to(np.array([255, 128, 0], np.uint8), (50, 100, 3)))


def test_a_table_in_markdown() -> None:
    table = Table(["layer", "depth", "sqnr_db"], [["a|b", 3, 20.123456], ["c", None, float("inf")]])
    assert markdown(table).splitlines() == [
        "| layer | depth | sqnr_db |", "| --- | --- | --- |", "| a\\|b | 3 | 20.12 |", "| c |  | inf |"
    ]  # fmt: skip


def test_tensorboard_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("nvfp4_train.loggers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package tensorboard is not installed: pip install tensorboard"):
        SegmentedTensorBoardLogger(str(tmp_path))
    assert not list(tmp_path.iterdir())
