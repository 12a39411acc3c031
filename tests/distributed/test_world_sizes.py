"""One seed and one global batch give one outcome, up to the order of fp32 sums, on any number of ranks and however the model is
sharded.

Equal masters have equal codes, block scales and global scales, whichever rank holds which rows. The first masters are compared with
those of one device, later ones with the whole masters quantized at once. Masters themselves differ only by the order in which a
product or a reduction adds up. They are equal to the bit among runs on equally many ranks, at most two of which add to one sum.
Codes and block scales are those that the ranks send; where nothing is sent, they are those of the whole masters.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_gpus, run_ranks
from small_runs import train

from nvfp4_train.kernels.fp4_kernel import fp4_dequantize, nvfp4_quantize

RUNS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"how": "auto"}, "fsdp2": {"how": "fsdp2"}},
    2: {
        "ddp": {"how": "ddp"},
        "fsdp2": {"how": "fsdp2"},
        "gathered as bf16": {"how": "fsdp2", "quant": {"gather": "bf16"}},
        "kept after forward": {"how": "fsdp2", "sharding": {"reshard_after_forward": False}},
        "gradient checkpointing": {"how": "fsdp2", "model": {"gradient_checkpointing": True}},
        # The third of four micro-batches is followed by validation.
        "validation in a window": {"how": "fsdp2", "val_check_interval": 3, "limit_val_batches": 1.0},
        "validation in a window, kept after forward": {
            "how": "fsdp2",
            "val_check_interval": 3,
            "limit_val_batches": 1.0,
            "sharding": {"reshard_after_forward": False},
        },
    },
    4: {"fsdp2": {"how": "fsdp2"}, "hsdp": {"how": "fsdp2", "sharding": {"replicate_size": 2}}},
}
SWITCH = {"quant": {"start_step": 2}}
TIED = {"model": {"tie_word_embeddings": True}}
EXACT = {"quant": {"global_scale": "exact"}}
PARTLY = {"quant": {"exclude": ["*.0.*"]}}
# Two quantized linears outside the decoder layers, around a tied embedding; one micro-batch a step.
PROJECTED = {
    "model": {
        "model_type": "opt",
        "tie_word_embeddings": True,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "max_position_embeddings": 16,
        "do_layer_norm_before": True,
        "dropout": 0.0,
    },
    "sequences_per_step": 2,
}
PAIRS: dict[str, dict[str, Any]] = {
    "switch": SWITCH,
    "tied": TIED,
    "projected": PROJECTED,
    "exact": EXACT,
    "partly": PARTLY,
    "off": {"quant": {"enabled": False}},
}


def train_all(world_size: int) -> dict[str, Any]:
    return {name: train(**options) for name, options in RUNS[world_size].items()}


def train_pairs() -> dict[str, Any]:
    return {f"{name} {how}": train(how, steps=4, **options) for name, options in PAIRS.items() for how in ("ddp", "fsdp2")}


def train_on_one(path: str) -> dict[str, Any]:
    return train("auto", sequences_per_step=6, steps=4, save=(2, path))


def train_on_three(path: str) -> dict[str, Any]:
    return {how: train(how, sequences_per_step=6, steps=4, resume=path) for how in ("ddp", "fsdp2")}


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Snapshots by rank, of every run by world size and name."""
    found = {}
    for world_size, options in RUNS.items():
        by_rank = run_ranks(world_size, train_all, world_size)
        found |= {(world_size, name): [rank[name] for rank in by_rank] for name in options}
    return found


@pytest.fixture(scope="module")
def references(runs: dict[tuple[int, str], list[dict[str, Any]]]) -> dict[bool, dict[str, Any]]:
    """The run of one device, by whether it is a GPU."""
    first = {on_gpus(1): runs[1, "one"][0]}
    if on_gpus(1):
        first[False] = run_ranks(1, train_all, 1, gpus=False)[0]["one"]
    return first


def assert_quantized_from_its_masters(state: dict[str, Any]) -> None:
    """Global scales, codes and block scales are what the whole masters, quantized at once, have."""
    assert state["codes"]
    amax = torch.zeros_like(state["global_amax"])
    for name, slot in state["slots"].items():
        amax[slot] = torch.maximum(amax[slot], state["masters"][name].abs().amax())
    assert torch.equal(state["global_amax"], amax)
    for name, slot in state["slots"].items():
        codes, scales = nvfp4_quantize(state["masters"][name], state["global_scale"][slot])
        assert torch.equal(state["codes"][name], codes), name
        assert torch.equal(state["block_scales"][name], scales.view(torch.uint8)), name
        expected = fp4_dequantize(codes, scales, state["global_scale"][slot], dtype=torch.bfloat16)
        assert torch.equal(state["compute_weights"][name], expected), name


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert torch.equal(first["global_scale"], second["global_scale"])
    assert torch.equal(first["global_amax"], second["global_amax"])
    assert first["codes"].keys() == first["block_scales"].keys() == first["compute_weights"].keys()
    for kind in ("masters", "compute_weights", "codes", "block_scales"):
        assert first[kind].keys() == second[kind].keys()
        for name, tensor in first[kind].items():
            assert torch.equal(tensor, second[kind][name]), f"{kind} {name}"


def assert_close_masters(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Equal but for the order of fp32 sums."""
    for name, master in second["masters"].items():
        torch.testing.assert_close(first["masters"][name], master, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, options in RUNS.items() for name in options])
def test_a_run_is_that_of_one_device(
    world_size: int, name: str, runs: dict[tuple[int, str], list[dict[str, Any]]], references: dict[bool, dict[str, Any]]
) -> None:
    expected = references[on_gpus(world_size)]
    assert len(expected["end"]["compute_weights"]) == 14
    assert not torch.equal(*(expected[when]["masters"]["model.norm.weight"] for when in ("start", "end")))
    of_first_rank = runs[world_size, name][0]
    for rank in runs[world_size, name]:
        assert_same_state(rank["start"], expected["start"])
        assert_same_state(rank["end"], of_first_rank["end"])
    assert_quantized_from_its_masters(of_first_rank["end"])
    assert_close_masters(of_first_rank["end"], expected["end"])


@pytest.mark.parametrize("name", RUNS[2])
def test_however_two_ranks_hold_the_model_they_end_with_the_same_bits(
    name: str, runs: dict[tuple[int, str], list[dict[str, Any]]]
) -> None:
    assert_same_state(runs[2, name][0]["end"], runs[2, "ddp"][0]["end"])


@pytest.fixture(scope="module")
def pairs() -> dict[str, Any]:
    return run_ranks(2, train_pairs)[0]


@pytest.mark.parametrize("name", PAIRS)
def test_sharded_and_replicated_runs_agree(name: str, pairs: dict[str, Any]) -> None:
    replicated, sharded = pairs[f"{name} ddp"], pairs[f"{name} fsdp2"]
    assert replicated["losses"] == sharded["losses"]
    for when in ("start", "end"):
        assert_same_state(replicated[when], sharded[when])


def test_quantization_changes_the_outcome(pairs: dict[str, Any]) -> None:
    assert pairs["switch fsdp2"]["losses"][:8] == pairs["off fsdp2"]["losses"][:8]
    assert pairs["switch fsdp2"]["losses"][8:] != pairs["off fsdp2"]["losses"][8:]
    assert not pairs["switch fsdp2"]["start"]["compute_weights"]


def test_three_ranks_with_uneven_shards(tmp_path: Path) -> None:
    """Equal masters have equal quantized weights; after two more steps masters differ by the order of fp32 sums alone."""
    path = str(tmp_path / "one.ckpt")
    (one,) = run_ranks(1, train_on_one, path, gpus=on_gpus(3))
    by_rank = run_ranks(3, train_on_three, path)
    ddp, fsdp2 = by_rank[0]["ddp"], by_rank[0]["fsdp2"]
    for rank in by_rank:
        for how in ("ddp", "fsdp2"):
            assert_same_state(rank[how]["start"], one["end"])
        assert_same_state(rank["fsdp2"]["end"], fsdp2["end"])
    assert_close_masters(fsdp2["end"], ddp["end"])
