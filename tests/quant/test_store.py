import pytest
import torch
from torch import Tensor, distributed, nn

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import Shown, show_served
from nvfp4_train.quant.store import ReplicatedWeightStore

SEPARATE = [["a.weight"], ["b.weight"], ["c.weight"]]


def store_of(
    model: nn.Module, groups: list[list[str]], *, rule: ScaleRule = MAX_RULE, compute_dtype: torch.dtype = torch.bfloat16
) -> tuple[ReplicatedWeightStore, dict[str, list[Shown]]]:
    manifest = QuantManifest(groups=tuple(map(tuple, groups)), rule=rule)
    shown = show_served(model, compute_dtype=compute_dtype)
    return ReplicatedWeightStore(model, manifest, shown, compute_dtype=compute_dtype), shown


def make(groups: list[list[str]], **options: object) -> tuple[nn.Module, ReplicatedWeightStore, dict[str, list[Shown]]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(32, 8 * (i + 1)) for i, name in enumerate("abc")})
    return model, *store_of(model, groups, **options)  # type: ignore[arg-type]


def used(shown: dict[str, list[Shown]], name: str) -> Tensor | None:
    """The compute weight that the forward takes."""
    (place,) = shown[name]
    return place.compute_weight


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("global_scale", ["pow2", "exact"])
@pytest.mark.parametrize("block_scale", ["max", "four_over_six", "mse"])
def test_compute_weights_are_the_reference_with_the_groups_amax(
    block_scale: str, global_scale: str, compute_dtype: torch.dtype
) -> None:
    """Whatever the dtype of the computation, they have the bf16 values that readers decode."""
    rule = ScaleRule(global_scale=global_scale, block_scale=block_scale)
    model, store, shown = make([["a.weight", "c.weight"], ["b.weight"]], rule=rule, compute_dtype=compute_dtype)
    with torch.no_grad():
        model["c"].weight *= 7
    store.update()
    joint = torch.maximum(model["a"].weight.abs().amax(), model["c"].weight.abs().amax())
    for name, amax in (("a", joint), ("c", joint), ("b", model["b"].weight.abs().amax())):
        s2 = reference.global_scale(amax, rule)
        expected = reference.fake_quant(model[name].weight, s2, torch.bfloat16, rule)
        weight = used(shown, f"{name}.weight")
        assert weight.dtype == compute_dtype
        assert torch.equal(weight, expected.to(compute_dtype))
    assert torch.equal(store.global_amax, torch.stack([joint, model["b"].weight.abs().amax()]))


def test_update_follows_the_masters_and_reuses_its_memory() -> None:
    model, store, shown = make(SEPARATE)
    store.update()
    before = used(shown, "a.weight")
    value = before.clone()
    with torch.no_grad():
        model["a"].weight.neg_()
    store.update()
    assert used(shown, "a.weight") is before
    assert torch.equal(before, -value)


def test_a_load_that_replaces_the_parameters_is_followed() -> None:
    model, _, _ = make(SEPARATE)
    model["b"].weight = model["a"].weight
    store, shown = store_of(model, [["a.weight", "b.weight"], ["c.weight"]])
    store.update()
    before = store.compute_weight("a.weight").clone()
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        model["b"].weight.neg_()
    for _ in range(2):
        store.update()
        for name, expected in (("a.weight", 2 * before), ("b.weight", -2 * before)):
            assert used(shown, name) is store.compute_weight(name)
            assert torch.equal(store.compute_weight(name), expected), "the tie is gone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_move_to_another_device_is_followed() -> None:
    model, store, _ = make(SEPARATE)
    store.update()
    before = store.compute_weight("a.weight")
    model.cuda()
    store.update()
    assert torch.equal(store.compute_weight("a.weight"), before.cuda())


def test_nothing_of_the_store_is_in_the_state_dict() -> None:
    model, store, _ = make(SEPARATE)
    keys = list(model.state_dict())
    store.update()
    assert list(model.state_dict()) == keys


def test_masters_only_is_undone_by_an_exception_too() -> None:
    _, store, shown = make(SEPARATE)
    store.update()

    def fail() -> None:
        with store.masters_only():
            assert used(shown, "a.weight") is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert used(shown, "a.weight") is not None


def test_a_shared_parameter_is_quantized_once() -> None:
    model, _, _ = make(SEPARATE)
    model["b"].weight = model["a"].weight
    store, shown = store_of(model, [["a.weight", "b.weight"], ["c.weight"]])
    store.update()
    assert used(shown, "a.weight") is used(shown, "b.weight")
    assert store.names == ["a.weight", "c.weight"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model, store, _ = make([["a.weight", "b.weight"], ["c.weight"]])
    with torch.no_grad():
        model["b"].weight[0, 0] = bad
    store.update()
    with pytest.raises(ValueError, match=r"NaN or Inf in a\.weight, b\.weight;"):
        store.check_finite()


def test_all_groups_are_reduced_by_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor, op: calls.append((tensor.shape, op)))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        _, store, _ = make([["a.weight", "b.weight"], ["c.weight"]])
        store.update()
    finally:
        distributed.destroy_process_group()
    assert calls == [((2,), distributed.ReduceOp.MAX)]


def test_experts_have_a_slot_each() -> None:
    """A 3-D parameter [E, N, K] has E global scales, shared by expert with its sibling; its compute weight is that of each expert."""
    torch.manual_seed(0)
    model = nn.Module()
    for name, rows in (("gate", 8), ("up", 4)):
        model.register_parameter(name, nn.Parameter(torch.randn(3, rows, 32) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1)))
    store, shown = store_of(model, [["gate", "up"]])
    store.update()
    assert store.slots("gate") == store.slots("up") == slice(0, 3)
    for expert in range(3):
        amax = torch.maximum(model.gate[expert].abs().amax(), model.up[expert].abs().amax())
        assert store.global_amax[expert] == amax
        s2 = reference.global_scale(amax, MAX_RULE)
        for name in ("gate", "up"):
            expected = reference.fake_quant(getattr(model, name)[expert].detach(), s2, torch.bfloat16)
            assert torch.equal(used(shown, name)[expert], expected)


def test_some_parameters_alone_are_shown_quantized_and_all_again_afterwards() -> None:
    model, _, _ = make(SEPARATE)
    model["b"].weight = model["a"].weight
    store, shown = store_of(model, [["a.weight", "b.weight"], ["c.weight"]])
    store.update()
    weights = {name: used(shown, name) for name in store.manifest.names}
    # One name stands for a parameter that two modules share.
    for names, expected in ((["b.weight"], {"a.weight", "b.weight"}), (["c.weight"], {"c.weight"}), ([], set())):

        def look(names: list[str] = names, expected: set[str] = expected) -> None:
            with store.quantized_only(names):
                for name, weight in weights.items():
                    assert used(shown, name) is (weight if name in expected else None)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            look()
        assert all(used(shown, name) is weight for name, weight in weights.items())
    with store.masters_only(), store.quantized_only(["c.weight"]):
        assert used(shown, "a.weight") is None
        assert used(shown, "c.weight") is weights["c.weight"]


def test_only_quantized_parameters_can_be_shown_quantized() -> None:
    _, store, _ = make(SEPARATE)
    with pytest.raises(ValueError, match="call update first"), store.quantized_only(["a.weight"]):
        pass
    store.update()
    with pytest.raises(ValueError, match=r"names must be those of quantized parameters, got a\.bias"):
        store.quantized_only(["a.weight", "a.bias"]).__enter__()
