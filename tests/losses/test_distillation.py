"""The loss of distillation: against whole logits and autograd, for every way in which models make logits."""

import warnings
from typing import Any

import pytest
import torch
from test_module import fit, make
from tiny_models import tiny_config
from torch import Tensor, nn

from nvfp4_train.losses import chunked
from nvfp4_train.losses.distillation import DistillationLoss
from nvfp4_train.losses.divergence import Objective, Positions, row_losses
from nvfp4_train.models.build import BuiltModel, ModelBuilder, build_model
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits
from nvfp4_train.models.sharding import call_within
from nvfp4_train.optim import OptimConfig
from nvfp4_train.quant.policy import QuantConfig

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    # A tied embedding, and a soft cap.
    "gemma2": {"tie_word_embeddings": True},
    # Logits that are scaled, by a power of two and by another number.
    "cohere": {},
    "granite": {"logits_scaling": 3.0},
    # A head with a bias.
    "phi": {},
    # Hidden states that are scaled before the head, so logits are kept whole.
    "minicpm3": {
        "dim_model_base": 16,
        "num_key_value_heads": 4,
        "head_dim": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def build(family: str = "llama", dtype: torch.dtype = torch.float32, **loss: Any) -> tuple[BuiltModel, DistillationLoss]:
    """A student in NVFP4 and its loss, with the student before quantization for a teacher."""
    torch.manual_seed(0)
    config = tiny_config(family)
    config = ModelConfig(config=dict(config.config or {}) | FAMILIES.get(family, {}))
    built = build_model(config, QuantConfig(), CPU, compute_dtype=dtype)
    sharpen(built.model)
    made = DistillationLoss(**loss)
    made.prepare(ModelBuilder(student=built.model, config=config, device=CPU, compute_dtype=dtype))
    built.store.update()
    return built, made


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """Let distributions be as sharp as those of trained models."""
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1)


def batch(masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 9, generator=generator) < 0.5
    ids = torch.randint(3, 64, (2, 9), generator=generator)
    return {"input_ids": ids, "loss_mask": mask} if masked else {"input_ids": ids}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class _Whole(torch.autograd.Function):
    """The objective of whole logits, by `row_losses`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, positions: Positions, objective: Objective) -> Tensor:
        gradient = torch.empty_like(student)
        losses = row_losses(student, teacher, positions, objective, gradient)
        ctx.save_for_backward(gradient)
        return objective.mix(*losses.sum(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str, masked: bool) -> None:
    options: dict[str, Any] = {"divergence": "jsd", "temperature": 2.0, "cross_entropy": 0.25}
    built, loss = build(family, chunk_tokens=5, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value, metrics = loss(built.model, batch(masked))
    (3 * value).backward()
    found = gradients(built.model)

    assert any("keeps those of all positions" in str(w.message) for w in caught) == (family == "minicpm3")
    own = compute_logits(built.model, batch()["input_ids"]).flatten(0, 1)
    of_teacher = compute_logits(loss.teacher, batch()["input_ids"]).flatten(0, 1)
    expected = _Whole.apply(own, of_teacher, Positions.of(batch(masked)), Objective(**options))
    (3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0.75 * metrics["divergence"] + 0.25 * metrics["cross_entropy"] == pytest.approx(value.item())
    whole = gradients(built.model)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_a_student_that_is_not_quantized_is_its_teacher() -> None:
    """In the dtype of the computation the teacher has the student's served values, and none of its memory."""
    for dtype in (torch.float32, torch.bfloat16):
        built, loss = build(dtype=dtype)
        with built.store.masters_only(), torch.no_grad():
            value, metrics = loss(built.model, batch())
        assert abs(value.item()) < 1e-6
        assert metrics["top1_agreement"] == 1
        value, _ = loss(built.model, batch())
        assert value.item() > 1e-4
        with torch.no_grad():
            before = loss(built.model, batch())[1]["kl"]
            built.model.get_parameter("model.embed_tokens.weight").mul_(2)
            assert loss(built.model, batch())[1]["kl"] != pytest.approx(before.item(), rel=1e-2)
            with built.store.masters_only():
                assert loss(built.model, batch())[1]["kl"] > 1e-3, "the teacher stays as it was"


def test_the_teacher_is_frozen_and_in_the_dtype_of_the_computation() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, loss = build(dtype=dtype)
        assert loss.teacher is not None
        assert not loss.teacher.training
        for parameter in loss.teacher.parameters():
            assert not parameter.requires_grad
            assert parameter.dtype is dtype
            assert parameter.equal(parameter.bfloat16().to(dtype)), "bf16 values"


def test_in_training_the_whole_vocabulary_exists_for_a_chunk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    built, loss = build(chunk_tokens=4)
    seen = []
    plain = chunked.divergence.row_losses

    def row_losses(student: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(student.shape))
        return plain(student, *args)

    monkeypatch.setattr(chunked.divergence, "row_losses", row_losses)
    loss(built.model, batch())
    assert seen == [(4, 64)] * 4 + [(2, 64)]
    assert not any(parameter.grad is not None for parameter in loss.teacher.parameters())


def test_a_part_of_a_padded_vocabulary_is_compared() -> None:
    padded = torch.randn(6, 24, requires_grad=True)
    student = chunked.WholeLogits(padded[:, :20])
    assert student.logits(slice(2, 4)).is_contiguous()
    positions = Positions.of({"input_ids": torch.randint(0, 20, (2, 3))})
    found = chunked.mean_losses(student, chunked.WholeLogits(torch.zeros(6, 20)), positions, Objective(), num_rows=4)
    chunked.with_gradients(found["divergence"], student).backward()
    assert padded.grad is not None
    assert padded.grad[:, :20].any()
    assert not padded.grad[:, 20:].any()


def test_chunks_are_as_many_rows_as_fit() -> None:
    student = chunked.ProjectedLogits(torch.zeros(5000, 4), torch.zeros(128256, 4), None)
    rows = chunked._chunks(student, None, chunked.FUSED_BYTES)
    assert rows[0] == slice(0, 768)
    assert rows[-1].stop >= 5000
    assert 768 * 128256 * chunked.FUSED_BYTES <= chunked.CHUNK_BYTES


def test_a_frozen_head_takes_no_gradient() -> None:
    built, loss = build()
    built.model.lm_head.requires_grad_(False)
    loss(built.model, batch())[0].backward()
    found = gradients(built.model)
    assert "lm_head.weight" not in found
    assert found["model.layers.0.mlp.up_proj.weight"].abs().max() > 0


def test_a_mask_without_positions_gives_0_and_gradients_of_0() -> None:
    built, loss = build(cross_entropy=0.5)
    empty = batch() | {"loss_mask": torch.zeros(2, 9, dtype=torch.bool)}
    value, _ = loss(built.model, empty)
    value.backward()
    assert value.item() == 0
    assert all(not gradient.any() for gradient in gradients(built.model).values())
    with torch.no_grad():
        assert {name: metric.item() for name, metric in loss(built.model, empty)[1].items()} == {
            "kl": 0, "top1_agreement": 0, "cross_entropy": 0,
        }  # fmt: skip


def test_tokens_that_are_not_marked_are_context_alone() -> None:
    """What follows the last marked token changes nothing."""
    built, loss = build(cross_entropy=0.5)
    first = batch() | {"loss_mask": torch.zeros(2, 9, dtype=torch.bool)}
    first["loss_mask"][:, 2:5] = True
    second = first | {"input_ids": first["input_ids"].clone()}
    second["input_ids"][:, 5:] = 7
    assert loss(built.model, first)[0].item() == pytest.approx(loss(built.model, second)[0].item(), rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_what_a_sequence_adds_is_its_own_mean_times_its_share_of_the_positions(masked: bool, chunk_tokens: int | None) -> None:
    built, loss = build(cross_entropy=0.25, chunk_tokens=chunk_tokens)
    both = batch(masked)
    if masked:
        # As many in both rows otherwise.
        both["loss_mask"][0, :5] = False
    parts = loss.per_sequence(built.model, both)
    total, metrics = loss(built.model, both)
    counts = both["loss_mask"][:, 1:].sum(1) if masked else torch.full((2,), 9)
    assert len(set(counts.tolist())) == (2 if masked else 1), "shares differ"
    for name, expected in {"loss": total, **metrics}.items():
        torch.testing.assert_close(parts[name].sum(), expected)
    for row, share in enumerate(counts / counts.sum()):
        alone = loss(built.model, {key: value[row : row + 1] for key, value in both.items()})
        for name, expected in {"loss": alone[0], **alone[1]}.items():
            torch.testing.assert_close(parts[name][row], share * expected, rtol=2e-3, atol=1e-6)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path) -> None:
    other, _ = build()
    config = ModelConfig(config=dict(tiny_config("llama").config or {}) | {"vocab_size": 80})
    teacher = build_model(config, QuantConfig(), CPU, compute_dtype=torch.float32).model
    teacher.save_pretrained(tmp_path)
    loss = DistillationLoss(teacher_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"loss\.teacher_path='.*' must name .* vocabulary of 64 tokens, got one of 80"):
        loss.prepare(ModelBuilder(student=other.model, config=tiny_config("llama"), device=CPU))


def test_another_teacher_is_that_of_its_folder(tmp_path) -> None:
    teacher, _ = build("qwen3")
    teacher.model.save_pretrained(tmp_path)
    student, _ = build("llama")
    loss = DistillationLoss(teacher_path=str(tmp_path))
    loss.prepare(ModelBuilder(student=student.model, config=tiny_config("llama"), device=CPU, compute_dtype=torch.float32))
    with teacher.store.masters_only():
        expected = compute_logits(teacher.model, batch()["input_ids"])
        assert torch.equal(compute_logits(loss.teacher, batch()["input_ids"]), expected)


@pytest.mark.parametrize("tokens", [0, -3])
def test_a_chunk_has_at_least_a_position(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"loss.chunk_tokens must be at least 1, or null, got {tokens}"):
        DistillationLoss(chunk_tokens=tokens)


def test_what_is_called_within_a_model_sees_its_served_values() -> None:
    built, loss = build(dtype=torch.bfloat16)
    head = built.model.lm_head
    assert head.weight.dtype == torch.float32
    assert call_within(built.model, lambda x: (x, head.weight.dtype), 3) == (3, torch.bfloat16)
    assert head.weight.dtype == torch.float32
    with pytest.raises(ZeroDivisionError):
        call_within(built.model, lambda: 1 / 0)
    assert head.weight.dtype == torch.float32
    assert loss.teacher is not None
    assert call_within(loss.teacher, lambda: loss.teacher.lm_head.weight.dtype) == torch.bfloat16


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")])
def test_a_run_lowers_the_divergence_and_reports_it(precision: str, dtype: str) -> None:
    module = make(compute_dtype=dtype, start_step=2)
    module.optim_config = OptimConfig(lr=1e-3)
    sharpen(module.model)
    module.loss = DistillationLoss()
    module.loss.prepare(
        ModelBuilder(student=module.model, config=module.model_config, device=CPU, compute_dtype=getattr(torch, dtype))
    )
    assert not any("teacher" in name for name in module.state_dict())
    fit(module, max_steps=20, limit_val_batches=1.0, precision=precision)
    results = module.results
    assert {f"val/{metric}_ptq" for metric in ("loss", "kl", "top1_agreement", "cross_entropy")} <= results.keys()
    assert results["val/kl_master_at_switch"] == pytest.approx(0, abs=1e-6), "until the switch there is nothing to learn"
    assert results["val/kl_quantized"] < 0.7 * results["val/kl_ptq"]
