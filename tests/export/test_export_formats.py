"""A format is a file that writes it and one that reads it; the option is its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_models import Trained, read_tensors
from test_export_checkpoint import run_script, save_checkpoint

from nvfp4_train.callbacks.export import Export
from nvfp4_train.export import ExportError, export_model, formats, readers, verify_export
from nvfp4_train.export.masters import FromMasters
from nvfp4_train.export.registry import find_format, find_reader, known_formats

# As ModelOpt has it: codes under the name of the weight, a multiplier of shape [], and a config file of its own.
TOY_FORMAT = """
from nvfp4_train.export.formats.base import Format

class Toy(Format):
    def tensors(self, module, weight):
        return {
            f"{module}.weight": weight.codes[0],
            f"{module}.scales": weight.block_scales[0],
            f"{module}.multiplier": weight.global_scale[0],
        }

    def configs(self, layout, quantized, manifest):
        experts = [matrix.module for name in layout.quantized_experts for matrix in layout.matrices(name)]
        return {"toy.json": {"modules": sorted({*quantized, *quantized.values(), *experts}), "rule": manifest.rule.block_scale}}

    def note(self, layout, quantized):
        return f"{len(quantized)} toys"

FORMAT = Toy()
"""
TOY_READER = """
import json
from nvfp4_train.export.readers.base import Reader
from nvfp4_train.export.readers.disk import E4M3_TABLE, decode_rows

class ToyReader(Reader):
    marker, codes, block_scales, stored_scale = "scales", "weight", "scales", "multiplier"

    def parts(self, rows, columns):
        return {"weight": ("U8", (rows, columns // 2)), "scales": ("F8_E4M3", (rows, columns // 16)), "multiplier": ("F32", ())}

    def check_config(self, folder, config):
        modules = json.loads((folder / "toy.json").read_text())["modules"]
        return modules.__contains__

    def decode(self, codes, block_scales, stored_scale):
        return decode_rows(codes, E4M3_TABLE[block_scales] * stored_scale)

READER = ToyReader()
"""


@pytest.fixture
def toy_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for package, text in ((formats, TOY_FORMAT), (readers, TOY_READER)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "toy.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    return "toy"


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "hrm_text"])
def test_a_format_is_added_by_two_files_and_chosen_by_name(
    name: str, toy_format: str, cases: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    model = cases(name)
    checkpoint = save_checkpoint(model, tmp_path / "run" / "last.ckpt")
    run_script(monkeypatch, checkpoint, tmp_path / "out", "--format", toy_format, "--max-shard-bytes", 20_000)
    num_linears = sum(name.endswith(".weight") for name in model.manifest.names)
    assert f"note: {num_linears} toys" in capsys.readouterr().out
    assert verify_export(tmp_path / "out", model.compute_weights(), format=toy_format).compared > 0
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    tensors = read_tensors(tmp_path / "out")
    same = cases(name)
    same.export(tmp_path / "usual")
    for key, tensor in read_tensors(tmp_path / "usual").items():
        if key.endswith(".weight_packed"):
            assert torch.equal(tensors[key.removesuffix("_packed")], tensor)
        elif key.endswith(".weight_global_scale"):
            assert tensors[key.replace("weight_global_scale", "multiplier")] == 1 / tensor
    Export(folder=str(tmp_path / "of a run"), format=toy_format)


def test_a_folder_of_one_format_is_none_of_another(toy_format: str, cases: Callable[[str], Trained], tmp_path: Path):
    model = cases("llama")
    export_model(tmp_path / "toy", FromMasters(model.weights, model.manifest, model.config), format=toy_format)
    with pytest.raises(ExportError, match="^config: "):
        verify_export(tmp_path / "toy")


def test_an_unknown_format_is_refused_before_the_run(tmp_path: Path):
    with pytest.raises(
        ValueError, match="callbacks.export.format must be one of compressed_tensors, modelopt, both, got 'gguf'"
    ):
        Export(folder=str(tmp_path / "out"), format="gguf")
    assert known_formats() == ["compressed_tensors", "modelopt"]


@pytest.mark.parametrize("name", known_formats())
def test_every_format_has_a_reader(name: str):
    assert callable(find_format(name).tensors)
    assert callable(find_reader(name).decode)
