"""The registered operators: their schemas and shapes, torch.compile without a graph break, CUDA-graph capture."""

import pytest
import torch
import triton
from kernel_cases import CASES, DEVICE, DTYPES, assert_same_bits
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_train.kernels import chunks, fp4_kernel, multi_tensor, reference, triton_kernels
from nvfp4_train.kernels.scale_rules import ScaleRule

X = CASES["odd_3d"].to(DEVICE)
AMAX = reference.block_amax(X)
S2 = torch.tensor([0.003], device=DEVICE)
INPUT_SCALE = torch.tensor([2.0**-8], device=DEVICE)
PACKED, BLOCK_SCALES = reference.quantize(X, S2)
FITTED = ScaleRule(block_scale="hessian")
HESSIAN = torch.eye(16, device=DEVICE).expand(3, 16, 16).contiguous()
STEPS = reference.choose_steps(X, S2, HESSIAN, FITTED)

OP_ARGUMENTS = {
    "block_amax": [(X,), (X.bfloat16(),), (X.transpose(0, 1),), (X[:0],)],
    "static_scales": [(AMAX, AMAX.max()), (AMAX.half(), AMAX.max(), False)],
    "static_fake_quant": [
        (X, AMAX, AMAX.max(), True, torch.bfloat16),
        (X.transpose(0, 1), AMAX, AMAX.max(), False, torch.float32),
        (X, AMAX[..., :1], AMAX.max(), True, torch.float32),
        (X, X.unflatten(-1, (-1, 6)).abs().amax(-1), AMAX.max(), True, torch.float32),
    ],
    "quantize": [
        (X, S2),
        (X, S2, "mse"),
        (X.transpose(0, 1), S2, "hessian", STEPS.transpose(0, 1)),
        (X.half().transpose(0, 1), S2),
        (X[:, :0], S2),
    ],
    "fake_quant": [
        (X, S2, torch.bfloat16),
        (X, S2, torch.float32, "four_over_six"),
        (X, S2, torch.bfloat16, "hessian", STEPS),
        (X.bfloat16().transpose(0, 1), S2, torch.float32),
    ],
    "choose_steps": [
        (X, S2, HESSIAN, "hessian"),
        (X.bfloat16().transpose(0, 1), S2, HESSIAN.transpose(1, 2), "hessian"),
        (X[:0], S2, HESSIAN, "hessian"),
    ],
    "decode_shards": [
        (
            torch.cat((PACKED.flatten(), BLOCK_SCALES.flatten().view(torch.uint8))),
            torch.tensor([[0, X.numel() // 2, 0, X.numel() // 16, 0]], device=DEVICE),
            S2,
            torch.empty(X.numel(), dtype=torch.bfloat16, device=DEVICE),
        )
    ],
    "dequantize": [(PACKED, BLOCK_SCALES, S2, torch.bfloat16), (PACKED, BLOCK_SCALES.float(), S2, torch.float32)],
    "weight_sums": [
        (X, PACKED, BLOCK_SCALES, S2.expand(3).contiguous()),
        (X[:, 1:3], PACKED[:, 1:3], BLOCK_SCALES[:, 1:3], S2.expand(3).contiguous()),
        (X[:, :0], PACKED[:, :0], BLOCK_SCALES[:, :0], S2.expand(3).contiguous()),
    ],
    "follow_codes": [
        (
            PACKED,
            BLOCK_SCALES,
            S2.expand(3).contiguous(),
            torch.zeros(X.shape, dtype=torch.uint8, device=DEVICE),
            X.clone(),
            torch.zeros(3, dtype=torch.int64, device=DEVICE),
            2,
            1,
        )
    ],
    "quantize_input": [(X, INPUT_SCALE), (X.bfloat16().transpose(0, 1), INPUT_SCALE), (X[:, :0], INPUT_SCALE)],
    "fake_quant_input": [(X, INPUT_SCALE), (X.bfloat16().transpose(0, 1), INPUT_SCALE), (X[:, :0], INPUT_SCALE)],
}


def _with_gradients(arguments):
    """The arguments, with gradients required of all float tensors."""
    return tuple(
        argument.detach().requires_grad_() if getattr(argument, "dtype", None) in DTYPES else argument for argument in arguments
    )


@pytest.mark.parametrize("name", OP_ARGUMENTS)
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    cases = OP_ARGUMENTS[name]
    if name not in ("decode_shards", "follow_codes"):
        cases = [*cases, *map(_with_gradients, cases)]
    for arguments in cases:
        # test_schema compares inputs by arithmetic that torch does not have for float8.
        has_float8 = any(getattr(argument, "dtype", None) == torch.float8_e4m3fn for argument in arguments)
        torch.library.opcheck(getattr(torch.ops.nvfp4, name).default, arguments, test_utils=checks[has_float8:])


def test_no_operation_has_a_gradient():
    results = _every_operation(
        X.clone().requires_grad_(), AMAX.clone().requires_grad_(), S2.clone().requires_grad_(), _table(X)
    )
    assert not any(result.requires_grad for result in results)


def test_an_output_that_is_no_run_of_memory_is_refused():
    received = torch.cat((PACKED.flatten(), BLOCK_SCALES.flatten().view(torch.uint8)))
    out = torch.empty(X.numel(), 2, dtype=torch.bfloat16, device=DEVICE)[:, 0]
    with pytest.raises(ValueError, match="decode_shards takes contiguous tensors alone, got strides"):
        torch.ops.nvfp4.decode_shards(received, _table(X), S2, out)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_public_functions_take_tensors_without_values(kind):
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        x, s2 = torch.empty(3, 48), torch.empty(1)
        packed, scales = fp4_kernel.nvfp4_quantize(x, s2)
        block_amax = fp4_kernel.nvfp4_block_amax(x)
        global_amax = block_amax.max()
        assert fp4_kernel.fp4_dequantize(packed, scales, fp4_kernel.nvfp4_global_scale(global_amax)).shape == x.shape
        assert fp4_kernel.nvfp4_fake_quant(x, s2).shape == x.shape
        steps = fp4_kernel.nvfp4_choose_steps(x, s2, torch.empty(3, 16, 16), FITTED)
        assert steps.dtype == torch.int8
        assert fp4_kernel.nvfp4_fake_quant(x, s2, rule=FITTED, steps=steps).shape == x.shape
        assert fp4_kernel.static_blockwise_fp4_fake_quant(x, block_amax).shape == x.shape
        assert fp4_kernel.compute_fp4_scales(block_amax, global_amax).shape == (3, 3)
        assert [t.shape for t in fp4_kernel.nvfp4_quantize_input(x, s2)] == [(3, 48), (3, 24), (3, 3)]
        assert fp4_kernel.nvfp4_fake_quant_input(x, s2).shape == x.shape


@pytest.mark.parametrize("name", OP_ARGUMENTS)
def test_meta_tensors_get_the_shapes_of_real_ones(name):
    for arguments in OP_ARGUMENTS[name]:
        op = getattr(torch.ops.nvfp4, name)
        on_meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        real = op(*arguments)
        pairs = zip(real, on_meta, strict=True) if isinstance(real, tuple) else [(real, on_meta)] if real is not None else []
        for a, b in pairs:
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _every_operation(x, amax, s2, table):
    """The public functions, and the operators that have none."""
    packed, scales = fp4_kernel.nvfp4_quantize(x, s2)
    decoded = torch.zeros(x.numel(), dtype=torch.bfloat16, device=x.device)
    received = torch.cat((packed.flatten(), scales.flatten().view(torch.uint8)))
    torch.ops.nvfp4.decode_shards(received, table, s2, decoded)
    steps = fp4_kernel.nvfp4_choose_steps(x, s2, torch.eye(16, device=x.device).expand(x.shape[-1] // 16, 16, 16), FITTED)
    return (
        fp4_kernel.compute_fp4_scales(amax),
        fp4_kernel.static_blockwise_fp4_fake_quant(x, amax, out_dtype=torch.bfloat16),
        fp4_kernel.nvfp4_block_amax(x),
        fp4_kernel.nvfp4_global_scale(amax),
        fp4_kernel.nvfp4_fake_quant(x, s2),
        fp4_kernel.fp4_dequantize(packed, scales, s2),
        packed,
        scales,
        decoded,
        steps,
        fp4_kernel.nvfp4_fake_quant(x, s2, rule=FITTED, steps=steps),
        *fp4_kernel.nvfp4_quantize_input(x, INPUT_SCALE.to(x.device)),
        fp4_kernel.nvfp4_fake_quant_input(x, INPUT_SCALE.to(x.device)),
    )


def _table(x: torch.Tensor) -> torch.Tensor:
    """For decode_shards: the packed codes of x and, right after them, its scales."""
    return torch.tensor([[0, x.numel() // 2, 0, x.numel() // 16, 0]], device=DEVICE)


def test_the_tests_below_call_every_operator():
    called = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.name())
            return function(*args, **(kwargs or {}))

    with Calls():
        _every_operation(X, AMAX, S2, _table(X))
        # Those that look at weights between steps are in no graph.
        for name in ("weight_sums", "follow_codes"):
            getattr(torch.ops.nvfp4, name)(*OP_ARGUMENTS[name][0])
    assert {name for name in called if name.startswith("nvfp4::")} == {f"nvfp4::{name}" for name in OP_ARGUMENTS}
    assert {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("nvfp4::")} <= called


def test_every_operation_compiles_to_one_graph_with_the_same_bits():
    # On CPU the operators are opaque to Inductor, whose C++ compiler takes 20 s over the few ops beside them.
    compiled = torch.compile(_every_operation, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for x in (X, torch.cat((X, X))):
        arguments = x, reference.block_amax(x), S2, _table(x)
        for actual, expected in zip(compiled(*arguments), _every_operation(*arguments), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
def test_every_operation_replays_from_a_cuda_graph():
    arguments = [X.clone(), AMAX.clone(), S2.clone(), _table(X)]
    before = _every_operation(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _every_operation(*arguments)
    x = X.flip(0) * -3
    for argument, new in zip(arguments, (x, reference.block_amax(x), S2 * 2, _table(X)), strict=True):
        argument.copy_(new)
    graph.replay()
    for index, (actual, expected) in enumerate(zip(captured, _every_operation(*arguments), strict=True)):
        assert_same_bits(actual, expected)
        assert not torch.equal(actual.float(), before[index].float())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
def test_a_new_shape_compiles_nothing(monkeypatch):
    _every_operation(X, AMAX, S2, _table(X))
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *_, **arguments: compiled.append(arguments) or False)
    for shape in ((1, 16), (16,), (7, 3, 112), (4096, 2048), (33, 64)):
        # `launch` keeps compiled kernels; with an empty store every call is looked up by Triton, which would compile what is new.
        monkeypatch.setattr(triton_kernels, "_compiled", {})
        x = torch.randn(shape, device=DEVICE)
        amax = reference.block_amax(x)
        expected = _every_operation(x.cpu(), amax.cpu(), S2.cpu(), _table(x).cpu())
        for _ in range(2):
            actual = _every_operation(x, amax, torch.cat((S2, S2, S2))[1:2], _table(x))
            # The first two divide by 6 in another way on CUDA.
            for a, b in zip(actual[2:], expected[2:], strict=True):
                assert_same_bits(a, b)
    assert not compiled


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
def test_the_whole_model_pass_replays_from_a_cuda_graph():
    masters = [torch.randn(64, 128, device=DEVICE), torch.randn(2, 32, 64, device=DEVICE)]
    decoded = [torch.empty_like(master, dtype=torch.bfloat16) for master in masters]
    quantizer = multi_tensor.MultiTensorQuantizer(masters, *chunks.slots_of_groups(masters, [0, 1]), decoded=decoded)
    quantizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantizer.step()
    masters[0].mul_(5)
    graph.replay()
    assert_same_bits(decoded[0], reference.fake_quant(masters[0].cpu(), quantizer.global_scales[0].cpu(), torch.bfloat16))
    assert_same_bits(quantizer.global_amax[0], masters[0].abs().amax())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
def test_a_step_allocates_nothing_after_the_first():
    masters = [torch.randn(64, 128, device=DEVICE) for _ in range(3)]
    decoded = [torch.empty_like(master, dtype=torch.bfloat16) for master in masters]
    steps = [torch.zeros(64, 8, dtype=torch.int8, device=DEVICE) for _ in masters]
    state = {"steps": steps, "hessians": [torch.eye(16, device=DEVICE).repeat(8, 1, 1)] * 3, "rule": FITTED}
    quantizer = multi_tensor.MultiTensorQuantizer(masters, [0, 1, 2], 3, decoded=decoded, **state)
    quantizer.step(refit=True)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    masters[1].mul_(7)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantizer.step()
        quantizer.step(refit=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
