import pytest
import torch
from torch import distributed, nn

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule
from nvfp4_train.quant.linear import NVFP4Linear, quantize_linears
from nvfp4_train.quant.store import WeightStore


def make(groups: list[list[str]], *, rule: ScaleRule = MAX_RULE, seed: int = 0) -> tuple[nn.Module, WeightStore]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(32, 8 * (i + 1)) for i, name in enumerate("abc")})
    quantize_linears(model, ["a", "b", "c"])
    return model, WeightStore(model, groups, rule=rule)


@pytest.mark.parametrize("rule", [MAX_RULE, ScaleRule(global_scale="exact"), ScaleRule(block_scale="mse")], ids=str)
def test_compute_weights_are_the_reference_with_the_groups_amax(rule: ScaleRule) -> None:
    model, store = make([["a", "c"], ["b"]], rule=rule)
    with torch.no_grad():
        model["c"].weight *= 7
    store.update()
    joint = torch.maximum(model["a"].weight.abs().amax(), model["c"].weight.abs().amax())
    for name, amax in (("a", joint), ("c", joint), ("b", model["b"].weight.abs().amax())):
        s2 = reference.global_scale(amax, rule)
        assert torch.equal(model[name].compute_weight, reference.fake_quant(model[name].weight, s2, torch.bfloat16, rule))
    assert torch.equal(store.global_amax, torch.stack([joint, model["b"].weight.abs().amax()]))


def test_update_follows_the_masters_and_reuses_its_memory() -> None:
    model, store = make([["a"], ["b"], ["c"]])
    store.update()
    before = model["a"].compute_weight
    value = before.clone()
    with torch.no_grad():
        model["a"].weight.neg_()
    store.update()
    assert model["a"].compute_weight is before
    assert torch.equal(before, -value)


def test_a_load_that_replaces_the_parameters_is_followed() -> None:
    model, store = make([["a"], ["b"], ["c"]])
    model["b"].weight = model["a"].weight
    store = WeightStore(model, [["a", "b"], ["c"]], rule=MAX_RULE)
    store.update()
    before = store.compute_weight("a").clone()
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        model["b"].weight.neg_()
    for _ in range(2):
        store.update()
        for name, expected in (("a", 2 * before), ("b", -2 * before)):
            assert model[name].compute_weight is store.compute_weight(name)
            assert torch.equal(store.compute_weight(name), expected), "the tie is gone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_move_to_another_device_is_followed() -> None:
    model, store = make([["a"], ["b"], ["c"]])
    store.update()
    before = store.compute_weight("a")
    model.cuda()
    store.update()
    assert torch.equal(store.compute_weight("a"), before.cuda())


def test_nothing_of_the_store_is_in_the_state_dict() -> None:
    model, store = make([["a"], ["b"], ["c"]])
    keys = list(model.state_dict())
    store.update()
    assert list(model.state_dict()) == keys


def test_masters_only_is_undone_by_an_exception_too() -> None:
    model, store = make([["a"], ["b"], ["c"]])
    store.update()

    def fail() -> None:
        with store.masters_only():
            assert model["a"].compute_weight is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert model["a"].compute_weight is not None


def test_a_shared_parameter_is_quantized_once() -> None:
    model, _ = make([["a"], ["b"], ["c"]])
    model["b"].weight = model["a"].weight
    store = WeightStore(model, [["a", "b"], ["c"]], rule=MAX_RULE)
    store.update()
    assert model["a"].compute_weight is model["b"].compute_weight
    assert [name for name, _, _ in store.items()] == ["a", "c"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model, store = make([["a", "b"], ["c"]])
    with torch.no_grad():
        model["b"].weight[0, 0] = bad
    store.update()
    with pytest.raises(ValueError, match="NaN or Inf in a, b;"):
        store.check_finite()


def test_all_groups_are_reduced_by_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor, op: calls.append((tensor.shape, op)))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        _, store = make([["a", "b"], ["c"]])
        store.update()
    finally:
        distributed.destroy_process_group()
    assert calls == [((2,), distributed.ReduceOp.MAX)]


def test_a_plain_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="a must be an NVFP4Linear, got Linear"):
        WeightStore(nn.ModuleDict({"a": nn.Linear(16, 16)}), [["a"]], rule=MAX_RULE)
    assert isinstance(NVFP4Linear.from_linear(nn.Linear(16, 16)), nn.Linear)
