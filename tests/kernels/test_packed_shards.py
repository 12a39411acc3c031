"""Weights that are quantized shard by shard and travel as one tensor decode to the bits of each weight on its own."""

import pytest
import torch
from kernel_cases import DEVICE, assert_same_bits

from nvfp4_train.kernels import multi_tensor_kernels, ops, packed_shards, reference  # noqa: F401  (ops registers torch.ops.nvfp4)
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.kernels.packed_shards import PackedShards

SHAPES = [(6, 32), (1, 16), (7, 80), (4, 96)]
"""Three ranks have 2, 1, 3 and 2 rows of them, of which the last ranks pad some or all."""

SLOTS = [1, 0, 3, 1]
S2 = torch.tensor([0.003, 2.0**-9, float("nan"), 2.0**-7], device=DEVICE)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_shards, "BLOCKS_PER_CHUNK", 4)


def _shards(num_ranks: int) -> tuple[PackedShards, list[torch.Tensor], torch.Tensor]:
    """The layout, the weights, and the bytes of all ranks, with padding that would decode to NaN."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(DEVICE) * 0.02 for shape in SHAPES]
    shards = PackedShards(SHAPES, num_ranks)
    received = torch.full((num_ranks, shards.num_bytes), 255, dtype=torch.uint8, device=DEVICE)
    for rank in range(num_ranks):
        for weight, slot, codes, scales in zip(
            weights, SLOTS, shards.codes(received[rank]), shards.scales(received[rank]), strict=True
        ):
            rows = weight[rank * len(codes) : (rank + 1) * len(codes)]
            packed, block_scales = reference.quantize(rows.cpu(), S2[slot].cpu())
            codes[: len(rows)] = packed.to(DEVICE)
            scales[: len(rows)] = block_scales.to(DEVICE)
    return shards, weights, received.flatten()


# Without a GPU the kernel runs in the interpreter.
@pytest.mark.parametrize("decode", [torch.ops.nvfp4.decode_shards, multi_tensor_kernels.decode_shards])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_decoded_shards_are_the_bits_of_each_weight(num_ranks, decode):
    shards, weights, received = _shards(num_ranks)
    decoded = torch.full((shards.num_elements,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    decode(received, shards.table(SLOTS).to(DEVICE), S2, decoded)
    for weight, slot, actual in zip(weights, SLOTS, shards.weights(decoded), strict=True):
        assert_same_bits(actual, reference.fake_quant(weight.cpu(), S2[slot].cpu(), torch.bfloat16))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_runs_of_a_shard_neither_overlap_nor_start_off_a_boundary(num_ranks):
    shards = PackedShards(SHAPES, num_ranks)
    shard = torch.zeros(shards.num_bytes, dtype=torch.uint8)
    for view in (*shards.codes(shard), *shards.scales(shard)):
        assert view.storage_offset() % 16 == 0
        assert view.is_contiguous()
        view.view(torch.uint8).add_(1)
    assert shard.max() == 1
    num_elements = sum(-(-rows // num_ranks) * columns for rows, columns in SHAPES)
    assert shard.sum() == num_elements * 9 // 16
    assert shards.num_bytes % 16 == 0


def test_the_whole_model_pass_writes_into_a_shard():
    shards, weights, received = _shards(1)
    shard = torch.full_like(received, 255)
    outputs = {"packed": shards.codes(shard), "scales": shards.scales(shard)}
    quantizer = MultiTensorQuantizer(weights, [0, 1, 2, 3], 4, **outputs)
    quantizer.step()
    decoded = torch.empty(shards.num_elements, dtype=torch.bfloat16, device=DEVICE)
    torch.ops.nvfp4.decode_shards(shard, shards.table([0, 1, 2, 3]).to(DEVICE), quantizer.global_scales, decoded)
    for weight, actual in zip(weights, shards.weights(decoded), strict=True):
        s2 = reference.global_scale(weight.abs().amax().cpu())
        assert_same_bits(actual, reference.fake_quant(weight.cpu(), s2, torch.bfloat16))
