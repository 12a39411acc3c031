"""Tensors that travel as one, by shards. Quantized ones decode to the bits of each weight on its own, others stay unchanged."""

import math

import pytest
import torch
from kernel_cases import DEVICE, assert_same_bits

from nvfp4_train.kernels import multi_tensor_kernels, ops, reference  # noqa: F401  (ops registers torch.ops.nvfp4)
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.quant import packed_shards
from nvfp4_train.quant.packed_shards import PackedShards

SHAPES = [(6, 32), (1, 16), (7, 80), (4, 96)]
"""Three ranks have 2, 1, 3 and 2 rows of them, of which the last ranks pad some or all."""

OTHERS = [(5,), (7, 3), (1, 2, 2)]
"""Their rows have no multiple of 16 elements, nor does a rank's share of them."""

SLOTS = [1, 0, 3, 1]
S2 = torch.tensor([0.003, 2.0**-9, float("nan"), 2.0**-7], device=DEVICE)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_shards, "BLOCKS_PER_CHUNK", 4)


def _shards(num_ranks: int) -> tuple[PackedShards, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """The layout, the weights, the others, and the bytes of all ranks, with padding that would decode to NaN."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(DEVICE) * 0.02 for shape in SHAPES]
    others = [torch.randn(shape, generator=generator).to(DEVICE).bfloat16() for shape in OTHERS]
    shards = PackedShards(SHAPES, OTHERS, num_ranks)
    received = torch.full((num_ranks, shards.num_bytes), 255, dtype=torch.uint8, device=DEVICE)
    for rank in range(num_ranks):
        for weight, slot, codes, scales in zip(
            weights, SLOTS, shards.codes(received[rank]), shards.scales(received[rank]), strict=True
        ):
            rows = weight[rank * len(codes) : (rank + 1) * len(codes)]
            packed, block_scales = reference.quantize(rows.cpu(), S2[slot].cpu())
            codes[: len(rows)] = packed.to(DEVICE)
            scales[: len(rows)] = block_scales.to(DEVICE)
        for other, rows in zip(others, shards.rows(received[rank]), strict=True):
            own = other[rank * len(rows) : (rank + 1) * len(rows)]
            rows[: len(own)] = own
    return shards, weights, others, received.flatten()


def _unpacked(shards: PackedShards, received: torch.Tensor, slots: list[int], s2: torch.Tensor) -> list[torch.Tensor]:
    out = torch.full((shards.num_elements,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    shards.unpack(received, shards.table(slots).to(DEVICE), s2, out, shards.padded_unquantized(out))
    return shards.whole_tensors(out)


# Without a GPU the kernel runs in the interpreter.
@pytest.mark.parametrize("decode", [torch.ops.nvfp4.decode_shards, multi_tensor_kernels.decode_shards])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_unpacked_shards_are_the_bits_of_each_tensor(num_ranks, decode, monkeypatch):
    monkeypatch.setattr(packed_shards, "decode_shards", decode)
    shards, weights, others, received = _shards(num_ranks)
    wholes = _unpacked(shards, received, SLOTS, S2)
    for weight, slot, actual in zip(weights, SLOTS, wholes, strict=False):
        assert_same_bits(actual, reference.fake_quant(weight.cpu(), S2[slot].cpu(), torch.bfloat16))
    for other, actual in zip(others, wholes[len(weights) :], strict=True):
        assert_same_bits(actual, other)
    for whole in wholes:
        assert whole.storage_offset() % 8 == 0


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_shards_may_hold_one_kind_alone(num_ranks):
    _, weights, others, _ = _shards(num_ranks)
    nothing_quantized = PackedShards([], OTHERS, num_ranks)
    shards = [torch.zeros(nothing_quantized.num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(num_ranks)]
    for rank, shard in enumerate(shards):
        for other, rows in zip(others, nothing_quantized.rows(shard), strict=True):
            own = other[rank * len(rows) : (rank + 1) * len(rows)]
            rows[: len(own)] = own
    for other, actual in zip(others, _unpacked(nothing_quantized, torch.cat(shards), [], S2), strict=True):
        assert_same_bits(actual, other)
    all_quantized = PackedShards(SHAPES, [], num_ranks)
    received = torch.zeros(num_ranks * all_quantized.num_bytes, dtype=torch.uint8, device=DEVICE)
    for weight, actual in zip(weights, _unpacked(all_quantized, received, SLOTS, S2), strict=True):
        assert_same_bits(actual, torch.zeros_like(weight, dtype=torch.bfloat16))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_runs_of_a_shard_neither_overlap_nor_start_off_a_boundary(num_ranks):
    shards = PackedShards(SHAPES, OTHERS, num_ranks)
    shard = torch.zeros(shards.num_bytes, dtype=torch.uint8)
    for view in (*shards.codes(shard), *shards.scales(shard)):
        assert view.storage_offset() % 16 == 0
        assert view.is_contiguous()
        view.view(torch.uint8).add_(1)
    for view in shards.rows(shard):
        view.view(torch.uint8).add_(1)
    assert shard.max() == 1
    num_elements = sum(-(-rows // num_ranks) * columns for rows, columns in SHAPES)
    num_others = sum(-(-shape[0] // num_ranks) * math.prod(shape[1:]) for shape in OTHERS)
    assert shard.sum() == num_elements * 9 // 16 + 2 * num_others
    assert shards.num_bytes % 16 == 0


def test_the_whole_model_pass_writes_into_a_shard():
    shards, weights, _, received = _shards(1)
    shard = torch.full_like(received, 255)
    outputs = {"packed": shards.codes(shard), "scales": shards.scales(shard)}
    quantizer = MultiTensorQuantizer(weights, [0, 1, 2, 3], 4, **outputs)
    quantizer.step()
    for weight, actual in zip(weights, _unpacked(shards, shard, [0, 1, 2, 3], quantizer.global_scales), strict=False):
        s2 = reference.global_scale(weight.abs().amax().cpu())
        assert_same_bits(actual, reference.fake_quant(weight.cpu(), s2, torch.bfloat16))
