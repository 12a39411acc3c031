"""What is measured, by hand; and models of experts, whose inputs are quantized in modules of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from nvfp4_train.export import export_compressed_tensors
from nvfp4_train.judge.loading import Loaded, Place, load
from nvfp4_train.judge.measure import measure, own_share, with_all
from nvfp4_train.judge.subjects import find_subject
from nvfp4_train.models.build import build_model
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits
from nvfp4_train.models.prepare import prepare
from nvfp4_train.quant.policy import QuantConfig

CPU = torch.device("cpu")
PLACE = Place(device=CPU, compute_dtype=torch.float32, is_shown=False)


@torch.no_grad()
def test_metrics_are_means_over_the_marked_positions_of_a_sequence() -> None:
    model, reference = tiny_model("llama").eval(), tiny_model("llama").eval()
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    torch.manual_seed(0)
    ids, mask = torch.randint(64, (3, 12)), torch.rand(3, 12) < 0.5
    mask[1] = False
    batches = [{"input_ids": ids[:2], "loss_mask": mask[:2]}, {"input_ids": ids[2:], "loss_mask": mask[2:]}]
    found = measure(model, reference, batches, CPU)
    q, p = (compute_logits(which, ids).double().log_softmax(-1)[:, :-1] for which in (model, reference))
    values = {
        "loss": -q.gather(-1, ids[:, 1:, None]).squeeze(-1),
        "kl": (p.exp() * (p - q)).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    counts = mask[:, 1:].double()
    assert found.positions.tolist() == counts.sum(1).tolist()
    assert found.values.keys() == values.keys()
    for name, value in values.items():
        expected = (value * counts).sum(1) / counts.sum(1).clamp(min=1)
        np.testing.assert_allclose(found.values[name], expected.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="must have a position that counts"):
        measure(model, reference, [{"input_ids": ids, "loss_mask": mask & False}], CPU)
    both = with_all({"a": found, "b": found})["all"]
    assert both.means() == pytest.approx(found.means())
    assert len(both.positions) == 6


def test_ranks_have_equally_many_calibration_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [{"input_ids": torch.tensor([[i]])} for i in range(5)]
    counted = []
    for rank in range(3):
        monkeypatch.setattr("nvfp4_train.judge.measure.rank_and_world_size", lambda rank=rank: (rank, 3))
        own = own_share(sequences)
        assert len(own) == 2
        counted += [int(batch["input_ids"]) for batch, is_counted in own if is_counted]
    assert sorted(counted) == list(range(5))


def logits(loaded: Loaded, ids: torch.Tensor, serving: str) -> torch.Tensor:
    with torch.no_grad(), loaded.serving(serving):
        return compute_logits(loaded.model, ids)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_model_and_its_export_compute_what_the_training_forward_does(family: str, tmp_path: Path) -> None:
    """Linears, and experts: gated; with inputs first and biases; without a gate. In W4A4 inputs are quantized, those of experts too."""
    tiny_model(family, torch.bfloat16).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    batches = [({"input_ids": torch.randint(64, (1, 64))}, True) for _ in range(8)]
    config = QuantConfig(rule="hessian", serve="w4a4")
    built = build_model(ModelConfig(path=str(tmp_path / "model")), config, CPU, compute_dtype=torch.float32)
    prepare(built.model, built.store, config, batches)
    built.store.update(refit=True)
    export_compressed_tensors(
        tmp_path / "export",
        weights=built.model.state_dict(),
        manifest=built.selection.manifest,
        config=built.model.config,
        state=built.store.state.state_dict(),
    )
    subjects = {
        name: find_subject(given.format(tmp_path)) for name, given in {"ptq": "ptq:{}/model", "export": "{}/export"}.items()
    }
    ids = torch.randint(64, (2, 16))
    expected = {}
    built.model.eval()
    for serving in ("w4a16", "w4a4"):
        with torch.no_grad(), built.inputs.serving(serving):
            expected[serving] = compute_logits(built.model, ids)
    assert not expected["w4a16"].equal(expected["w4a4"])
    for subject in subjects.values():
        loaded = load(subject, PLACE, quant=config, calibration=lambda _: batches)
        assert loaded.servings == ("w4a16", "w4a4")
        for serving, of_training in expected.items():
            assert logits(loaded, ids, serving).equal(of_training), (subject.kind, serving)
