"""Every model type trains, exports and is read back as the last measurement says: with difference 0.0 wherever it trains at all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from cases import CASES, IN_EVERY_RUN, KINDS, fields_of
from expectations import README, measured_with, read_outcomes, readme_with, table
from family import class_of_folder, config_of, logits_of, random_ids, require_same_tensors, run_family
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from nvfp4_train.export.formats.compressed_tensors import FORMAT
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.policy import QuantConfig, select

OUTCOMES = read_outcomes()
PARAMETERS = [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("model_type", PARAMETERS)
def test_what_is_trained_is_what_others_read(model_type: str, tmp_path: Path) -> None:
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"needs a transformers that knows {model_type}, this is {transformers.__version__}")
    outcome, expected = run_family(model_type, fields_of(model_type), tmp_path), OUTCOMES[model_type]
    if transformers.__version__ != measured_with():
        expected = replace(expected, packed=outcome.packed)
        if outcome.failed and not computes_its_original(model_type, tmp_path):
            pytest.skip(f"needs a transformers that computes {model_type} in bf16, this is {transformers.__version__}")
    assert outcome == expected, "python benchmarks/families.py --write takes over a change that is meant"


def computes_its_original(model_type: str, folder: Path) -> bool:
    """Whether transformers can compute the bf16 model at all, before anything of ours touches it."""
    cls = class_of_folder(config_of(model_type, fields_of(model_type)))
    try:
        return bool(logits_of(cls, folder / "bf16", random_ids(seed=1)).isfinite().all())
    except Exception:  # whatever a reader raises
        return False


def test_no_type_that_trains_is_read_with_other_logits() -> None:
    assert {name: outcome.difference for name, outcome in OUTCOMES.items() if outcome.difference} == {}
    exact = [name for name, outcome in OUTCOMES.items() if not outcome.refused and not outcome.failed]
    assert len(exact) >= 40
    assert {kind for kind, names in KINDS.items() if set(names) & set(exact)} >= {"dense", "experts", "hybrid"}


def test_every_case_has_an_outcome_and_the_readme_shows_it() -> None:
    assert list(OUTCOMES) == list(CASES)
    assert README.read_text() == readme_with(OUTCOMES), "python benchmarks/families.py --write writes the table"
    rows = table(OUTCOMES)
    assert all(name in rows for name in CASES)


def test_an_export_tells_whether_transformers_loads_it() -> None:
    """Of the types of every run. Of all types it does not foresee what ctrl, modernbert-decoder and xlstm do."""
    wrong = []
    for model_type in IN_EVERY_RUN:
        if OUTCOMES[model_type].refused or model_type not in CONFIG_MAPPING_NAMES:
            continue
        layout = HubLayout(config_of(model_type, fields_of(model_type)))
        names = select(layout.model, QuantConfig(), layout).manifest.names
        linears = {name.removesuffix(".weight"): "" for name in names if name.endswith(".weight")}
        note = FORMAT.note(layout.with_quantized(names), linears)
        if (note is None) != OUTCOMES[model_type].packed:
            wrong.append((model_type, note))
    assert not wrong


@torch.no_grad()
def test_a_lost_or_changed_tensor_is_noticed(tmp_path: Path) -> None:
    assert run_family("llama", fields_of("llama"), tmp_path).difference == 0
    decoded, ids = tmp_path / "decoded", random_ids(seed=1)
    tensors = load_file(decoded / "model.safetensors")
    before = logits_of(LlamaForCausalLM, decoded, ids)
    tensors["model.layers.1.mlp.down_proj.weight"][0] *= 1.01
    save_file(tensors, decoded / "model.safetensors", {"format": "pt"})
    assert not torch.equal(logits_of(LlamaForCausalLM, decoded, ids), before)
    tensors.pop("model.norm.weight")
    save_file(tensors, decoded / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lost 1 tensors of the original \(model\.norm\.weight"):
        require_same_tensors(tmp_path / "bf16", decoded)
    with pytest.raises(ValueError, match=r"missing_keys.*model\.norm\.weight"):
        logits_of(LlamaForCausalLM, decoded, ids)
