"""What is decoded by the table is what the reader decodes, and a wrong value is found wherever it lies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import Trained, read_tensors
from safetensors.torch import save_file

from nvfp4_train.export import ExportError, values, verify_export
from nvfp4_train.export.readers.disk import E4M3_TABLE, StoredTensor, to_bf16_bits
from nvfp4_train.export.registry import find_reader
from nvfp4_train.export.values import Packed, decoding_table


@pytest.mark.parametrize("format", ["compressed_tensors", "modelopt"])
@pytest.mark.parametrize("stored_scale", [2.0**-9, 2.0**7, 0.0123, 391.7])
def test_the_table_decodes_as_the_reader_does(format: str, stored_scale: float, tmp_path: Path) -> None:
    """Every byte of codes under every block scale that is finite."""
    reader, scale = find_reader(format), np.float32(stored_scale)
    finite = np.flatnonzero(np.isfinite(E4M3_TABLE)).astype(np.uint8)
    codes = np.tile(np.arange(256, dtype=np.uint8), (len(finite), 1))
    scales = np.repeat(finite[:, None], 32, axis=1)
    parts = []
    for name, array in (("codes", codes), ("scales", scales)):
        array.tofile(tmp_path / name)
        parts.append(StoredTensor(tmp_path / name, "U8", array.shape, 0, array.nbytes))
    packed = Packed(reader, *parts, scale)
    assert np.array_equal(packed.decode_all(), to_bf16_bits(reader.decode(codes, scales, scale)))
    for factor in (1 - 2.0**-21, 1 + 2.0**-21):
        expected = to_bf16_bits(reader.decode(codes, scales, scale) * np.float32(factor))
        assert np.array_equal(packed.decode(codes, scales, factor), expected)


def test_tables_are_made_once_for_a_global_scale() -> None:
    reader, scale = find_reader("modelopt"), np.float32(0.5).tobytes()
    assert decoding_table(reader.decode, scale, 1) is decoding_table(reader.decode, scale, 1)
    assert decoding_table(reader.decode, scale, 1) is not decoding_table(find_reader("compressed_tensors").decode, scale, 1)


PLACES = [("model.layers.0.mlp.down_proj", (0, 0)), ("model.layers.1.self_attn.q_proj", (-1, -1)), ("model.norm", (17,))]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("module", "place"), PLACES)
def test_one_wrong_value_is_found_in_any_piece(
    small: bool,
    module: str,
    place: tuple[int, ...],
    cases: Callable[[str], Trained],
    exported: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small:
        monkeypatch.setattr(values, "READ_ELEMENTS", 640)
        monkeypatch.setattr(values, "DECODED_ELEMENTS", 128)
    expected = dict(cases("llama").compute_weights())
    assert verify_export(exported("llama"), expected).compared == len(expected)
    changed = expected[f"{module}.weight"].clone()
    changed.view(torch.int16)[place] ^= 1
    with pytest.raises(ExportError, match=f"^values: {module}") as caught:
        verify_export(exported("llama"), expected | {f"{module}.weight": changed})
    if len(place) == 2:
        assert f"decodes to 1 of {changed.numel()} values" in str(caught.value)


def test_of_several_wrong_tensors_the_first_of_the_model_is_named(
    cases: Callable[[str], Trained], own_copy: Callable[[str], Path]
) -> None:
    folder = own_copy("llama")
    tensors = read_tensors(folder)
    for layer in (1, 0):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight_packed"][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for _ in range(5):
        with pytest.raises(ExportError, match=r"^values: model\.layers\.0\.mlp\.down_proj decodes to 1 of"):
            verify_export(folder, cases("llama").compute_weights())
