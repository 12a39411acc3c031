"""An export of shards, of ranks or of their checkpoints, gives the very files that one rank writes of the whole masters."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import PROCESS, peak_growth, return_freed_memory
from ranks import on_gpus, run_ranks
from running import ROOT, forked_python, train_environment
from torch import Tensor, distributed
from torch.distributed.checkpoint import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from whole import whole_tensors

from nvfp4_train.callbacks.export import first_rank_awaited
from nvfp4_train.checkpoints import read_checkpoint
from nvfp4_train.errors import RunError
from nvfp4_train.export import ExportError, export_compressed_tensors, export_model, gathered, masters, verify
from nvfp4_train.export.checkpoint import load_checkpoint
from nvfp4_train.export.gathered import FAILED_ON_FIRST_RANK, FromRanks, sharded_state
from nvfp4_train.models.build import build_model
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.quant.policy import QuantConfig
from nvfp4_train.quant.sharded import ShardedWeightStore
from nvfp4_train.saving import ShardedWriter

# Rows of 67, 32, 48 and 64: two ranks cannot share the embedding evenly, three most tensors.
SMALL: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "gathered as bf16": {"gather": "bf16"},
    "exact": {"global_scale": "exact"},
    "qwen2 with biases": {"model_type": "qwen2"},
    "four over six": {"rule": "four_over_six", "gather": "bf16"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "quantized inputs": {"activations": "nvfp4"},
    # Held with outputs first, in one tensor with the biases beside it on disk; two ranks have two experts each, three 2, 2 and none.
    "experts with inputs first": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "head_dim": 16,
        "intermediate_size": 48,
        "activations": "nvfp4",
    },
    # A router in fp32, and q, k and v in one matrix on disk.
    "router in fp32": {"model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "joined on disk": {"model_type": "hrm_text", "num_key_value_heads": 4, "head_dim": 16},
}
SHARD_BYTES = 12_000


def make(
    *,
    model_type: str = "llama",
    gather: str = "packed",
    global_scale: str = "pow2",
    rule: str = "max",
    activations: str = "none",
    replicas: int = 1,
    **fields: Any,
) -> tuple[Any, ShardedWeightStore]:
    torch.manual_seed(0)
    device = torch.device("cpu" if distributed.get_backend() == "gloo" else "cuda")
    size = distributed.get_world_size() // replicas
    shape, names = ((replicas, size), ("replicate", "shard")) if replicas > 1 else ((size,), ("shard",))
    built = build_model(
        ModelConfig(config={"model_type": model_type} | SMALL | fields),
        QuantConfig(gather=gather, global_scale=global_scale, rule=rule, activations=activations),
        device,
        compute_dtype=torch.bfloat16,
        mesh=init_device_mesh(device.type, shape, mesh_dim_names=names),
    )
    model, store = built.model, built.store
    assert isinstance(store, ShardedWeightStore)
    for index, group in enumerate(store.manifest.groups):
        store.state.input_scale(group[0]).fill_(2.0 ** -(9 + index))
    store.update()
    return model, store


def export(model: Any, store: ShardedWeightStore, folder: str, **options: Any) -> bool:
    served = FromRanks(model, store)
    with served.answered() as is_writer:
        if is_writer:
            export_model(folder, served, generation_config=model.generation_config, **options)
    return is_writer


def export_whole(model: Any, store: ShardedWeightStore, folder: str, **options: Any) -> None:
    """The masters on rank 0, and the export of one rank."""
    weights = {name: tensor.cpu() for name, tensor in whole_tensors(model)}
    if distributed.get_rank() == 0:
        export_compressed_tensors(
            folder,
            weights=weights,
            manifest=store.manifest,
            config=model.config,
            state=store.state.state_dict(),
            generation_config=model.generation_config,
            **options,
        )


def save_checkpoint(model: Any, store: ShardedWeightStore, path: str) -> None:
    """As a run saves it; in place of optimizer states, which are no concern of an export, there are some bytes of them."""
    settings = {
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "manifest": store.manifest.to_dict(),
    }
    writer = ShardedWriter(Path(path))
    if distributed.get_rank() == 0:
        writer.start({"global_step": 1, "hyper_parameters": {"export": settings}})
    distributed.barrier()
    state = {f"model.{name}": tensor for name, tensor in sharded_state(model).items()}
    state |= {f"quant_state.{name}": tensor for name, tensor in store.state.state_dict().items()}
    optimizer = {"state": {"w": torch.ones(5)}, "param_groups": [{"params": ["w"]}]}
    save({"state_dict": state, "optimizer_0": optimizer}, storage_writer=writer)


def export_checkpoint(path: str, folder: str, *, at_once: bool = False, **options: Any) -> None:
    """As `launch/export.py` does, or, `at_once`, with all masters in memory."""
    checkpoint = load_checkpoint(Path(path))
    state = read_checkpoint(Path(path))["state_dict"] if at_once else {}
    export_compressed_tensors(
        folder,
        weights={name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")} or checkpoint.weights,
        manifest=checkpoint.manifest,
        config=checkpoint.config,
        state=checkpoint.quant_state,
        generation_config=checkpoint.generation_config,
        **options,
    )


def export_both(root: str, cases: dict[str, dict[str, Any]]) -> list[bool]:
    wrote = []
    for case, options in cases.items():
        model, store = make(**options)
        wrote.append(export(model, store, f"{root}/{case}/sharded", max_shard_bytes=SHARD_BYTES))
        export_whole(model, store, f"{root}/{case}/whole", max_shard_bytes=SHARD_BYTES)
        save_checkpoint(model, store, f"{root}/{case}/last.ckpt")
    return wrote


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=[1, 2, 3])
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    wrote = run_ranks(request.param, export_both, str(root), CASES)
    assert wrote == [[rank == 0] * len(CASES) for rank in range(request.param)]
    return root


@pytest.mark.parametrize("case", CASES)
def test_every_file_is_that_of_one_rank(case: str, exports: Path) -> None:
    found = digests(exports / case / "sharded")
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    assert found == digests(exports / case / "whole")


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_ranks_exports_the_same_files(case: str, exports: Path) -> None:
    assert not distributed.is_initialized()
    export_checkpoint(f"{exports / case / 'last.ckpt'}", f"{exports / case / 'later'}", max_shard_bytes=SHARD_BYTES)
    assert digests(exports / case / "later") == digests(exports / case / "whole")


def test_one_replica_exports(tmp_path: Path) -> None:
    assert [any(rank) for rank in run_ranks(4, export_both, str(tmp_path), {"hsdp": {"replicas": 2}})] == [True] + [False] * 3
    assert digests(tmp_path / "hsdp" / "sharded") == digests(tmp_path / "hsdp" / "whole")


def refused(folder: str) -> dict[str, str]:
    """What each way to fail raises."""
    messages = {}
    model, store = make()
    with pytest.raises((FileExistsError, RuntimeError)) as error:
        export(model, store, str(Path(folder).parent))
    messages["exists"] = str(error.value)
    with pytest.raises((ExportError, RuntimeError)) as error:
        export(model, store, folder, expected={})
    messages["differs"] = str(error.value)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        with torch.no_grad():
            rows = model.get_parameter(name).to_local()
            # On the last rank alone.
            rows[-1:] = torch.nan if distributed.get_rank() == distributed.get_world_size() - 1 else rows[-1:]
        store.update()
        with pytest.raises(ValueError, match="NaN or Inf") as error:
            export(model, store, folder)
        messages[name] = str(error.value)
    return messages


def test_every_rank_ends_with_an_error_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    first, second = run_ranks(2, refused, str(tmp_path / "export"))
    assert "is not replaced" in first["exists"] or "exists; choose another" in first["exists"]
    assert "missing" in first["differs"]
    assert "on the first rank" in second["exists"]
    assert "on the first rank" in second["differs"]
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        assert name.removesuffix(".weight") in first[name]
        assert first[name] == second[name]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def die_in_export(rank: int, how: str, folder: str) -> None:
    """Run by torchrun: a rank is killed, or has an error, in the middle of the export, within a gather."""
    distributed.init_process_group("gloo")
    model, store = make()
    served = FromRanks(model, store)
    gather, names = served._gather, []

    def gather_and_die(name: str) -> tuple[Tensor, ...]:
        names.append(name)
        if len(names) == 12 and distributed.get_rank() == rank:
            if how == "error":
                raise MemoryError("out of memory")
            print("killed", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(name)

    served._gather = gather_and_die  # type: ignore[method-assign]
    with served.answered() as is_writer:
        if is_writer:
            export_model(folder, served, max_shard_bytes=SHARD_BYTES)
    print("exported", flush=True)


@pytest.mark.parametrize(
    ("rank", "how", "shown"), [(0, "kill", "killed"), (1, "kill", "killed"), (0, "error", "out of memory")]
)
def test_a_rank_that_dies_leaves_no_folder(rank: int, how: str, shown: str, tmp_path: Path) -> None:
    python, server = forked_python()
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    result = subprocess.run(
        [*command, str(rank), how, str(tmp_path / "export")],
        capture_output=True,
        text=True,
        env=train_environment() | server,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode != 0
    assert shown in result.stderr
    assert "exported" not in result.stdout
    assert not (tmp_path / "export").exists()


def wait_for_first_rank() -> list[str]:
    """Longer than a collective would, and what the other rank hears of errors: a fault, and what the user can correct."""
    _set_pg_timeout(timedelta(seconds=2))
    is_first = distributed.get_rank() == 0
    with first_rank_awaited():
        time.sleep(4 if is_first else 0)
    _set_pg_timeout(timedelta(seconds=60))

    def fail(error: Exception) -> None:
        with first_rank_awaited():
            if is_first:
                raise error
            raise RunError("heard of a failure")

    heard = []
    for fault in (KeyError("on the first"), RunError("the disk is full")):
        with pytest.raises((KeyError, RunError)) as error:
            fail(fault)
        heard.append(str(error.value))
    return heard


def test_ranks_wait_for_the_first_however_long_it_exports() -> None:
    assert run_ranks(2, wait_for_first_rank) == [
        ["'on the first'", "the disk is full"],
        [FAILED_ON_FIRST_RANK, "the disk is full"],
    ]


MB = 1_000_000
# 47 million parameters: 188 MB of masters, 27 of them in NVFP4 and 17 in bf16 after the export.
LARGE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
# 51 million parameters, the largest tensor a matrix in NVFP4.
WIDE = LARGE | {"vocab_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4}
LARGE_SHARD_BYTES = 10 * MB
SLACK_BYTES = 15 * MB


def peaks(folder: str) -> dict[str, int]:
    return_freed_memory()
    # The check decodes in pieces, and ranks send in pieces, whose size does not grow with the model.
    verify.ELEMENTS_AT_ONCE = masters.ELEMENTS_AT_ONCE = gathered.GATHERED_AT_ONCE = 1 << 18
    warm_up = make()
    export(*warm_up, f"{folder}/small")
    model, store = make(**LARGE)
    options = {"max_shard_bytes": LARGE_SHARD_BYTES}
    return {
        "sharded": peak_growth(lambda: export(model, store, f"{folder}/sharded", **options)),
        "whole": peak_growth(lambda: export_whole(model, store, f"{folder}/whole", **options)),
    }


@pytest.mark.skipif(not (PROCESS / "clear_refs").exists() or on_gpus(2), reason="needs Linux, and shards in host memory")
def test_a_rank_holds_one_file_beside_its_own_weights(tmp_path: Path) -> None:
    first, second = run_ranks(2, peaks, str(tmp_path))
    bound = LARGE_SHARD_BYTES + SLACK_BYTES
    assert max(first["sharded"], second["sharded"]) <= bound
    assert first["whole"] > bound, "the test would not notice the masters on one rank"
    assert digests(tmp_path / "sharded") == digests(tmp_path / "whole")


def save_two(folder: str, large: dict[str, Any]) -> None:
    for name, fields in (("small", {}), ("large", large)):
        save_checkpoint(*make(**fields), f"{folder}/{name}.ckpt")


def peaks_of_checkpoint(folder: str) -> dict[str, int]:
    return_freed_memory()
    # As in `peaks`.
    verify.ELEMENTS_AT_ONCE = masters.ELEMENTS_AT_ONCE = 1 << 18
    export_checkpoint(f"{folder}/small.ckpt", f"{folder}/small")

    def peak(name: str, **options: Any) -> int:
        options |= {"max_shard_bytes": LARGE_SHARD_BYTES}
        return peak_growth(lambda: export_checkpoint(f"{folder}/large.ckpt", f"{folder}/{name}", **options))

    weights = load_checkpoint(Path(folder, "large.ckpt")).weights.values()
    return {
        "read when used": peak("later"),
        "read at once": peak("at once", at_once=True),
        "largest": max(weight.nbytes for weight in weights),
    }


@pytest.mark.parametrize("large", [LARGE, WIDE], ids=["large embedding", "large quantized matrix"])
@pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="needs Linux")
def test_the_export_of_a_checkpoint_holds_one_file_and_one_tensor(large: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(2, save_two, str(tmp_path), large, gpus=False)
    (found,) = run_ranks(1, peaks_of_checkpoint, str(tmp_path), gpus=False)
    # A tensor is copied from the shards of the ranks.
    bound = LARGE_SHARD_BYTES + 2 * found["largest"] + SLACK_BYTES
    assert found["read when used"] <= bound
    assert found["read at once"] > 3 * bound, "the test would not notice all masters in memory"


if __name__ == "__main__":
    die_in_export(int(sys.argv[1]), *sys.argv[2:])
