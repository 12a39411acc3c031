"""Whether the passes over whole models give the bits of `reference`; and every kernel, once or more, on small tensors."""

import torch
from kernel_checks import (
    BF16,
    EXACT_RULE,
    FITTED_RULE,
    SEARCHING,
    RandomInput,
    assert_same,
    check_choose_steps,
    check_ops,
    check_rule,
    check_static_ops,
    random_hessians,
)

from nvfp4_train.kernels import chunks, multi_tensor, reference
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule


def check_small(
    device: str = "cuda",
    ops=torch.ops.nvfp4,
    decode_shards=torch.ops.nvfp4.decode_shards,
    quantizer_class=multi_tensor.MultiTensorQuantizer,
) -> str:
    """Every kernel once or more on small tensors: what compute-sanitizer has the time to watch."""
    source = RandomInput(16 * 37, device)
    for index in range(12):
        x, s2, what = source.draw(index)
        check_ops(ops, x, s2, what)
        check_rule(ops, x, s2, SEARCHING[index % len(SEARCHING)], what)
        amax = reference.block_amax(x)
        check_static_ops(ops, x, amax, amax.amax(), index % 2 == 0, what)
        # Blocks of 8.
        check_static_ops(ops, x, x.unflatten(-1, (-1, 8)).abs().amax(-1), amax.amax(), index % 2 == 0, what)
    x = torch.randn(64, 48, device=device)
    s2 = torch.tensor([0.37], device=device)
    packed, scales = reference.quantize(x, s2)
    out = ops.dequantize(packed, scales.float(), s2, torch.float32)
    assert_same(out, reference.dequantize(packed, scales, s2, torch.float32), "dequantize of float32 scales")
    received = torch.cat((packed.flatten(), scales.flatten().view(torch.uint8)))
    table = torch.tensor([[0, packed.numel(), 0, scales.numel(), 0]], device=device)
    decoded = torch.empty(x.numel(), dtype=BF16, device=device)
    decode_shards(received, table, s2, decoded)
    assert_same(decoded, reference.dequantize(packed, scales, s2, BF16).flatten(), "decode_shards")
    for dtype in (torch.float32, BF16):
        for rule in (MAX_RULE, EXACT_RULE):
            _check_whole_model(dtype, rule, device, quantizer_class)
    _check_whole_model(torch.float32, ScaleRule(block_scale="four_over_six"), device, quantizer_class)
    _check_whole_model(torch.float32, FITTED_RULE, device, quantizer_class, rows=64)
    check_choose_steps(3 * 16 * 80, 16 * 80, 2, 3, device, ops)
    return "every operation and the whole-model pass on small tensors"


def check_scales(quantizer: multi_tensor.MultiTensorQuantizer) -> None:
    """Global amax and s2 of every slot, against the masters."""
    amax = torch.zeros_like(quantizer.global_amax)
    for master, first_slot in zip(quantizer.weights.masters, quantizer.weights.first_slots, strict=True):
        for expert, piece in enumerate(master if master.dim() == 3 else [master]):
            amax[first_slot + expert].clamp_(min=piece.abs().max())
    assert_same(quantizer.global_amax, amax, "global amax of the whole-model pass")
    assert_same(quantizer.global_scales, reference.global_scale(amax, quantizer.rule), "s2 of the whole-model pass")


def _check_whole_model(dtype: torch.dtype, rule: ScaleRule, device: str, quantizer_class, rows: int = 512) -> None:
    """Sizes next to that of a chunk (of the tile of a search: 64 rows), siblings, experts; exponents that stay and that move."""
    shapes = [(rows, 16), (rows + 1, 16), (3, 7, 32), (1, 16)]
    masters = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    decoded = [torch.empty_like(master, dtype=BF16) for master in masters]
    packed = [master.new_empty((*master.shape[:-1], master.shape[-1] // 2), dtype=torch.uint8) for master in masters]
    scales = [master.new_empty((*master.shape[:-1], master.shape[-1] // 16), dtype=torch.float8_e4m3fn) for master in masters]
    slots = chunks.slots_of_groups(masters, [0, 0, 1, 2])
    source = RandomInput(16, device)
    state = {
        "steps": [torch.zeros_like(blocks, dtype=torch.int8) for blocks in scales],
        "hessians": [random_hessians(master.shape[-1] // 16, source) for master in masters],
    }
    for outputs in ({"decoded": decoded}, {"packed": packed, "scales": scales, "decoded": decoded}):
        quantizer = quantizer_class(masters, *slots, rule=rule, **outputs, **(state if rule.is_fitted else {}))
        for factor, refit in ((1.0, rule.is_fitted and "packed" in outputs), (8.0, False)):
            masters[1].mul_(factor)
            quantizer.step(refit=refit)
            check_scales(quantizer)
            for index, first_slot in enumerate(slots[0]):
                pieces = list(masters[index]) if masters[index].dim() == 3 else [masters[index]]
                for expert, piece in enumerate(pieces):
                    s2 = quantizer.global_scales[first_slot + expert]
                    at = expert if masters[index].dim() == 3 else ...
                    steps = state["steps"][index][at] if rule.is_fitted else None
                    if refit:
                        expected = reference.choose_steps(piece, s2, state["hessians"][index], rule)
                        assert_same(steps, expected, "steps of the whole-model pass")
                    expected = reference.fake_quant(piece, s2, BF16, rule, steps)
                    assert_same(decoded[index][at], expected, "decoded by the whole-model pass")
                    if "packed" in outputs:
                        codes, block_scales = reference.quantize(piece, s2, rule, steps)
                        assert_same(packed[index][at], codes, "packed by the whole-model pass")
                        assert_same(scales[index][at], block_scales, "scales of the whole-model pass")
