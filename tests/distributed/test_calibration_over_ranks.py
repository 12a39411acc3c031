"""Calibration and equalization on any number of ranks, replicated or sharded: the same bits."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import tiny_config
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from whole import whole_tensors

from nvfp4_train.models.build import build_model
from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.models.equalize import equalize
from nvfp4_train.quant.calibration import calibrate
from nvfp4_train.quant.policy import QuantConfig

# Over four ranks one of them has two sequences, and the others run one that does not count.
TEXT = [torch.randint(3, 64, (1, 96), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
IDS = TEXT[0][:, :24]


def equalized(family: str, sharded: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a model that trains with quantized weights then has: statistics, masters, averages of gradients, names."""
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cpu" if distributed.get_backend() == "gloo" else "cuda")
    torch.manual_seed(0)
    mesh = init_device_mesh(device.type, (num_ranks,)) if sharded else None
    config = tiny_config(family, gradient_checkpointing=True)
    built = build_model(config, QuantConfig(), device, compute_dtype=dtype, mesh=mesh)
    model, manifest = built.model.to(device), built.selection.manifest
    built.store.update()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    # Every rank has the same gradients, so their mean is that of one device.
    compute_logits(model, TEXT[1].to(device)).float().logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

    each = -(-len(TEXT) // num_ranks)
    own = [(ids, True) for ids in TEXT[rank::num_ranks]]
    padded = own + [(TEXT[0], False)] * (each - len(own))
    batches = [({"input_ids": ids.to(device)}, is_counted) for ids, is_counted in padded]
    with built.store.masters_only():
        calibration = calibrate(model, manifest, batches, lambda batch: compute_logits(model, batch["input_ids"]))
        found = equalize(model, manifest, calibration.statistics, 0.5, IDS.to(device), optimizer=optimizer, round_to_pow2=True)
    averages = {name: optimizer.state[parameter]["exp_avg_sq"] for name, parameter in model.named_parameters()}
    return {
        "hessian": {group: statistics.hessian for group, statistics in calibration.statistics.items()},
        "amax": {group: statistics.amax for group, statistics in calibration.statistics.items()},
        "tokens": {group: statistics.num_tokens for group, statistics in calibration.statistics.items()},
        "masters": dict(whole_tensors(model)),
        "averages": {name: whole(average) for name, average in averages.items()},
        "folded": found.folded,
        "skipped": found.skipped,
    }


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_equalized(layouts: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    return {name: equalized(*layout) for name, layout in layouts.items()}


BF16 = torch.bfloat16
LAYOUTS: dict[int, dict[str, tuple[Any, ...]]] = {
    1: {
        "llama": ("llama", False),
        "llama in bf16": ("llama", False, BF16),
        "gemma2": ("gemma2", False),
        "one sharded": ("llama", True),
    },
    2: {
        "replicated": ("llama", False),
        "sharded": ("llama", True),
        "sharded in bf16": ("llama", True, BF16),
        "1 + weight": ("gemma2", True),
    },
    4: {"of four": ("llama", True)},
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """By layout, what every rank has."""
    runs = [run_ranks(world_size, all_equalized, layouts) for world_size, layouts in LAYOUTS.items()]
    return {name: [rank[name] for rank in ranks] for ranks in runs for name in ranks[0]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


LIKE = {
    "one sharded": "llama",
    "replicated": "llama",
    "sharded": "llama",
    "sharded in bf16": "llama in bf16",
    "of four": "llama",
    "1 + weight": "gemma2",
}
"""Which layout of one device each is compared with."""


@pytest.mark.parametrize("layout", LIKE)
def test_every_layout_has_the_statistics_of_one_device(layout: str, found: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = found[LIKE[layout]]
    for rank in found[layout]:
        assert set(rank["tokens"].values()) == {5 * 96}
        assert same(rank["hessian"], one["hessian"])
        assert same(rank["amax"], one["amax"])


@pytest.mark.parametrize("layout", LIKE)
def test_every_layout_has_the_masters_of_one_device(layout: str, found: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = found[LIKE[layout]]
    assert len(one["folded"]) == 2 * 4
    for rank in found[layout]:
        assert (rank["folded"], rank["skipped"]) == (one["folded"], {})
        assert same(rank["masters"], one["masters"])
        assert rank["averages"].keys() == one["averages"].keys()
        for name, average in one["averages"].items():
            # Gradients are sums over ranks, and shards reduce them in another order.
            tolerance = 1e-4 if "bf16" not in layout else 0.1
            torch.testing.assert_close(rank["averages"][name].cpu(), average.cpu(), rtol=tolerance, atol=1e-12, msg=name)
