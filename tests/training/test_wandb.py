"""What wandb is told: steps that go on over the segments of a run, how each of them ended, and one line for the user."""

import json
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import launch
from wandb.proto.wandb_internal_pb2 import Record

from nvfp4_train.callbacks.preemption import EXIT_CODE
from nvfp4_train.run.process import finishing_wandb

OPTIONS = ("logger=wandb", "trainer.max_steps=8", "trainer.log_every_n_steps=1", "quant.start_step=0", "ckpt_path=auto")
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
    histories = [record.history for record in records(segment) if record.WhichOneof("record_type") == "history"]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item} for history in histories
    ]


def exit_codes(segment: Path) -> list[int]:
    return [record.exit.exit_code for record in records(segment) if record.WhichOneof("record_type") == "exit"]


def test_segments_of_a_run(tmp_path: Path) -> None:
    """A run is preempted, killed, refused, and ends: four segments of one wandb run, whose steps go on."""
    run_dir = tmp_path / "run"
    stops = (stop(signal.SIGTERM, 2), stop(signal.SIGKILL, 5), ("quant.start_step=9",), ())
    results = [launch(run_dir, *OPTIONS, *options, check=False) for options in stops]
    assert [result.returncode for result in results] == [EXIT_CODE, -signal.SIGKILL, 1, 0], results[-1].stderr[-2000:]

    segments = sorted((run_dir / "wandb").glob("offline-run-*"))
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
