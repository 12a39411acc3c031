"""What loggers are told: steps that go on over the segments of a run, pictures, how each segment ended, and one line for the user."""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from running import launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from nvfp4_train.callbacks.preemption import EXIT_CODE
from nvfp4_train.layer_table import read_rows
from nvfp4_train.metrics import PEAK_GIB
from nvfp4_train.run.dashboard import sections_of
from nvfp4_train.run.process import finishing_wandb

ROOT = Path(__file__).parent.parent.parent
OPTIONS = (
    "logger=wandb",
    "+logger.tensorboard={_target_: nvfp4_train.loggers.SegmentedTensorBoardLogger, save_dir: '${run_dir}/tensorboard'}",
    "loss=distillation", "trainer.max_steps=8", "trainer.log_every_n_steps=1", "trainer.val_check_interval=2",
    "quant.start_step=0", "quant.activations=nvfp4",
    "callbacks.scale_stats.every_n_steps=1", "callbacks.scale_stats.draw_every=4", "ckpt_path=auto",
)  # fmt: skip
LOG_BLOCK = 32768


def stop(number: int, batch_idx: int) -> tuple[str, ...]:
    values = {"_target_": "stop_at_step.StopAtStep", "number": int(number), "batch_idx": batch_idx}
    return tuple(f"+callbacks.stop.{name}={value}" for name, value in values.items())


def records(segment: Path) -> Iterator[Any]:
    """The records of a segment's file: the log format of LevelDB behind a header of seven bytes."""
    (file,) = segment.glob("*.wandb")
    data, position, parts = file.read_bytes(), 7, b""
    while position < len(data):
        if (left := LOG_BLOCK - position % LOG_BLOCK) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        # A whole record, or its last part.
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def rows(segment: Path) -> list[dict[str, Any]]:
    found = []
    for record in records(segment):
        if record.WhichOneof("record_type") == "history":
            found.append(row := {})
            for item in record.history.item:
                # The parts of a picture or a table have keys below its name.
                name, *below = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if below:
                    row.setdefault(name, {})["/".join(below)] = value
                else:
                    row[name] = value
    return found


def exit_codes(segment: Path) -> list[int]:
    return [record.exit.exit_code for record in records(segment) if record.WhichOneof("record_type") == "exit"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """The folder of a run that is preempted, killed, refused, and ends, and what its processes came to."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    stops = (stop(signal.SIGTERM, 2), stop(signal.SIGKILL, 5), ("quant.start_step=9",), ())
    results = [launch(run_dir, *OPTIONS, *options, check=False) for options in stops]
    assert [result.returncode for result in results] == [EXIT_CODE, -signal.SIGKILL, 1, 0], results[-1].stderr[-2000:]
    return run_dir, results


def segments_of(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def test_segments_of_a_run(stopped: Any) -> None:
    """They are four of one wandb run, whose steps go on."""
    run_dir, results = stopped
    segments = segments_of(run_dir)
    assert [exit_codes(segment) for segment in segments] == [[EXIT_CODE], [], [1], [0]]
    assert len({record.run.run_id for segment in segments for record in records(segment) if record.HasField("run")}) == 1
    first, *_, last = logged = [rows(segment) for segment in segments]
    steps = [row["_step"] for segment in logged for row in segment]
    assert all(earlier < later for earlier, later in pairwise(steps)), steps
    # What is drawn is drawn over the steps of the trainer.
    assert [row["trainer/global_step"] for row in first if "train/loss" in row][:3] == [0, 1, 2]
    assert [row["trainer/global_step"] for row in last if "train/loss" in row] == [3, 4, 5, 6, 7]

    output = results[-1].stdout + results[-1].stderr
    (line,) = [line for line in output.splitlines() if "wandb sync" in line]
    assert f"wandb sync {run_dir}/wandb/offline-run-*  # joins its 4 segments" in line
    assert "wandb:" not in output, "its own summary of hundreds of series, and its warnings"
    assert "\r" not in output, "a bar in a log file"


def heat_maps(run_dir: Path, steps: range) -> set[str]:
    """Names of those of the statistics that layers have at looks of these steps. Some need an earlier look, some are rare."""
    return {f"heat_maps/{name}" for row in read_rows(run_dir / "layers.csv") if row.step in steps for name in row.values}


HISTOGRAMS_BY_LAYER = {"histograms/scale_log2_by_layer", "histograms/code_by_layer"}


def test_an_offline_run_holds_pictures_tables_and_histograms(stopped: Any) -> None:
    run_dir, _ = stopped
    *_, last = segments_of(run_dir)
    looks = {row["trainer/global_step"]: row for row in rows(last) if any("histograms/" in name for name in row)}
    # Five looks. The first one of this process, and each fourth, are drawn: in one row, as each row is a step of wandb.
    assert list(looks) == [4, 5, 6, 7, 8]
    drawn = {step: row for step, row in looks.items() if any("heat_maps/" in name for name in row)}
    assert list(drawn) == [4, 8]
    for step, row in drawn.items():
        images = {name: image for name, image in row.items() if name.startswith("heat_maps/") or name.endswith("_by_layer")}
        assert images.keys() == heat_maps(run_dir, range(4, step + 1)) | HISTOGRAMS_BY_LAYER
        for image in images.values():
            assert image["_type"] == "image-file"
            with Image.open(last / "files" / image["path"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "a blank picture"
        assert row["worst_layers/table"]["_type"] == "table-file"
        table = json.loads((last / "files" / row["worst_layers/table"]["path"]).read_text())
        assert table["columns"][:5] == ["layer", "depth", "kind", "sqnr_db", "hint"]
        sqnr = [of_layer[3] for of_layer in table["data"]]
        assert len(sqnr) == 10
        assert sqnr == sorted(sqnr)
        of_layers = {found.layer: found.values for found in read_rows(run_dir / "layers.csv") if found.step == step}
        assert sqnr[0] == min(values["sqnr_db"] for values in of_layers.values())
        assert table["data"][0][0] in of_layers
    histogram = looks[5]["histograms/scale_log2"]
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) > 100


def names_logged(run_dir: Path) -> set[str]:
    return {name for segment in segments_of(run_dir) for row in rows(segment) for name in row}


def test_a_workspace_shows_what_is_logged_and_all_of_it(stopped: Any) -> None:
    logged = names_logged(stopped[0])
    layout = sections_of(ROOT, (*OPTIONS, f"run_dir={stopped[0]}"))
    shown = [name for section in layout for panel in section.panels for name in panel.metrics]
    assert len(set(shown)) == len(shown)
    # Only a GPU knows it.
    assert set(shown) - logged == {PEAK_GIB}
    of_looks = {name for name in logged if name.partition("/")[0] in ("quant", "heat_maps", "histograms", "worst_layers")}
    assert of_looks <= set(shown)
    assert {name.partition("/")[0] for name in logged if "/" in name} == {
        "train", "val", "quant", "heat_maps", "histograms", "worst_layers", "export", "trainer"
    }  # fmt: skip
    assert not [name for name in logged if "layers." in name], "a chart for each layer"


def test_each_look_at_the_layers_is_in_their_table_once(stopped: Any) -> None:
    looks = read_rows(stopped[0] / "layers.csv")
    layers = {row.layer for row in looks}
    assert [(row.step, row.layer) for row in looks] == [
        (step, row.layer) for step in range(1, 9) for row in looks[: len(layers)]
    ]
    assert not list(stopped[0].glob("layers.*.csv"))


def test_tensorboard_shows_one_run(stopped: Any) -> None:
    """What the killed segment logged beyond its checkpoint is left out. In the step behind that its loss is what it is again."""
    shown = EventAccumulator(
        str(stopped[0] / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    shown.Reload()
    losses = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    assert [step for step, _ in dict.fromkeys(losses)] == list(range(8))
    assert len(losses) <= 9
    assert [event.step for event in shown.Scalars("quant/sqnr_db")] == list(range(1, 9))
    scalars, images = set(shown.Tags()["scalars"]), set(shown.Tags()["images"])
    assert {name for name in names_logged(stopped[0]) if name.startswith(("train/", "val/", "quant/"))} <= scalars
    assert images == heat_maps(stopped[0], range(1, 9)) | HISTOGRAMS_BY_LAYER
    drawn = shown.Images("heat_maps/sqnr_db")
    assert [event.step for event in drawn] == [1, 4, 8]
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in drawn)
    histograms = shown.Histograms("histograms/scale_log2")
    assert [event.step for event in histograms] == list(range(1, 9))
    counts = histograms[-1].histogram_value
    assert sum(counts.bucket) == counts.num > 100
    assert -6 <= counts.min < counts.max < 9
    (*_, table) = shown.Tensors("worst_layers/table/text_summary")
    (text,) = table.tensor_proto.string_val
    header, _, *lines = text.decode().splitlines()
    assert header.startswith("| layer | depth | kind | sqnr_db | hint |")
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (None, 0),
        (SystemExit(), 0),
        (SystemExit(EXIT_CODE), EXIT_CODE),
        (SystemExit("error: what was wrong"), 1),
        (RuntimeError(), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_wandb_is_told_the_exit_code_of_the_process(
    error: BaseException | None, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda *, exit_code: told.append(exit_code)))
    with nullcontext() if error is None else pytest.raises(type(error)), finishing_wandb():
        if error is not None:
            raise error
    assert told == [exit_code]


def end_as_lightning_does() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def test_a_run_that_is_interrupted_twice_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda *, exit_code: told.append(exit_code)))
    with pytest.raises(SystemExit) as ended:
        finishing_wandb()(end_as_lightning_does)()
    assert told == [ended.value.code] == [130]
