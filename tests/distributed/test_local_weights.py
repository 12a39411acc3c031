"""The rows that ranks own are together those of the whole weights, each once, as they were quantized."""

import copy
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.scale_rules import MAX_RULE
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import SERVED_DTYPE, show_served
from nvfp4_train.quant.sharded import ShardedWeightStore
from nvfp4_train.quant.store import ReplicatedWeightStore, WeightStore

# Three ranks share 35 as 12, 12 and 11, and 4 as 2, 2 and none; two shards of two replicas 35 as 9 and 9, 9 and 8.
ROWS = {"0": 35, "1": 4, "2": 35}
MANIFEST = QuantManifest(groups=(("0.weight", "1.weight"), ("2.weight",)), rule=MAX_RULE)
PARTS = ("master", "codes", "block_scales", "global_amax", "global_scale")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, num_rows, bias=False) for num_rows in ROWS.values()))
    return model


def read(store: WeightStore) -> dict[str, Any]:
    store.update()
    return {
        weight.name: {"slots": [*weight.slots]} | {part: copied(getattr(weight, part)) for part in PARTS}
        for weight in store.local_weights()
    }


def copied(tensor: Tensor) -> Tensor:
    tensor = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return copy.deepcopy(tensor.detach().cpu())


def of_all_stores() -> dict[str, dict[str, Any]]:
    device = "cpu" if distributed.get_backend() == "gloo" else "cuda"
    world_size = distributed.get_world_size()
    meshes = {"fsdp2": (world_size,)} | ({"hsdp": (2, world_size // 2)} if world_size == 4 else {})
    policy = MixedPrecisionPolicy(param_dtype=SERVED_DTYPE, reduce_dtype=torch.float32)
    replicated = make_model().to(device)
    found = {"replicated": read(ReplicatedWeightStore(replicated, MANIFEST, show_served(replicated)))}
    for name, shape in meshes.items():
        for gather in ("packed", "bf16"):
            model = make_model().to(device)
            names = ("replicate", "shard")[-len(shape) :]
            fully_shard(model, mesh=init_device_mesh(device, shape, mesh_dim_names=names), mp_policy=policy)
            found[f"{name} {gather}"] = read(ShardedWeightStore(model, MANIFEST, gather=gather))
    return found


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_ranks_own_the_rows_of_the_whole_weights(world_size: int) -> None:
    ranks = run_ranks(world_size, of_all_stores)
    weights = [linear.weight.detach() for linear in make_model()]
    joint = torch.maximum(weights[0].abs().amax(), weights[1].abs().amax())
    for layout in ranks[0]:
        # Both replicas of a shard come before the next shard.
        order = [0, 2, 1, 3] if "hsdp" in layout else range(world_size)
        for index, (weight, amax) in enumerate(zip(weights, (joint, joint, weights[2].abs().amax()), strict=True)):
            s2 = reference.global_scale(amax)
            codes, block_scales = reference.quantize(weight, s2)
            own = [ranks[rank][layout][f"{index}.weight"] for rank in order]
            whole = {part: torch.cat([rank[part] for rank in own], dim=1) for part in PARTS[:3]}
            assert torch.equal(whole["master"][0], weight), layout
            assert torch.equal(whole["codes"][0], codes), layout
            assert torch.equal(whole["block_scales"][0], block_scales.view(torch.uint8)), layout
            for rank in own:
                assert rank["slots"] == [int(index == 2)]
                assert torch.equal(rank["global_amax"], amax.reshape(1))
                assert torch.equal(rank["global_scale"], s2.reshape(1))
        if world_size == 3:
            assert [rank[layout]["1.weight"]["master"].shape[1] for rank in ranks] == [2, 2, 0]
