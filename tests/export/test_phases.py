"""Whoever asks for it is told how far an export is, to the last byte."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from export_models import Trained

from nvfp4_train.export import verify_export
from nvfp4_train.export.convert import convert_folder


class Recorded:
    """Counts what it is told, by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[int, int]] = {}
        self._done = 0

    @contextmanager
    def __call__(self, description: str, *, total: int, unit: str) -> Iterator["Recorded"]:
        assert unit == "B"
        self._done = 0
        yield self
        self.phases[description] = self._done, total

    def advance(self, n: int = 1, /) -> None:
        assert n > 0
        self._done += n


def test_every_byte_of_an_export_is_counted(cases: Callable[[str], Trained], tmp_path: Path) -> None:
    model = cases("qwen2_bias")
    exporting, verifying, converting, decoding = (Recorded() for _ in range(4))
    num_bytes = model.export(tmp_path / "out", progress=exporting).verified.bytes
    assert exporting.phases["writing"] == (num_bytes, num_bytes)
    # Scales of whole matrices, 4 bytes each, are not counted.
    done, total = exporting.phases["verifying"]
    assert total - 4 * model.num_matrices() == done
    assert total == num_bytes
    verify_export(tmp_path / "out", model.compute_weights(), progress=verifying)
    assert verifying.phases == {"verifying": (done, total)}
    convert_folder(tmp_path / "out", tmp_path / "modelopt", to="modelopt", progress=converting)
    assert converting.phases == {"writing": (num_bytes, num_bytes)}
    convert_folder(tmp_path / "out", tmp_path / "bf16", to="bf16", progress=decoding)
    assert {done == total for done, total in decoding.phases.values()} == {True}
    assert list(decoding.phases) == ["writing", "comparing"]
