from collections.abc import Sequence
from typing import Literal

import pytest

from nvfp4_train.run.options import check_options, check_trainer


class Target:
    def __init__(
        self,
        steps: int = 1,
        rate: float | None = 0.5,
        names: Sequence[str] = (),
        verbose: bool = False,
        mode: Literal["a", "b"] = "a",
    ) -> None: ...


def test_values_that_fit_are_accepted() -> None:
    check_options(Target, {"steps": 3, "rate": 1, "names": ["x"], "verbose": True, "mode": "b"}, "target")
    check_options(Target, {"rate": None}, "target")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, r"target\.step: no such option; did you mean steps\?"),
        ({"zzz": 3}, r"target\.zzz: no such option; target takes steps, rate"),
        ({"steps": "1o0"}, r"target\.steps must be int, got '1o0'"),
        ({"steps": True}, r"target\.steps must be int, got True"),
        ({"steps": None}, r"target\.steps must be int, got None"),
        ({"rate": "fast"}, r"target\.rate must be float or null, got 'fast'"),
        ({"names": "x"}, r"target\.names must be a list of str, got 'x'"),
        ({"names": ["x", 3]}, r"target\.names must be a list of str, got \['x', 3\]"),
        ({"verbose": "flase"}, r"target\.verbose must be bool, got 'flase'"),
        ({"mode": "c"}, r"target\.mode must be 'a' or 'b', got 'c'"),
    ],
)
def test_slips_are_refused_with_their_location(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(Target, options, "target")


@pytest.mark.parametrize("devices", [1, 3])
def test_devices_are_the_ranks_that_torchrun_started(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_trainer({"devices": 2, "num_nodes": 1})
    with pytest.raises(ValueError, match=f"must be the 2 ranks that this run was started with, got {devices} times 1"):
        check_trainer({"devices": devices, "num_nodes": 1})
