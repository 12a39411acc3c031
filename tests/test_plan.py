"""The plan's numbers against a model small enough to count by hand."""

from typing import Any

import pytest
import torch

from nvfp4_train.losses.next_token import next_token_loss
from nvfp4_train.models.build import quantize
from nvfp4_train.models.causal_lm import ModelConfig, decoder_layers, load_model
from nvfp4_train.plan import RunShape, layer_activation_bytes, make_plan, meta_model
from nvfp4_train.quant.policy import QuantConfig

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


def rows(shape: RunShape, quant: QuantConfig = QuantConfig()) -> dict[str, tuple[float, float]]:  # noqa: B008 (frozen)
    plan = make_plan(meta_model(TINY), quant, shape)
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
def test_experts_are_counted_and_gathered_in_bf16(fields: dict[str, Any], experts: int, width: int) -> None:
    model = meta_model(ModelConfig(config=fields))
    plan = make_plan(model, QuantConfig(), RunShape(world_size=2))
    head_dim = fields.get("head_dim", 16)
    attention, norms = 4 * 64 * 4 * head_dim, 2 * 64 + (2 * head_dim if "head_dim" in fields else 0)
    layer = attention + norms + experts * 64 + experts * 3 * 64 * width
    assert plan.num_parameters == 4 * layer + 2 * 50 * 64 + 64 == sum(p.numel() for p in model.parameters())
    assert plan.num_quantized == 4 * attention
    # Two GPUs divide all row counts.
    assert {row.name: row.packed for row in plan.parts}["largest layer, gathered"] == 2 * layer


def test_what_the_plan_does_not_know_is_refused() -> None:
    fields = {**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 64}
    with pytest.raises(ValueError, match="layers of routed experts alone .* got Qwen2MoeDecoderLayer"):
        make_plan(meta_model(ModelConfig(config=fields)), QuantConfig(), RunShape(world_size=2))


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size must be a multiple of trainer.strategy.replicate_size, got 6 and 4"):
        RunShape(world_size=6, replicate_size=4)
