"""The whole-model pass gives the bits of quantizing each weight on its own, whatever the exponents did since the last step."""

import functools
import gc
import os
import socket
import weakref

import pytest
import torch
from kernel_cases import DEVICE, QUANTIZERS, TritonQuantizer, assert_same_bits, outputs_of
from torch import distributed, multiprocessing

from nvfp4_train.kernels import multi_tensor_kernels, reference, triton_kernels
from nvfp4_train.kernels.chunks import slots_of_groups
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.kernels.multi_tensor_reference import ReferencePasses
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES, MAX_RULE, BlockScaleRule, ScaleRule

SHAPES = [(48, 64), (8, 64), (8, 64), (3, 16, 32), (3, 16, 32), (1, 16), (20, 256)]
GROUPS = [0, 1, 1, 2, 2, 3, 4]
"""Siblings: the second and third, and the experts of the fourth and fifth, pair by pair. The last one spans two chunks."""

# Small chunks, so that small weights have several of them.
multi_tensor_kernels.BLOCKS_PER_CHUNK = 256


EXACT = ScaleRule(global_scale="exact")


def _masters(dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in SHAPES]


def _assert_quantized_one_by_one(quantizer, masters, outputs, rule, groups=GROUPS):
    """Against the maximum over siblings, and the operators of `reference`, expert by expert."""
    pieces = [list(master) if master.dim() == 3 else [master] for master in masters]
    for index, master_pieces in enumerate(pieces):
        siblings = [pieces[i] for i, group in enumerate(groups) if group == groups[index]]
        for expert, piece in enumerate(master_pieces):
            amax = torch.stack([sibling[expert].abs().amax().float() for sibling in siblings]).amax().cpu()
            s2 = reference.global_scale(amax, rule)
            slot = quantizer.weights.first_slots[index] + expert
            assert_same_bits(quantizer.global_amax[slot], amax)
            assert_same_bits(quantizer.global_scales[slot], s2)
            at = expert if masters[index].dim() == 3 else ...
            packed, scales = reference.quantize(piece.cpu(), s2, rule)
            if "decoded" in outputs:
                assert_same_bits(outputs["decoded"][index][at], reference.fake_quant(piece.cpu(), s2, torch.bfloat16, rule))
            if "packed" in outputs:
                assert_same_bits(outputs["packed"][index][at], packed)
                assert_same_bits(outputs["scales"][index][at], scales)


FACTORS = [1.0, 1.01, 3.0, 0.9, 0.2, 0.2, 1e4, 1e-9, 0.0, 1.0, 2.0**-70, 1.0]
"""The masters of a step are these times the first ones: exponents stay, move up or down, by little or much; zero; out of range."""


@pytest.mark.parametrize("rule", [MAX_RULE, EXACT], ids=["pow2", "exact"])
@pytest.mark.parametrize("wanted", [("decoded",), ("packed", "scales"), ("decoded", "packed", "scales")], ids="+".join)
@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_every_step_equals_quantizing_one_by_one(quantizer_class, wanted, rule):
    masters, first = _masters(), _masters()
    outputs = {name: tensors for name, tensors in outputs_of(masters).items() if name in wanted}
    quantizer = quantizer_class(masters, *slots_of_groups(masters, GROUPS), rule=rule, **outputs)
    for step, factor in enumerate(FACTORS if len(wanted) == 1 else FACTORS[:4]):
        for index, master in enumerate(masters):
            # Some groups move while others stay.
            torch.mul(first[index], factor if index % 2 == step % 2 else 1.0, out=master)
        quantizer.step()
        _assert_quantized_one_by_one(quantizer, masters, outputs, rule)


@pytest.mark.parametrize(
    "rule",
    [
        ScaleRule(block_scale="four_over_six"),
        ScaleRule(block_scale="four_over_six", global_scale="exact"),
        ScaleRule(block_scale="mse"),
    ],
    ids=str,
)
@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_every_step_under_a_rule_that_searches(quantizer_class, rule):
    masters, groups = _masters()[1:4], [0, 0, 1]
    outputs = outputs_of(masters)
    quantizer = quantizer_class(masters, *slots_of_groups(masters, groups), rule=rule, **outputs)
    for factor in (1.0, 1.01, 8.0):
        # The group of the first two moves, the experts do not.
        masters[1].mul_(factor)
        quantizer.step()
        _assert_quantized_one_by_one(quantizer, masters, outputs, rule, groups)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> ScaleRule:
    """A fitted rule with three candidates, and tiles of many rows: the interpreter takes long for each of either."""
    monkeypatch.setitem(BLOCK_SCALE_RULES, "fitted", BlockScaleRule(steps=(5, 4, 3), largest=256.0, is_fitted=True))
    monkeypatch.setitem(triton_kernels.TILES, "choose_steps", (64, 1))
    return ScaleRule(block_scale="fitted")


def _hessians(masters):
    """One for each master, or for each expert of the first of them; siblings share theirs."""
    generator = torch.Generator().manual_seed(5)
    shapes = [
        (master.shape[0], master.shape[-1] // 16) if master.dim() == 3 else (master.shape[-1] // 16,) for master in masters
    ]
    inputs = [torch.randn(*shape, 20, 16, generator=generator).to(DEVICE) for shape in shapes]
    return [of_master.mT @ of_master for of_master in inputs]


def _assert_fitted_one_by_one(quantizer, masters, outputs, rule, steps):
    """Against `reference` under these steps, expert by expert."""
    for index, master in enumerate(masters):
        first = quantizer.weights.first_slots[index]
        s2 = quantizer.global_scales[first : first + (len(master) if master.dim() == 3 else 1)].cpu()
        s2 = s2.view(-1, 1, 1) if master.dim() == 3 else s2
        packed, scales = reference.quantize(master.cpu(), s2, rule, steps[index].cpu())
        decoded = reference.fake_quant(master.cpu(), s2, torch.bfloat16, rule, steps[index].cpu())
        for name, expected in (("packed", packed), ("scales", scales), ("decoded", decoded)):
            assert_same_bits(outputs[name][index], expected)


@pytest.mark.parametrize(
    ("global_scale", "dtype"), [("pow2", torch.float32), ("exact", torch.float32), ("pow2", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_steps_are_chosen_when_asked_for_and_kept_in_between(quantizer_class, global_scale, dtype, fitted):
    """A matrix with its sibling, and experts: those that follow with a Hessian for each, the last with one for all."""
    rule = ScaleRule(global_scale=global_scale, block_scale=fitted.block_scale)
    shapes = [(8, 32), (70, 32), (2, 8, 32), (2, 70, 32)]
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]
    hessians = _hessians(masters)
    hessians[1], hessians[3] = hessians[0], hessians[2][0]
    steps = [torch.zeros(*m.shape[:-1], m.shape[-1] // 16, dtype=torch.int8, device=DEVICE) for m in masters]
    outputs, slots = outputs_of(masters), slots_of_groups(masters, [0, 0, 1, 2])
    quantizer = quantizer_class(masters, *slots, **outputs, steps=steps, hessians=hessians, rule=rule)

    quantizer.step()
    assert not any(of_master.any() for of_master in steps)
    _assert_fitted_one_by_one(quantizer, masters, outputs, rule, steps)
    masters[1].mul_(8.0)
    quantizer.step(refit=True)
    for index, master in enumerate(masters):
        for expert, piece in enumerate(master if master.dim() == 3 else [master]):
            s2 = quantizer.global_scales[slots[0][index] + expert]
            hessian = hessians[index][expert] if hessians[index].dim() == 4 else hessians[index]
            expected = reference.choose_steps(piece.cpu(), s2.cpu(), hessian.cpu(), rule)
            assert_same_bits(steps[index][expert] if master.dim() == 3 else steps[index], expected)
    _assert_fitted_one_by_one(quantizer, masters, outputs, rule, steps)
    chosen = [of_master.clone() for of_master in steps]
    assert {5, 4, 3} == {int(step) for of_master in chosen for step in of_master.unique()}
    for factor in (1.01, 1 / 32):
        # Scales of the first group stay, then move.
        masters[0].mul_(factor), masters[1].mul_(factor)
        masters[2].neg_()
        quantizer.step()
        assert all(torch.equal(now, then) for now, then in zip(steps, chosen, strict=True))
        _assert_fitted_one_by_one(quantizer, masters, outputs, rule, chosen)


def test_steps_and_hessians_that_move_in_memory_are_followed(fitted):
    masters = _masters()[1:2]
    steps, hessians = [torch.zeros(8, 4, dtype=torch.int8, device=DEVICE)], _hessians(masters)
    decoded = outputs_of(masters)["decoded"]
    quantizer = TritonQuantizer(masters, [0], 1, decoded=decoded, steps=steps, hessians=hessians, rule=fitted)
    quantizer.step(refit=True)
    hessians[0].data, steps[0].data = hessians[0].flip(0), torch.full_like(steps[0], 9)
    quantizer.step(refit=True)
    expected = reference.choose_steps(masters[0].cpu(), quantizer.global_scales[0].cpu(), hessians[0].cpu(), fitted)
    assert_same_bits(steps[0], expected)


@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_an_empty_shard_has_no_steps_to_choose(quantizer_class, fitted):
    masters = [torch.randn(4, 32, device=DEVICE), torch.empty(0, 32, device=DEVICE), torch.empty(2, 0, 32, device=DEVICE)]
    steps = [torch.zeros(*master.shape[:-1], 2, dtype=torch.int8, device=DEVICE) for master in masters]
    hessians = [_hessians(masters[:1])[0]] * 3
    quantizer = quantizer_class(
        masters, [0, 1, 2], 4, decoded=outputs_of(masters)["decoded"], steps=steps, hessians=hessians, rule=fitted
    )
    quantizer.step(refit=True)
    assert steps[0].any()


@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_bf16_masters_are_quantized_too(quantizer_class):
    masters = _masters(torch.bfloat16)
    outputs = {"decoded": outputs_of(masters)["decoded"]}
    quantizer = quantizer_class(masters, *slots_of_groups(masters, GROUPS), **outputs)
    quantizer.step()
    _assert_quantized_one_by_one(quantizer, masters, outputs, MAX_RULE)


@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_a_master_that_moves_in_memory_is_followed(quantizer_class):
    masters = _masters()
    outputs = {"decoded": outputs_of(masters)["decoded"]}
    parameters = [torch.nn.Parameter(master) for master in masters]
    quantizer = quantizer_class(parameters, *slots_of_groups(masters, GROUPS), **outputs)
    quantizer.step()
    moved = [master * 1.3 for master in masters]
    for parameter, master in zip(parameters, moved, strict=True):
        parameter.data = master
    quantizer.step()
    _assert_quantized_one_by_one(quantizer, moved, outputs, MAX_RULE)
    for output in outputs["decoded"]:
        output.data = torch.full_like(output, torch.nan)
    quantizer.step()
    _assert_quantized_one_by_one(quantizer, moved, outputs, MAX_RULE)


@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_memory_is_free_as_soon_as_the_quantizer_is_gone(quantizer_class):
    masters = _masters()
    quantizer = quantizer_class(masters, *slots_of_groups(masters, GROUPS), **outputs_of(masters))
    quantizer.step()
    outputs = [weakref.ref(output) for output in quantizer.weights.tensors()[len(masters) :]]
    gc.disable()
    try:
        del quantizer
        assert not any(output() is not None for output in outputs)
    finally:
        gc.enable()


@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_masters_that_change_their_dtype_are_followed(quantizer_class):
    masters = _masters()
    outputs = outputs_of(masters)
    quantizer = quantizer_class(masters, *slots_of_groups(masters, GROUPS), **outputs)
    quantizer.step()
    for master in masters:
        master.data = master.data.bfloat16()
    quantizer.step()
    _assert_quantized_one_by_one(quantizer, masters, outputs, MAX_RULE)


@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_a_dtype_that_takes_the_memory_of_another_is_followed(quantizer_class):
    memory = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    master, decoded = memory.view(8, 32), torch.empty(8, 32, dtype=torch.bfloat16, device=DEVICE)
    quantizer = quantizer_class([master], [0], 1, decoded=[decoded])
    quantizer.step()
    master.data = memory.view(torch.bfloat16).view(-1)[:256].view(8, 32).nan_to_num_(1.0).clamp_(-9, 9)
    assert master.data_ptr() == memory.data_ptr()
    quantizer.step()
    assert_same_bits(quantizer.global_amax[0], master.abs().max().float())
    assert_same_bits(decoded.cpu(), reference.fake_quant(master.cpu(), quantizer.global_scales[0].cpu(), torch.bfloat16))


def test_a_program_takes_many_chunks_where_all_exponents_moved():
    masters = [master * 1e-4 for master in _masters()]
    outputs = outputs_of(masters)
    quantizer = TritonQuantizer(masters, *slots_of_groups(masters, GROUPS), **outputs)
    quantizer._passes._num_persistent = 2
    quantizer.step()
    assert quantizer._passes._table.shape[0] > 4
    _assert_quantized_one_by_one(quantizer, masters, outputs, MAX_RULE)


@pytest.mark.parametrize("rule", [MAX_RULE, EXACT], ids=["pow2", "exact"])
@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_scales_of_every_exponent(quantizer_class, rule):
    """There are more slots than one program takes."""
    # 0x280000 is the mantissa of 2688.
    mantissas = torch.tensor([0, 1, 0x27FFFF, 0x280000, 0x280001, 0x7FFFFF])
    smallest = torch.tensor(reference.SMALLEST_GLOBAL_AMAX).view(torch.int32).long()
    bits = torch.cat([((torch.arange(256) << 23)[:, None] + mantissas).flatten(), smallest + torch.arange(-3, 4)]).int()
    masters = [torch.zeros(len(bits), 1, 16, device=DEVICE)]
    quantizer = quantizer_class(masters, [0], len(bits), decoded=outputs_of(masters)["decoded"], rule=rule)
    quantizer.slots.measured.copy_(bits)
    quantizer._passes.update_scales()
    amax = bits.view(torch.float32)
    assert_same_bits(quantizer.global_amax, amax)
    assert_same_bits(quantizer.global_scales, reference.global_scale(amax, rule))
    assert not quantizer.slots.measured.any()


def test_a_master_that_the_kernels_cannot_read_any_longer_is_refused():
    masters = [torch.randn(32, 32, device=DEVICE)]
    quantizer = TritonQuantizer(masters, [0], 1, decoded=[torch.empty_like(masters[0], dtype=torch.bfloat16)])
    quantizer.step()
    masters[0].data = masters[0].data.t().clone(memory_format=torch.preserve_format)
    with pytest.raises(ValueError, match=r"masters\[0\] must be contiguous"):
        quantizer.step()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_a_bad_weight_shows_in_the_amax_of_its_group_alone_and_only_while_it_is_there(quantizer_class, value):
    masters = _masters()
    quantizer = quantizer_class(masters, *slots_of_groups(masters, GROUPS), decoded=outputs_of(masters)["decoded"])
    good = masters[3][1, 2, 3].clone()
    masters[3][1, 2, 3] = value
    quantizer.step()
    slot = quantizer.weights.first_slots[3] + 1
    expected = torch.ones(len(quantizer.global_amax), dtype=torch.bool, device=DEVICE)
    expected[slot] = False
    assert torch.equal(quantizer.global_amax.isfinite(), expected)
    masters[3][1, 2, 3] = good
    quantizer.step()
    assert quantizer.global_amax.isfinite().all()
    assert all(decoded.isfinite().all() for decoded in quantizer.weights.decoded)


@pytest.mark.parametrize("quantizer_class", QUANTIZERS)
def test_an_empty_shard_takes_part(quantizer_class):
    masters = [torch.randn(4, 32, device=DEVICE), torch.empty(0, 32, device=DEVICE)]
    decoded = [torch.empty_like(master, dtype=torch.bfloat16) for master in masters]
    quantizer = quantizer_class(masters, [0, 1], 2, decoded=decoded)
    quantizer.step()
    assert quantizer.global_amax.tolist() == [float(masters[0].abs().max()), 0.0]
    assert_same_bits(decoded[0], reference.fake_quant(masters[0].cpu(), quantizer.global_scales[0].cpu(), torch.bfloat16))


@pytest.mark.parametrize("shape", [(255, 16), (256, 16), (257, 16), (512, 16), (2, 256, 16), (2, 257, 16)], ids=str)
def test_chunks_at_the_largest_size(shape):
    assert multi_tensor_kernels.BLOCKS_PER_CHUNK == 256
    masters = [torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)]
    on_cpu = [masters[0].cpu()]
    outputs, expected = outputs_of(masters), outputs_of(on_cpu)
    TritonQuantizer(masters, *slots_of_groups(masters, [0]), **outputs).step()
    MultiTensorQuantizer(on_cpu, *slots_of_groups(masters, [0]), **expected).step()
    for name, tensors in outputs.items():
        assert_same_bits(tensors[0], expected[name][0])


@pytest.mark.parametrize("rule", [MAX_RULE, EXACT], ids=["pow2", "exact"])
def test_a_step_is_three_launches_and_one_reduction(monkeypatch, rule):
    masters = _masters()
    decoded = outputs_of(masters)["decoded"]
    quantizer = TritonQuantizer(
        masters,
        *slots_of_groups(masters, GROUPS),
        decoded=decoded,
        rule=rule,
    )
    done = []
    launch = multi_tensor_kernels.launch
    monkeypatch.setattr(multi_tensor_kernels, "launch", lambda name, *args: (done.append(name), launch(name, *args)))
    quantizer.step(lambda measured: done.append(measured))
    assert done[0] == "whole_model"
    assert done[1] is quantizer.slots.measured
    assert done[2:] == ["update_scales", "whole_model"]


@pytest.mark.parametrize("global_scale", ["pow2", "exact"])
def test_choosing_steps_is_one_launch_more(monkeypatch, global_scale, fitted):
    rule = ScaleRule(global_scale=global_scale, block_scale=fitted.block_scale)
    masters = _masters()[1:3]
    steps = [torch.zeros(8, 4, dtype=torch.int8, device=DEVICE) for _ in masters]
    decoded = outputs_of(masters)["decoded"]
    state = {"steps": steps, "hessians": _hessians(masters)}
    quantizer = TritonQuantizer(masters, [0, 1], 2, decoded=decoded, rule=rule, **state)
    done = []
    launch = multi_tensor_kernels.launch
    monkeypatch.setattr(multi_tensor_kernels, "launch", lambda name, *args: (done.append(name), launch(name, *args)))
    quantizer.step(refit=True)
    assert done == ["whole_model", "update_scales", "search", "whole_model"]


def test_the_last_launch_writes_only_what_moved():
    masters = _masters()
    decoded = outputs_of(masters)["decoded"]
    quantizer = TritonQuantizer(masters, *slots_of_groups(masters, GROUPS), decoded=decoded)
    quantizer.step()
    # The siblings of group 1, and the second expert of group 2.
    masters[1].mul_(64)
    masters[4][1].mul_(64)
    quantizer._passes.measure()
    quantizer._passes.update_scales()
    for tensor in decoded:
        tensor.fill_(torch.nan)
    quantizer._passes.quantize()
    for index, tensor in enumerate(decoded):
        for expert, written in enumerate(tensor if tensor.dim() == 3 else [tensor]):
            is_moved = index in (1, 2) or (index in (3, 4) and expert == 1)
            assert written.isfinite().all() if is_moved else written.isnan().all()


def test_a_shard_off_a_16_byte_boundary_is_refused_by_the_kernels():
    masters = [torch.zeros(4 * 32 + 1, device=DEVICE)[1:].view(4, 32)]
    quantizer = TritonQuantizer(masters, [0], 1, decoded=[torch.empty(4, 32, device=DEVICE)])
    with pytest.raises(ValueError, match=r"masters\[0\] must start on a 16-byte boundary"):
        quantizer.step()


RANK_SHAPES = [(7, 32), (5, 16), (5, 16), (2, 6, 16)]
RANK_GROUPS = [0, 1, 1, 2]


def _run_rank(rank: int, port: int) -> None:
    """Row shards on 1, 2 and 4 of four ranks, with exponents that move, against the whole masters on each rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=4)
    process_groups = {size: distributed.new_group(list(range(size))) for size in (1, 2, 4)}
    for size, process_group in process_groups.items():
        if rank >= size:
            continue
        reduce = functools.partial(distributed.all_reduce, op=distributed.ReduceOp.MAX, group=process_group)
        for quantizer_class in QUANTIZERS:
            generator = torch.Generator().manual_seed(1)
            whole = [torch.randn(shape, generator=generator) for shape in RANK_SHAPES]
            shards = [_rows(master, rank, size).to(DEVICE).clone() for master in whole]
            outputs, expected = outputs_of(shards), outputs_of(whole)
            slots = slots_of_groups(whole, RANK_GROUPS)
            quantizer = quantizer_class(shards, *slots, **outputs)
            alone = MultiTensorQuantizer(whole, *slots, **expected)
            for index, factor in ((0, 1.0), (0, 8.0), (0, 2.0**-6), (3, 32.0)):
                whole[index].mul_(factor)
                shards[index].mul_(factor)
                quantizer.step(reduce)
                alone.step()
                assert_same_bits(quantizer.global_scales, alone.global_scales)
                for name, tensors in outputs.items():
                    for shard, master in zip(tensors, expected[name], strict=True):
                        assert_same_bits(shard, _rows(master, rank, size))
    distributed.destroy_process_group()


def _rows(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's rows: of a matrix as FSDP cuts it, some ranks getting none; of experts those of every expert."""
    chunks = tensor.chunk(size, dim=tensor.dim() - 2)
    return chunks[rank] if rank < len(chunks) else tensor.narrow(tensor.dim() - 2, 0, 0)


def test_ranks_that_hold_shards_get_the_bits_of_one_that_holds_all():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.spawn(_run_rank, args=(port,), nprocs=4)


def test_the_cpu_takes_plain_pytorch():
    masters = [torch.randn(4, 32)]
    quantizer = MultiTensorQuantizer(masters, [0], 1, decoded=[torch.empty(4, 32)])
    assert isinstance(quantizer._passes, ReferencePasses)
