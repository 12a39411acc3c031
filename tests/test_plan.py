"""The plan's numbers against a model small enough to count by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nvfp4_train.losses.next_token import next_token_loss
from nvfp4_train.models.build import freeze, quantize
from nvfp4_train.models.causal_lm import ModelConfig, decoder_layers, load_model
from nvfp4_train.plan import RunShape, make_plan, meta_model
from nvfp4_train.plan_sizes import layer_activation_bytes
from nvfp4_train.quant.changes import Changes
from nvfp4_train.quant.policy import QuantConfig
from nvfp4_train.quant.statistics import Sqnr

TINY = ModelConfig(
    config={
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
)
# One layer: q and o 32 x 32, k and v 16 x 32, gate and up 48 x 32, down 32 x 48, two norms of 32.
QUANTIZED = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
LAYER = QUANTIZED + 2 * 32
EMBEDDING = HEAD_WEIGHT = 50 * 32
HEAD = HEAD_WEIGHT + 32


def rows(
    shape: RunShape,
    quant: QuantConfig = QuantConfig(),  # noqa: B008 (frozen)
    *,
    frozen: Sequence[str] = (),
    teacher: ModelConfig | None = None,
) -> dict[str, tuple[float, float]]:
    model = meta_model(TINY)
    freeze(model, frozen)
    plan = make_plan(model, quant, shape, None if teacher is None else meta_model(teacher))
    assert plan.num_parameters == 2 * LAYER + EMBEDDING + HEAD
    assert plan.num_quantized == 2 * QUANTIZED
    return {
        row.name: (row.bf16, row.packed)
        for row in [*plan.memory, *plan.parts, *plan.moments, plan.peak, *plan.wire, plan.wire_total]
    }


def test_two_gpus_by_hand() -> None:
    """Every row count is even, so nothing is padded."""
    found = rows(RunShape(world_size=2, micro_batches=3, batch_size=1, seq_len=10))
    n, q = LAYER + (EMBEDDING + HEAD) // 2, QUANTIZED
    assert found["masters"] == (4 * n, 4 * n)
    assert found["optimizer (AdamW)"] == (8 * n, 8 * n)
    assert found["gradients"] == (8 * n, 8 * n), "of the window, whole"
    # With the norms that travel beside them.
    assert found["quantized shards"] == (0, 0.5625 * q + 2 * 64)

    # h = q = 32, k = 16, f = 48, 4 heads.
    activations = 10 * 2 * (16 * 32 + 4 * 32 + 4 * 16 + 4 * 4 + 8 * 48)
    assert found["activations"] == (activations,) * 2
    assert found["logits"] == (12 * 50 * 10,) * 2
    assert found["at the loss"] == (2 * HEAD + activations + 12 * 50 * 10,) * 2
    fixed = 2 * HEAD + 2 * HEAD + 2 * (2 * LAYER) + 2 * LAYER + 4 * LAYER + activations
    # The gathered bytes of a layer.
    in_layer = (fixed + 2 * LAYER, fixed + 0.5625 * QUANTIZED + 2 * 64)
    assert found["in the backward of a layer"] == in_layer
    # fp32 embedding: weight, gradient, reduction; bf16 head: weight, gradient, fp32 reduction.
    assert found["at the end of the backward"] == (12 * EMBEDDING + 8 * HEAD,) * 2
    assert found["peak"] == (20 * n + in_layer[0], 20 * n + 0.5625 * q + 2 * 64 + in_layer[1])

    layers = (2 * LAYER, 0.5625 * q + 2 * 64)
    for name, head in (("all-gather, forward", HEAD), ("all-gather, backward", 0)):
        assert found[name] == tuple(3 * (layer + 2 * EMBEDDING + head) for layer in layers), name
    assert found["reduce-scatter"] == (4 * n, 4 * n)
    assert found["all-reduce of copies"] == (0, 0)


# h = q = 32, k = 16, f = 48, 4 heads: bytes of a token in a layer.
ACTIVATIONS = 16 * 32 + 4 * 32 + 4 * 16 + 4 * 4 + 8 * 48
QAD = {"logits_at_once": 4, "compared_layers": 2}


def test_a_distilled_student_and_its_teacher_by_hand() -> None:
    """The teacher is the model itself, and nothing of it travels packed."""
    found = rows(RunShape(world_size=2, micro_batches=3, seq_len=10, **QAD), teacher=TINY)
    plain = rows(RunShape(world_size=2, micro_batches=3, seq_len=10))
    n = LAYER + (EMBEDDING + HEAD) // 2
    assert found["teacher"] == (2 * n, 2 * n)
    assert found["all-gather, teacher"] == (3 * 2 * n,) * 2
    # fp32 logits of 4 tokens of both with a bf16 gradient, hidden states, and the fp32 gradient of the head.
    logits = 10 * 50 * 4 + 6 * 32 * 10 + 4 * 50 * 32
    hidden = 2 * 4 * 32 * 10
    activations = 10 * 2 * ACTIVATIONS
    assert found["logits"] == (logits,) * 2
    assert found["hidden states, of both"] == (hidden,) * 2
    assert found["at the loss"] == (2 * HEAD + 2 * HEAD + activations + hidden + logits,) * 2
    # Two layers, and what is received of one.
    assert found["in the teacher's forward"] == (2 * HEAD + 2 * HEAD + activations + hidden + 3 * 2 * LAYER,) * 2
    for name, more in (("in the backward of a layer", hidden), ("on the wire", 3 * 2 * n), ("masters", 0), ("gradients", 0)):
        assert found[name] == tuple(bytes_without + more for bytes_without in plain[name]), name
    moments = ("in the teacher's forward", "at the loss", "in the backward of a layer", "at the end of the backward")
    largest = [max(found[name][column] for name in moments) for column in (0, 1)]
    assert found["peak"] == (22 * n + largest[0], 22 * n + found["quantized shards"][1] + largest[1])


def test_hidden_states_count_twice_where_they_are_more_than_the_logits() -> None:
    options = {"world_size": 2, "seq_len": 10, "logits_at_once": 1}
    few, many = (rows(RunShape(**options, compared_layers=layers), teacher=TINY) for layers in (0, 6))
    hidden = 6 * 4 * 32 * 10
    assert "hidden states, of both" not in few
    assert hidden < few["logits"][0] < 3 * hidden
    assert many["at the loss"][0] - few["at the loss"][0] == hidden
    most = rows(RunShape(**options, compared_layers=18), teacher=TINY)
    assert most["at the loss"][0] - few["at the loss"][0] == 2 * 3 * hidden - few["logits"][0]


def test_another_teacher_has_a_size_of_its_own() -> None:
    """One with a tied embedding, which travels in bf16 as everything else of it, and one layer more."""
    fields = {**(TINY.config or {}), "tie_word_embeddings": True, "num_hidden_layers": 3}
    found = rows(RunShape(world_size=2, seq_len=10, **QAD), teacher=ModelConfig(config=fields))
    n = (3 * LAYER + HEAD) // 2
    assert found["teacher"] == (2 * n, 2 * n)
    assert found["all-gather, teacher"] == (2 * n, 2 * n)


def test_more_logits_than_a_step_has_tokens_do_not_exist() -> None:
    shapes = (RunShape(world_size=2, seq_len=10, logits_at_once=number) for number in (10, 1000))
    assert len({rows(shape, teacher=TINY)["logits"] for shape in shapes}) == 1


def test_a_fitted_rule_keeps_hessians_and_steps() -> None:
    """Of two layers: inputs of q/k/v, o and gate/up 32 wide, and of down 48; every rank has all of them, and its rows' steps."""
    found = rows(RunShape(world_size=2, seq_len=10), QuantConfig(rule="hessian"))
    held = 2 * 64 * (3 * 32 + 48) + QUANTIZED / 16
    assert found["Hessians and steps"] == (0, held)
    without = rows(RunShape(world_size=2, seq_len=10), QuantConfig(rule="mse"))
    assert "Hessians and steps" not in without
    assert found["peak"] == (without["peak"][0], without["peak"][1] + held)


def test_statistics_keep_sampled_rows() -> None:
    """With rows=16: of a rank's half of each weight, 16 rows of q and o, 8 of k and v, 24 of gate and up, 16 of down 48 wide."""
    model, shape = meta_model(TINY), RunShape(world_size=2, seq_len=10)
    kept, without = (
        make_plan(model, QuantConfig(), shape, statistics=statistics) for statistics in ([Changes(), Sqnr()], [Sqnr()])
    )
    (row,) = [row for row in kept.memory if row.name == "last look of statistics"]
    assert (row.bf16, row.packed) == (0, 2 * 5.0625 * ((1 + 1 + 1 + 1 + 2 + 2) * 32 + 48))
    assert kept.peak.packed == without.peak.packed + row.packed
    assert not [row for row in without.memory if row.name == "last look of statistics"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantized_inputs_are_saved_packed(checkpointing: bool) -> None:
    shape = RunShape(world_size=2, seq_len=10, gradient_checkpointing=checkpointing)
    plain, packed = (rows(shape, QuantConfig(activations=activations)) for activations in ("none", "nvfp4"))
    # Of q/k/v and gate/up in place of bf16, of down too; attention keeps its own output beside the packed one.
    less = 1.4375 * (2 * 32 + 48) - 0.5625 * 32
    if checkpointing:
        assert packed["activations"] == plain["activations"] == (10 * 2 * 2 * 32,) * 2
    else:
        assert plain["activations"] == (10 * 2 * ACTIVATIONS,) * 2
        assert packed["activations"] == (10 * 2 * ACTIVATIONS, 10 * 2 * (ACTIVATIONS - less))
    recomputed = 10 * less if checkpointing else 10 * 2 * less
    name = "in the backward of a layer"
    assert packed[name] == (plain[name][0], plain[name][1] - recomputed)


def test_what_is_frozen_has_no_gradient_and_no_optimizer_state() -> None:
    """An embedding that is frozen is not gathered for the backward, and the gradient of a head adds up nowhere."""
    shape = {"world_size": 2, "replicate_size": 1, "seq_len": 10, "logits_at_once": 4}
    found, trained = (rows(RunShape(**shape), frozen=frozen, teacher=TINY) for frozen in (("*embed_tokens*", "lm_head*"), ()))
    # The final norm, which is of the head, still trains.
    n, t = LAYER + (EMBEDDING + HEAD) // 2, LAYER + 16
    assert found["masters"] == trained["masters"] == (4 * n, 4 * n)
    assert found["optimizer (AdamW)"] == (8 * t, 8 * t)
    assert found["gradients"] == (4 * t, 4 * t)
    assert found["reduce-scatter"] == (4 * t, 4 * t)
    assert found["teacher"] == trained["teacher"]
    assert trained["logits"][0] - found["logits"][0] == 4 * HEAD_WEIGHT
    assert trained["in the backward of a layer"][0] - found["in the backward of a layer"][0] == 2 * HEAD_WEIGHT
    assert found["at the end of the backward"] == (2 * HEAD + (2 + 4) * 32,) * 2
    assert trained["all-gather, backward"][0] - found["all-gather, backward"][0] == 2 * EMBEDDING
    window = rows(RunShape(**shape | {"micro_batches": 2}), frozen=("*embed_tokens*", "lm_head*"), teacher=TINY)
    assert window["gradients"] == (4 * (2 * LAYER + 32),) * 2


def test_rows_are_padded_and_replicas_reduced() -> None:
    """Two copies of three shards: 32, 16 and 50 rows do not divide by 3."""
    found = rows(RunShape(world_size=6, replicate_size=2, seq_len=10))
    quantized = 11 * 32 * 2 + 6 * 32 * 2 + 16 * 32 * 2 + 11 * 48
    layer = quantized + 2 * 11
    n = 2 * layer + 17 * 32 * 2 + 11
    assert found["masters"] == (4 * n, 4 * n)
    assert found["gradients"] == (4 * n, 4 * n)
    assert found["quantized shards"] == (0, 0.5625 * 2 * quantized + 2 * 2 * 2 * 11)
    assert found["reduce-scatter"] == (2 * 4 * n,) * 2
    assert found["all-reduce of copies"] == (4 * n,) * 2


def test_one_gpu_sends_nothing() -> None:
    found = rows(RunShape(world_size=1, seq_len=10))
    assert found["on the wire"] == (0, 0)
    assert found["quantized shards"] == (0, 2 * (0.5625 * QUANTIZED + 2 * 64))


def test_weights_that_are_gathered_as_bf16_are_held_and_sent_as_such() -> None:
    found = rows(RunShape(world_size=2, seq_len=10), QuantConfig(gather="bf16"))
    assert found["quantized shards"] == (0, 2 * LAYER)
    assert found["on the wire"][0] == found["on the wire"][1]


def test_without_quantization_both_columns_are_the_same() -> None:
    plan = make_plan(meta_model(TINY), QuantConfig(enabled=False), RunShape(world_size=2, seq_len=10))
    assert plan.num_quantized == 0
    assert all(row.bf16 == row.packed for row in [*plan.memory, *plan.parts, *plan.moments, plan.peak, *plan.wire])


def test_without_resharding_weights_are_gathered_once_and_stay() -> None:
    resharded, kept = (rows(RunShape(world_size=2, seq_len=10, reshard_after_forward=flag)) for flag in (True, False))
    assert kept["all-gather, backward"] == (0, 0)
    assert kept["all-gather, forward"] == resharded["all-gather, forward"]
    assert kept["at the loss"][0] - resharded["at the loss"][0] == 2 * 2 * LAYER


WIDER = {**(TINY.config or {}), "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_key_value_heads": 4}
MIXTRAL = {**WIDER, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 3}
QWEN3_MOE = {
    **WIDER, "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "head_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "checkpointing"),
    [
        (WIDER, False),
        (WIDER, True),
        ({**WIDER, "model_type": "qwen3", "head_dim": 32}, False),
        (MIXTRAL, False),
        (QWEN3_MOE, False),
    ],
    ids=["llama", "llama, checkpointing", "qwen3", "mixtral", "qwen3_moe"],
)
def test_activations_are_what_autograd_saves(fields: dict[str, Any], checkpointing: bool) -> None:
    """Counted on a real step; masters, tables shared by all layers and the head are left out of the count."""
    model = load_model(ModelConfig(config=fields, gradient_checkpointing=checkpointing))
    quantize(model, QuantConfig(enabled=False), compute_dtype=torch.bfloat16)
    tokens, saved, inside = 96, {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Weights are saved too; only activations have a dimension of tokens, or of tokens and the experts of each.
        if inside and {tokens, tokens * fields.get("num_experts_per_tok", 1)} & {*tensor.shape}:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda *_: inside.append(True))
        layer.register_forward_hook(lambda *_: inside.clear())
    ids = torch.randint(0, 50, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
    counted = sum(size for size, _ in saved.values()) / tokens / 4
    stated = 2 * 64 if checkpointing else layer_activation_bytes(model.config, decoder_layers(model)[0])
    print(f"saved per token and layer: {counted:.0f} bytes, stated {stated}")
    assert loss.requires_grad
    assert counted == pytest.approx(stated, rel=0.1)


@pytest.mark.parametrize(("fields", "experts", "width"), [(MIXTRAL, 8, 160), (QWEN3_MOE, 6, 80)], ids=["mixtral", "qwen3_moe"])
def test_experts_are_counted_and_quantized(fields: dict[str, Any], experts: int, width: int) -> None:
    model = meta_model(ModelConfig(config=fields))
    plan = make_plan(model, QuantConfig(), RunShape(world_size=2))
    head_dim = fields.get("head_dim", 16)
    attention, norms = 4 * 64 * 4 * head_dim, 2 * 64 + (2 * head_dim if "head_dim" in fields else 0)
    layer = attention + norms + experts * 64 + experts * 3 * 64 * width
    assert plan.num_parameters == 4 * layer + 2 * 50 * 64 + 64 == sum(p.numel() for p in model.parameters())
    assert plan.num_quantized == 4 * (attention + experts * 3 * 64 * width)
    # Two GPUs divide all row counts.
    assert {row.name: row.packed for row in plan.parts}["largest layer, gathered"] == 2 * layer


def test_what_the_plan_does_not_know_is_refused() -> None:
    fields = {**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 64}
    with pytest.raises(ValueError, match="layers of routed experts alone .* got Qwen2MoeDecoderLayer"):
        make_plan(meta_model(ModelConfig(config=fields)), QuantConfig(), RunShape(world_size=2))


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size must be a multiple of trainer.strategy.replicate_size, got 6 and 4"):
        RunShape(world_size=6, replicate_size=4)


def test_the_history_of_codes_is_a_byte_a_weight() -> None:
    """And the codes and scales themselves, where those do not travel."""
    shape = RunShape(world_size=2, keeps_history=True)
    assert rows(shape)["history of codes"] == (0, QUANTIZED)
    assert rows(shape, QuantConfig(gather="bf16"))["history of codes"] == (0, 1.5625 * QUANTIZED)
    assert "history of codes" not in rows(RunShape(world_size=2))
