"""Linears with quantized inputs: their bits, their gradients, what they keep, and that they train as any other linear does."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tiny_models import tiny_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import MAX_RULE
from nvfp4_train.models.build import Trainable, make_trainable
from nvfp4_train.quant.inputs import InputQuantizers, record_inputs
from nvfp4_train.quant.linear import NVFP4Linear, quantize_inputs
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import QuantConfig

DTYPES = [torch.float32, torch.bfloat16]


class Scales:
    """Stands for the run's state."""

    def __init__(self, value: float = 2.0**-9) -> None:
        self.value = torch.tensor([value])

    def __call__(self, group: str) -> Tensor:
        return self.value


class CountedOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return self.calls.get(f"nvfp4::{name}", 0)


class Siblings(nn.Module):
    """Three linears of one input."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 16, bias=bias) for _ in range(3))
        self.called = ("q_proj", "k_proj", "v_proj")

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.called], dim=-1)


SIBLINGS = QuantManifest(groups=(("q_proj.weight", "k_proj.weight", "v_proj.weight"),), rule=MAX_RULE)


def siblings(**options: bool) -> tuple[Siblings, InputQuantizers]:
    torch.manual_seed(0)
    model = Siblings(**options)
    quantizers = quantize_inputs(model, SIBLINGS, Scales())
    quantizers.enable()
    return model, quantizers


class _STE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        return x_hat.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def plain_ste(x: Tensor, weight: Tensor, bias: Tensor | None, input_scale: Tensor) -> Tensor:
    with torch.no_grad():
        x_hat = reference.fake_quant_input(x, input_scale)
    return F.linear(_STE.apply(x, x_hat), weight, bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24, 32), (3, 8, 32), (32,), (0, 32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_are_those_of_a_straight_through_estimator(dtype: torch.dtype, shape: tuple, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, bias=bias, dtype=dtype))
    quantizers = quantize_inputs(model, QuantManifest(groups=(("0.weight",),), rule=MAX_RULE), Scales())
    quantizers.enable()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    inputs = [x, *model.parameters()]
    out = model(x)
    expected = plain_ste(x, model[0].weight, model[0].bias, torch.tensor([2.0**-9]))
    assert torch.equal(out, expected)
    dy = torch.randn_like(out)
    for ours, plain in zip(torch.autograd.grad(out, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, plain)


def test_without_quantized_inputs_it_is_the_linear_that_it_was() -> None:
    model, quantizers = siblings()
    keys, x = list(model.state_dict()), torch.randn(4, 32)
    quantizers.enable(False)
    assert isinstance(model.q_proj, NVFP4Linear)
    assert list(model.state_dict()) == keys == list(Siblings().state_dict())
    plain = Siblings()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    with quantizers.serving("w4a4"):
        assert quantizers.is_enabled
        assert not torch.equal(model(x), plain(x))
        with quantizers.serving("w4a16"):
            assert torch.equal(model(x), plain(x))
        assert quantizers.is_enabled
    assert not quantizers.is_enabled


def test_an_input_is_quantized_once_for_all_siblings() -> None:
    model, _ = siblings()
    for _ in range(2):
        with CountedOperators() as counted:
            model(torch.randn(4, 32))
        assert (counted.of("quantize_input"), counted.of("fake_quant_input")) == (1, 0)
    with torch.no_grad(), CountedOperators() as counted:
        model(torch.randn(4, 32))
    assert (counted.of("quantize_input"), counted.of("fake_quant_input")) == (0, 1)


def test_codes_are_made_where_the_same_input_was_seen_without_gradients() -> None:
    model, _ = siblings()
    x = torch.randn(4, 32)
    with torch.no_grad():
        model.q_proj(x)
    model.k_proj(x).sum().backward()
    assert model.k_proj.weight.grad is not None


def kept_values(model: Siblings, x: Tensor) -> "weakref.ref[Tensor]":
    quantizer = model.q_proj.input_quantizer
    assert quantizer._kept is not None
    return weakref.ref(quantizer._kept.quantized.values)


def test_nothing_is_kept_once_every_sibling_was_called() -> None:
    model, _ = siblings()
    x = torch.randn(4, 32)
    model.q_proj(x)
    values = kept_values(model, x)
    model.k_proj(x)
    model.v_proj(x)
    assert values() is None


def test_nothing_is_kept_longer_than_the_input_where_a_sibling_is_not_called() -> None:
    model, _ = siblings()
    model.called = ("q_proj", "v_proj")
    x = torch.randn(4, 32)
    model(x).sum().backward()
    values = kept_values(model, x)
    del x
    gc.collect()
    assert values() is None
    assert model.q_proj.input_quantizer._kept is None


def test_another_input_takes_the_place_of_one_that_not_all_siblings_used() -> None:
    model, _ = siblings()
    first, second = torch.randn(4, 32), torch.randn(4, 32)
    model.q_proj(first)
    values = kept_values(model, first)
    out = model.k_proj(second)
    assert values() is None
    assert torch.equal(out, plain_ste(second, model.k_proj.weight, model.k_proj.bias, torch.tensor([2.0**-9])))


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that a forward keeps for its backward, parameters and what is kept twice aside."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_codes_are_kept_for_the_backward_and_not_the_input() -> None:
    model, quantizers = siblings()
    model.bfloat16()
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    num_elements, scale_bytes = x.numel(), 4
    assert saved_bytes(lambda: model(x * 1.0)) == num_elements // 2 + num_elements // 16 + scale_bytes
    quantizers.enable(False)
    assert saved_bytes(lambda: model(x * 1.0)) == 2 * num_elements


def test_what_needs_no_gradient_keeps_nothing() -> None:
    model, _ = siblings()
    x = torch.randn(64, 32, requires_grad=True)
    model.requires_grad_(False)
    assert saved_bytes(lambda: model(x * 1.0)) == 0
    (dx,) = torch.autograd.grad(model(x).sum(), [x])
    ste = [plain_ste(x, m.weight, m.bias, torch.tensor([2.0**-9])) for m in (model.q_proj, model.k_proj, model.v_proj)]
    assert torch.equal(dx, torch.autograd.grad(torch.cat(ste, -1).sum(), [x])[0])
    assert not model(torch.randn(4, 32)).requires_grad


def test_a_scale_that_is_replaced_is_followed() -> None:
    """`nn.Module.to` replaces buffers, so does a load with `assign`."""
    torch.manual_seed(0)
    model, scales = Siblings(), Scales()
    quantizers = quantize_inputs(model, SIBLINGS, scales)
    quantizers.enable()
    x = torch.randn(4, 32)
    before = model(x)
    # Only where values saturate, or scales underflow, does another power of two change anything.
    scales.value = torch.tensor([2.0**-20])
    quantizers.enable()
    assert not torch.equal(model(x), before)
    quantizer, moved = quantizers["q_proj.weight"], x.to("meta")
    with pytest.raises(ValueError, match=r"input scale of q_proj.weight must be on the device of its input, meta, got cpu"):
        quantizer(moved)
    scales.value = scales.value.to("meta")
    assert quantizer(moved).values.is_meta


@pytest.mark.parametrize("value", [0.0, 3.0, torch.nan])
def test_a_scale_that_is_none_is_named_before_training(value: float) -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 16) for name in "ab"})
    manifest = QuantManifest(groups=(("a.weight",), ("b.weight",)), rule=MAX_RULE)
    scales = {"a.weight": torch.tensor([2.0**-9]), "b.weight": torch.tensor([value])}
    quantizers = quantize_inputs(model, manifest, scales.__getitem__)
    with pytest.raises(ValueError, match=rf"W4A4 needs an input scale for every quantized linear, .* got b.weight: {value}"):
        quantizers.check_calibrated()
    scales["b.weight"] = torch.tensor([0.5])
    quantizers.check_calibrated()


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (nn.Sequential(nn.Linear(24, 8)), "0.weight", "multiple of 16, got 24 of 0.weight; exclude it with quant.exclude"),
        (nn.Sequential(nn.Embedding(24, 8)), "0.weight", "inputs of nn.Linear alone, got 0.weight of a Embedding"),
        (nn.Sequential(nn.Linear(16, 8)), "0.bias", "inputs of nn.Linear alone, got 0.bias"),
    ],
)
def test_what_has_no_input_to_quantize_is_refused(model: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_inputs(model, QuantManifest(groups=((name,),), rule=MAX_RULE), Scales())


# ---- whole models ------------------------------------------------------------------------------------------------------------


def w4a4(model: nn.Module, *, compute_dtype: torch.dtype = torch.bfloat16) -> Trainable:
    made = make_trainable(model, QuantConfig(), compute_dtype=compute_dtype)
    for group in made.selection.manifest.groups:
        made.store.state.input_scale(group[0]).fill_(2.0**-7)
    made.store.update()
    made.inputs.enable()
    return made


@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
def test_a_model_computes_as_the_plain_class_with_both_quantized(compute_dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    served = tiny_model("llama", compute_dtype)
    made = w4a4(model, compute_dtype=compute_dtype)
    with torch.no_grad():
        for name, parameter in served.named_parameters():
            parameter.copy_(made.store.compute_weight(name) if name in made.store.names else parameter.bfloat16())
    for name in made.store.names:
        served.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args: (reference.fake_quant_input(args[0], torch.tensor([2.0**-7])),)
        )
    ids = torch.randint(0, 64, (2, 20))
    with CountedOperators() as counted:
        logits = model(input_ids=ids, use_cache=False).logits
    assert counted.of("quantize_input") == len(made.selection.manifest.groups)
    assert torch.equal(logits, served(input_ids=ids, use_cache=False).logits)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recomputed_activations_have_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        w4a4(model)
        found.append(gradients(model, torch.arange(32).reshape(2, 16)))
        kept = [m.input_quantizer._kept for m in model.modules() if isinstance(m, NVFP4Linear)]
        assert kept == [None] * len(kept)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_one_compilation_serves_all_layers_and_gives_the_same_bits() -> None:
    ids = torch.randint(0, 64, (1, 16))
    found = []
    for compile_layers in (False, True):
        model = tiny_model("llama", num_hidden_layers=10)
        quantizers = w4a4(model).inputs
        graphs: list[int] = []
        if compile_layers:
            torch._dynamo.reset()
            aot_eager = torch._dynamo.backends.registry.lookup_backend("aot_eager")

            def backend(graph: torch.fx.GraphModule, example: list[Tensor], aot=aot_eager, graphs=graphs) -> Any:
                graphs.append(1)
                return aot(graph, example)

            for layer in model.model.layers:
                layer.compile(backend=backend, fullgraph=True)
        found.append(gradients(model, ids))
        with torch.no_grad():
            found[-1]["logits"] = model(input_ids=ids, use_cache=False).logits
            with quantizers.serving("w4a16"):
                found[-1]["w4a16"] = model(input_ids=ids, use_cache=False).logits
        if compile_layers:
            # With gradients, without, and without quantized inputs.
            assert len(graphs) == 3
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_compiled_block_quantizes_an_input_once() -> None:
    """As Inductor partitions it: equal calls of the operators are merged, and the backward decodes once."""
    calls: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        calls.append([str(node.target) for node in graph.graph.nodes if "nvfp4" in str(node.target)])
        return make_boxed_func(graph.forward)

    model, _ = siblings()
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(4, 32, requires_grad=True)
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    assert calls == [["nvfp4.quantize_input.default"], ["nvfp4.dequantize.default"]]


def test_recorded_inputs_are_those_of_the_forward() -> None:
    model = tiny_model("llama")
    made = w4a4(model)
    quantizers = made.inputs
    quantizers.enable(False)
    ids = torch.randint(0, 64, (2, 50))
    samples = record_inputs(model, quantizers, lambda: model(input_ids=ids, use_cache=False))
    assert [sample.name for sample in samples] == [group[0] for group in made.selection.manifest.groups]
    assert not quantizers.is_enabled
    seen: list[Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)[:64]))
    with quantizers.serving("w4a4"):
        model(input_ids=ids, use_cache=False)
    (sample,) = [sample for sample in samples if sample.name == "model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(sample.x, seen[0])
    packed, scales = reference.quantize_input(sample.x, torch.tensor([2.0**-7]))
    assert torch.equal(sample.packed, packed)
    assert torch.equal(sample.scales.view(torch.uint8), scales.view(torch.uint8))
