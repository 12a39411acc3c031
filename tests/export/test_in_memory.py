"""A folder's tensors, mapped back to where the class has them, are those that it was written from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_models import Trained

from nvfp4_train.export.in_memory import input_scales, tensors_in_memory
from nvfp4_train.export.packed_folder import PackedFolder


# Tied; fused on disk; experts one by one, in one tensor with biases and inputs first, without a gate; tensors joined on disk.
@pytest.mark.parametrize("case", ["llama_tied", "phi3_fused", "qwen3_moe", "gpt_oss", "nemotron_h", "sarvam_moe", "hrm_text"])
def test_tensors_are_those_of_the_class(case: str, cases: Callable[[str], Trained], exported: Callable[[str], Path]) -> None:
    trained = cases(case)
    found = dict(tensors_in_memory(PackedFolder(exported(case), "compressed_tensors")))
    expected = trained.in_class(trained.compute_weights())
    assert expected.keys() >= found.keys()
    assert found.keys() >= {name for name in expected if "lm_head" not in name}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_input_scales_are_those_of_training(case: str, cases: Callable[[str], Trained], tmp_path: Path) -> None:
    trained = cases(case).with_quantized_inputs()
    trained.export(tmp_path / "export")
    found = input_scales(PackedFolder(tmp_path / "export", "compressed_tensors"))
    expected = {name: trained.state[f"{group[0]}.input_scale"] for group in trained.manifest.groups for name in group}
    assert {name: scale.item() for name, scale in found.items()} == {name: scale.item() for name, scale in expected.items()}
