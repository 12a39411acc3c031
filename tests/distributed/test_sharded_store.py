"""The sharded store by itself: what travels, what stays alive, and what it refuses."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import MAX_RULE
from nvfp4_train.quant import sharded
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import show_served
from nvfp4_train.quant.sharded import ShardedWeightStore
from nvfp4_train.quant.store import ReplicatedWeightStore

NAMES = ["0.weight", "1.weight", "2.weight"]
MANIFEST = QuantManifest(groups=(("0.weight", "1.weight"), ("2.weight",)), rule=MAX_RULE)
ONE = QuantManifest(groups=(("0.weight",),), rule=MAX_RULE)
KNOWS_INTERNALS = sharded.knows_internals
# Three ranks share 32 as 11, 11 and 10, and 4 as 2, 2 and none.
ROWS = (32, 48, 4)
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def make(
    gather: str = "packed",
    *,
    columns: int = 16,
    rows: tuple[int, ...] = ROWS,
    mp_policy: MixedPrecisionPolicy = POLICY,
    **sharding: Any,
) -> tuple[nn.Module, ShardedWeightStore]:
    torch.manual_seed(0)
    sizes = zip((columns, *rows), rows, strict=False)
    model = nn.Sequential(*(nn.Linear(k, n, bias=False) for k, n in sizes))
    device = "cpu" if distributed.get_backend() == "gloo" else "cuda"
    model.to(device)
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=mp_policy, reshard_after_forward=True, **sharding)
    return model, ShardedWeightStore(model, MANIFEST, gather=gather)


def expected_weights() -> list[Tensor]:
    torch.manual_seed(0)
    weights = [nn.Linear(k, n, bias=False).weight for k, n in ((16, 32), (32, 48), (48, 4))]
    joint = torch.maximum(weights[0].abs().amax(), weights[1].abs().amax())
    amaxes = [joint, joint, weights[2].abs().amax()]
    return [
        reference.fake_quant(w.detach(), reference.global_scale(a), torch.bfloat16)
        for w, a in zip(weights, amaxes, strict=True)
    ]


def shards_and_hooks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for gather in ("packed", "bf16"):
        model, store = make(gather)
        store.update()
        model.unshard()
        found[gather] = [linear.weight.detach().cpu().clone() for linear in model]
        found[f"{gather}, by name"] = [store.compute_weight(name).cpu() for name in NAMES]
        model.reshard()
        # Another unshard writes into the tensors of the first.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.neg_()
        store.update()
        model.unshard()
        found[f"{gather}, negated"] = [linear.weight.detach().cpu().clone() for linear in model]
        with store.masters_only():
            model.unshard()
            found[f"{gather}, masters"] = [linear.weight.detach().cpu().clone() for linear in model]
        model.unshard()
        found[f"{gather}, again"] = [linear.weight.detach().cpu().clone() for linear in model]
    return found


def made_while_unsharded() -> list[Tensor]:
    model, _ = make()
    model.unshard()
    store = ShardedWeightStore(model, MANIFEST)
    store.update()
    return [store.compute_weight(name).cpu() for name in NAMES]


def in_inference_mode() -> list[Tensor]:
    """Weights that a training computes with after an evaluation under inference_mode has turned to the masters and back."""
    model, store = make()
    store.update()
    with torch.inference_mode(), store.masters_only():
        pass
    model(torch.ones(1, 16, device=next(model.parameters()).device, dtype=torch.bfloat16)).sum().backward()
    model.unshard()
    return [linear.weight.detach().cpu().clone() for linear in model]


def with_a_pending_gather() -> list[Tensor]:
    """A gather that has begun is not taken for one of a later update, nor of the masters."""
    model, store = make()
    store.update()
    model(torch.ones(1, 16, device=next(model.parameters()).device, dtype=torch.bfloat16))
    model.unshard(async_op=True)
    with store.masters_only():
        model.unshard(async_op=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.unshard(async_op=True)
    store.update()
    model.unshard()
    return [linear.weight.detach().cpu().clone() for linear in model]


def of_two_stores() -> list[Tensor]:
    """A store that is made after another one computes with the masters until its own first update."""
    model, store = make()
    store.update()
    later = ShardedWeightStore(model, MANIFEST)
    model.unshard()
    assert not later.is_enabled
    return [linear.weight.detach().cpu().clone() for linear in model]


def replaced() -> list[Tensor]:
    """Local tensors are replaced by others of twice the value, as a load with `assign` or a move does."""
    model, store = make()
    store.update()
    model(torch.ones(1, 16, device=next(model.parameters()).device))
    for linear in model:
        linear.weight._local_tensor = 2 * linear.weight._local_tensor.detach()
    store.update()
    model.unshard()
    return [linear.weight.detach().cpu().clone() for linear in model]


def alive_after_backward() -> dict[str, Any]:
    """Bytes of gathered memory while a layer is unsharded and after a step, and bytes on the wire."""
    model, store = make(rows=(256, 256, 256), columns=256)
    store.update()
    group = model._get_fsdp_state()._fsdp_param_group
    params, gather, sent = group.fsdp_params, group._all_gather_comm, []

    class Counted(type(gather)):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.append(input_tensor.nbytes)
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    model.set_custom_all_gather(Counted())

    def gathered() -> int:
        tensors = [t for p in params for t in (p._unsharded_param, *p.all_gather_outputs)]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().size() for t in tensors}.values())

    model.unshard()
    unsharded = gathered()
    model.reshard()
    resharded = gathered()
    model(torch.ones(2, 256, device=params[0].device, dtype=torch.bfloat16)).sum().backward()
    return {"unsharded": unsharded, "freed": [resharded, gathered()], "sent": sent}


def kept_by_autograd() -> list[Tensor]:
    """A gradient that needs the weights: at once, and after they were freed and gathered again, twice."""
    model, store = make()
    store.update()
    model.unshard()
    x = torch.ones(1, 16, device=next(model.parameters()).device, dtype=torch.bfloat16, requires_grad=True)
    output = model[1](model[0](x)).sum()
    gradients = [*torch.autograd.grad(output, x, retain_graph=True)]
    for _ in range(2):
        model.reshard()
        model.unshard()
    gradients += torch.autograd.grad(output, x)
    return [gradient.cpu() for gradient in gradients]


def several_groups() -> list[Tensor]:
    """The first linear is gathered by itself, the others by the root, beside a weight that is not quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n, bias=False) for k, n in zip((16, *ROWS), ROWS, strict=False)), nn.LayerNorm(4))
    device = "cpu" if distributed.get_backend() == "gloo" else "cuda"
    model.to(device)
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh, mp_policy=POLICY, reshard_after_forward=True)
    store = ShardedWeightStore(model, MANIFEST)
    store.update()
    model(torch.ones(1, 16, device=device, dtype=torch.bfloat16)).sum().backward()
    with torch.no_grad():
        model[3].weight.add_(1 / 3)
    store.update()
    model[0].unshard()
    model.unshard()
    return [module.weight.detach().cpu().clone() for module in model]


def tensor_parallel() -> ReplicatedWeightStore:
    model = nn.Sequential(nn.Linear(48, 16))
    mesh = init_device_mesh("cpu" if distributed.get_backend() == "gloo" else "cuda", (distributed.get_world_size(),))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    return ReplicatedWeightStore(model, ONE, show_served(model))


def refused() -> list[str]:
    """The messages for weights that are sharded by columns, and for weights that are not sharded at all."""
    by_columns = {"rows": (48, 48, 48), "columns": 48, "shard_placement_fn": lambda parameter: Shard(1)}
    in_bf16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    plain = nn.Sequential(nn.Linear(16, 16))
    messages = []
    for build in (
        lambda: make(**by_columns),
        lambda: ShardedWeightStore(plain, ONE),
        lambda: make(**in_bf16),
        tensor_parallel().update,
    ):
        with pytest.raises(ValueError, match=r"0\.weight must ") as error:
            build()
        messages.append(str(error.value))
    return messages


def all_reduces() -> list[int]:
    calls: list[int] = []
    all_reduce = distributed.all_reduce
    distributed.all_reduce = lambda *args, **kwargs: calls.append(args[0].numel()) or all_reduce(*args, **kwargs)
    make()[1].update()
    distributed.all_reduce = all_reduce
    return calls


def in_fp32() -> dict[str, list[Tensor]]:
    """A model that FSDP2 gathers in fp32: quantized weights are decoded to fp32, all others are masters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in zip((16, *ROWS), ROWS, strict=False)))
    device = "cpu" if distributed.get_backend() == "gloo" else "cuda"
    model.to(device)
    biases = [linear.bias.detach().cpu().clone() for linear in model]
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    store = ShardedWeightStore(model, MANIFEST, gathered_in_fp32={model}, compute_dtype=torch.float32)
    store.update()
    model(torch.ones(1, 16, device=device)).sum().backward()
    store.update()
    model.unshard()
    return {
        "weights": [linear.weight.detach().cpu().clone() for linear in model],
        "by name": [store.compute_weight(name).cpu() for name in NAMES],
        "biases": [linear.bias.detach().cpu().clone() for linear in model],
        "expected biases": biases,
    }


def through_custom_all_gather() -> dict[str, Any]:
    """As in a version of PyTorch whose internals are not known."""
    sharded.knows_internals = lambda: False
    try:
        return {
            "weights": shards_and_hooks(),
            "made while unsharded": made_while_unsharded(),
            "gradients": kept_by_autograd(),
            "several groups": several_groups(),
            "in fp32": in_fp32(),
        }
    finally:
        sharded.knows_internals = KNOWS_INTERNALS


def everything() -> dict[str, Any]:
    return {
        "weights": shards_and_hooks(),
        "made while unsharded": made_while_unsharded(),
        "in inference mode": in_inference_mode(),
        "with a pending gather": with_a_pending_gather(),
        "of two stores": of_two_stores(),
        "replaced": replaced(),
        "memory": alive_after_backward(),
        "gradients": kept_by_autograd(),
        "several groups": several_groups(),
        "refused": refused(),
        "all_reduces": all_reduces(),
        "in fp32": in_fp32(),
        "documented": through_custom_all_gather() if distributed.get_world_size() > 1 else None,
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(request.param, everything)


def ways(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each rank found, by FSDP2's internals and by its documented all-gather, which takes at least two ranks."""
    return [way for rank in ranks for way in (rank, rank["documented"]) if way is not None]


def test_every_rank_computes_with_the_reference(ranks: list[dict[str, Any]]) -> None:
    assert len(ways(ranks)) == (1 if len(ranks) == 1 else 2 * len(ranks))
    for rank in ways(ranks):
        for gather in ("packed", "bf16"):
            for name, sign in ((gather, 1), (f"{gather}, by name", 1), (f"{gather}, negated", -1), (f"{gather}, again", -1)):
                for weight, expected in zip(rank["weights"][name], expected_weights(), strict=True):
                    assert torch.equal(weight, sign * expected), name


def test_masters_only_gathers_the_rounded_masters(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    masters = [-nn.Linear(k, n, bias=False).weight.detach().bfloat16() for k, n in ((16, 32), (32, 48), (48, 4))]
    for rank in ways(ranks):
        for gather in ("packed", "bf16"):
            for weight, master in zip(rank["weights"][f"{gather}, masters"], masters, strict=True):
                assert torch.equal(weight, master)


def test_a_store_may_be_made_while_weights_are_unsharded(ranks: list[dict[str, Any]]) -> None:
    for rank in ways(ranks):
        for weight, expected in zip(rank["made while unsharded"], expected_weights(), strict=True):
            assert torch.equal(weight, expected)


def test_an_evaluation_under_inference_mode_leaves_weights_to_train_with(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for weight, expected in zip(rank["in inference mode"], expected_weights(), strict=True):
            assert torch.equal(weight, expected)


def test_a_pending_gather_is_dropped(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for weight, expected in zip(rank["with a pending gather"], expected_weights(), strict=True):
            assert torch.equal(weight, 2 * expected)


def test_a_later_store_takes_over(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    masters = [nn.Linear(k, n, bias=False).weight.detach().bfloat16() for k, n in ((16, 32), (32, 48), (48, 4))]
    for rank in ranks:
        for weight, master in zip(rank["of two stores"], masters, strict=True):
            assert torch.equal(weight, master)


def test_replaced_local_tensors_are_followed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for weight, expected in zip(rank["replaced"], expected_weights(), strict=True):
            assert torch.equal(weight, 2 * expected)


def test_autograd_finds_the_weights_that_it_saved(ranks: list[dict[str, Any]]) -> None:
    for rank in ways(ranks):
        at_once, later = rank["gradients"]
        assert at_once.count_nonzero() > 0
        assert torch.equal(at_once, later)


def test_every_parameter_group_has_its_own_gather(ranks: list[dict[str, Any]]) -> None:
    # The norm's master of 4 / 3 is no bf16 value.
    all_expected = [*expected_weights(), torch.full((4,), 4 / 3).bfloat16()]
    for rank in ways(ranks):
        for weight, expected in zip(rank["several groups"], all_expected, strict=True):
            assert torch.equal(weight, expected)


def test_what_is_gathered_in_fp32_has_the_same_weights_and_whole_masters(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    weights = [nn.Linear(k, n).weight.detach() for k, n in ((16, 32), (32, 48), (48, 4))]
    joint = torch.maximum(weights[0].abs().amax(), weights[1].abs().amax())
    amaxes = (joint, joint, weights[2].abs().amax())
    for rank in ways(ranks):
        found = rank["in fp32"]
        for weight, by_name, master, amax in zip(found["weights"], found["by name"], weights, amaxes, strict=True):
            expected = reference.fake_quant(master, reference.global_scale(amax), torch.float32)
            assert torch.equal(weight, expected)
            assert torch.equal(by_name, expected)
        for bias, expected in zip(found["biases"], found["expected biases"], strict=True):
            assert torch.equal(bias, expected)


def test_only_decoded_weights_are_alive_and_only_while_unsharded(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["memory"]["unsharded"] == 2 * 3 * 256 * 256
        assert rank["memory"]["freed"] == [0, 0]


def test_weights_travel_together_as_0_5625_byte(ranks: list[dict[str, Any]]) -> None:
    # By itself, in the forward and in the backward; three ranks pad 256 rows to 258. With one nothing travels.
    num_elements = 3 * 256 * -(-256 // len(ranks))
    expected = [] if len(ranks) == 1 else [num_elements * 9 // 16] * 3
    assert all(rank["memory"]["sent"] == expected for rank in ranks)


def test_one_collective_reduces_all_groups(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["all_reduces"] == [2] for rank in ranks)


def test_columns_are_not_sharded(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        by_columns, plain, in_bf16, tensor_parallel = rank["refused"]
        assert "0.weight must be sharded by rows" in by_columns
        assert "0.weight must be managed by fully_shard" in plain
        assert "reduce_dtype=torch.float32, got" in in_bf16
        assert "whole on every rank, or sharded by fully_shard alone" in tensor_parallel
