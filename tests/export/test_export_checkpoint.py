"""`launch/export.py`: from a checkpoint file to a folder, or to one line of error."""

import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import Trained
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint import save
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nvfp4_train.checkpoints import SavedTensors
from nvfp4_train.export import verify_export
from nvfp4_train.export.checkpoint import load_checkpoint
from nvfp4_train.saving import ShardedWriter

SCRIPT = Path(__file__).parents[2] / "launch" / "export.py"
WITHOUT_FRAMEWORKS = """
import runpy, sys
for name in ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "compressed_tensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def parts(model: Trained, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a checkpoint holds: the state dict by itself, since a sharded one keeps it apart."""
    export = {
        "config": model.config.to_dict(),
        "generation_config": {"max_new_tokens": 5},
        "manifest": model.manifest.to_dict(),
    } | changes
    state = {f"model.{name}": weight for name, weight in model.weights.items()}
    return {"hyper_parameters": {"export": export}, "epoch": 1}, state


def save_checkpoint(model: Trained, path: Path, *, with_tokenizer: bool = False, **changes: Any) -> Path:
    rest, state = parts(model, **changes)
    path.parent.mkdir(parents=True)
    torch.save(rest | {"state_dict": state}, path)
    if with_tokenizer:
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path.parent / "tokenizer")
    return path


def save_sharded(model: Trained, path: Path, **extra: Any) -> Path:
    rest, state = parts(model)
    writer = ShardedWriter(path)
    writer.start(rest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({"state_dict": state | extra, "optimizer_0": {"state": {}}}, storage_writer=writer, no_dist=True)
    return path


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_exports_a_checkpoint_with_its_tokenizer_and_without_the_training_frameworks(
    cases: Callable[[str], Trained], tmp_path: Path
):
    model = cases("llama_tied")
    checkpoint = save_checkpoint(model, tmp_path / "checkpoints" / "last.ckpt", with_tokenizer=True)
    out = tmp_path / "out"
    command = [sys.executable, "-c", WITHOUT_FRAMEWORKS, str(SCRIPT), str(checkpoint), str(out), "--max-shard-bytes", "30000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "matrices in NVFP4" in done.stdout
    assert verify_export(out, model.compute_weights()).compared > 0
    assert len(list(out.glob("*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("a") == 1
    # The tokenizer of the run was made in memory, that of the script was loaded from a folder.
    saved = checkpoint.parent / "tokenizer" / "tokenizer_config.json"
    assert (out / saved.name).read_bytes() == saved.read_bytes()
    assert (out / "generation_config.json").exists()


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "mixtral"])
def test_checkpoint_gives_back_weights_config_and_manifest(name: str, cases: Callable[[str], Trained], tmp_path: Path):
    model = cases(name).with_rule(global_scale="exact", block_scale="four_over_six")
    path = save_checkpoint(model, tmp_path / "run" / "last.ckpt", generation_config=None)
    loaded = load_checkpoint(path)
    assert type(loaded.config) is type(model.config)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.manifest == model.manifest
    assert loaded.weights.keys() == model.weights.keys()
    assert all(torch.equal(weight, loaded.weights[name]) for name, weight in model.weights.items())
    assert loaded.generation_config is None
    assert loaded.tokenizer is None


@pytest.mark.parametrize("global_scale", ["pow2", "exact"])
def test_older_checkpoint_with_groups_of_modules_is_read(global_scale: str, cases: Callable[[str], Trained], tmp_path: Path):
    # Such a checkpoint knows linears alone.
    model = cases("phi3_fused").with_rule(global_scale=global_scale)
    groups = [[name.removesuffix(".weight") for name in group] for group in model.manifest.groups]
    path = save_checkpoint(model, tmp_path / "run" / "last.ckpt", groups=groups, global_scale=global_scale, manifest=None)
    saved = torch.load(path)
    del saved["hyper_parameters"]["export"]["manifest"]
    torch.save(saved, path)
    assert load_checkpoint(path).manifest == model.manifest


def changed(model: Trained, **weights: torch.Tensor) -> Trained:
    return replace(model, weights=model.weights | weights)


@pytest.mark.parametrize("name", ["qwen2_bias", "llama_tied", "mixtral"])
def test_script_exports_a_sharded_checkpoint_into_the_same_files(
    name: str, cases: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = cases(name)
    run_script(monkeypatch, save_checkpoint(model, tmp_path / "run" / "last.ckpt"), tmp_path / "one")
    run_script(monkeypatch, save_sharded(model, tmp_path / "sharded.ckpt"), tmp_path / "sharded")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()} == files


def test_tensors_of_a_sharded_checkpoint_are_read_when_they_are_asked_for(
    cases: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = cases("llama_odd")
    weights = load_checkpoint(save_sharded(model, tmp_path / "sharded.ckpt")).weights
    assert isinstance(weights, SavedTensors)
    assert set(weights) == set(model.weights)
    for shard in (tmp_path / "sharded.ckpt").glob("*.distcp"):
        shard.rename(tmp_path / "shard")
    assert "nonesuch" not in weights
    for name, weight in model.weights.items():
        assert name in weights
        assert (weights.meta(name).shape, weights.meta(name).dtype) == (weight.shape, weight.dtype)
    with pytest.raises(FileNotFoundError):
        weights["model.norm.weight"]
    (tmp_path / "shard").rename(tmp_path / "sharded.ckpt" / "__0_0.distcp")
    assert all(torch.equal(weights[name], weight) for name, weight in model.weights.items())
    assert weights["model.norm.weight"] is not weights["model.norm.weight"]


def missing_file(model: Trained, tmp_path: Path) -> Path:
    return tmp_path / "none.ckpt"


def text_file(model: Trained, tmp_path: Path) -> Path:
    path = tmp_path / "notes.ckpt"
    path.write_text("not a checkpoint\nat all")
    return path


def cut_file(model: Trained, tmp_path: Path) -> Path:
    path = save_checkpoint(model, tmp_path / "run" / "last.ckpt")
    path.write_bytes(path.read_bytes()[:1000])
    return path


def file_with_code(model: Trained, tmp_path: Path) -> Path:
    path = tmp_path / "code.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"export": Path("x")}}, path)
    return path


def unquantized_run(model: Trained, tmp_path: Path) -> Path:
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    return path


def unknown_architecture(model: Trained, tmp_path: Path) -> Path:
    return save_checkpoint(model, tmp_path / "run" / "last.ckpt", config={"model_type": "nonesuch"})


def nan_weight(model: Trained, tmp_path: Path) -> Path:
    broken = changed(model, **{"model.norm.weight": torch.full((64,), torch.nan)})
    return save_checkpoint(broken, tmp_path / "run" / "last.ckpt")


def nan_weight_in_a_shard(model: Trained, tmp_path: Path) -> Path:
    return save_sharded(changed(model, **{"model.norm.weight": torch.full((64,), torch.nan)}), tmp_path / "sharded.ckpt")


def weight_of_another_shape_in_a_shard(model: Trained, tmp_path: Path) -> Path:
    return save_sharded(changed(model, **{"model.norm.weight": torch.ones(32)}), tmp_path / "sharded.ckpt")


def no_tensor_in_a_shard(model: Trained, tmp_path: Path) -> Path:
    return save_sharded(model, tmp_path / "sharded.ckpt", **{"model.path": Path("x")})


def cut_shard(model: Trained, tmp_path: Path) -> Path:
    path = save_sharded(model, tmp_path / "sharded.ckpt")
    os.truncate(path / "__0_0.distcp", 5000)
    return path


def lost_shard(model: Trained, tmp_path: Path) -> Path:
    path = save_sharded(model, tmp_path / "sharded.ckpt")
    (path / "__0_0.distcp").unlink()
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def damaged_shard(model: Trained, tmp_path: Path) -> Path:
    path = save_sharded(model, tmp_path / "sharded.ckpt")
    flip_a_bit(path / "__0_0.distcp")
    return path


def damaged_file(model: Trained, tmp_path: Path) -> Path:
    path = save_checkpoint(model, tmp_path / "run" / "last.ckpt")
    flip_a_bit(path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing_file, "checkpoint must be a file"),
        (text_file, "no checkpoint that torch.load reads"),
        (cut_file, "last.ckpt was cut short: its end is missing, or damaged"),
        (file_with_code, "no checkpoint that torch.load reads"),
        (unquantized_run, "hyper_parameters['export']"),
        (unknown_architecture, "no model_type 'nonesuch'"),
        (nan_weight, "model.norm.weight holds NaN"),
        (nan_weight_in_a_shard, "model.norm.weight holds NaN"),
        (weight_of_another_shape_in_a_shard, "model.norm.weight must have the shape (64,) of the config, got (32,)"),
        (
            no_tensor_in_a_shard,
            "must hold tensors only under state_dict.model., got a value of another kind for state_dict.model.path",
        ),
        (cut_shard, "sharded.ckpt was cut short: __0_0.distcp has 5000 of "),
        (lost_shard, "sharded.ckpt was cut short: __0_0.distcp is missing"),
        (damaged_shard, "sharded.ckpt is damaged: __0_0.distcp does not have its checksum"),
        (damaged_file, "last.ckpt is damaged: data/"),
    ],
)
def test_bad_checkpoint_ends_with_one_line_of_error(
    make: Callable[[Trained, Path], Path],
    message: str,
    cases: Callable[[str], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    path = make(cases("llama"), tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, path, tmp_path / "out")
    assert str(caught.value.code).startswith("error: ")
    assert message in str(caught.value.code)
    assert "\n" not in str(caught.value.code)
    assert not (tmp_path / "out").exists()


def test_tied_weights_that_are_saved_twice_have_to_be_equal(cases: Callable[[str], Trained], tmp_path: Path):
    model = cases("llama_tied")
    assert "lm_head.weight" in load_checkpoint(save_sharded(model, tmp_path / "tied.ckpt")).weights
    # Memory of this size is mapped anew for each tensor, so that one read after the other comes to the same address.
    embedding = torch.ones(150_000, 64)
    config = model.config.from_dict(model.config.to_dict() | {"vocab_size": len(embedding)})
    tied = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1}
    other = replace(model, config=config, weights=model.weights | tied)
    for save_either in (save_sharded, save_checkpoint):
        weights = load_checkpoint(save_either(other, tmp_path / save_either.__name__ / "last.ckpt")).weights
        with pytest.raises(ValueError, match="lm_head.weight and model.embed_tokens.weight are tied in the config but differ"):
            replace(other, weights=weights).export(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_existing_folder_and_unknown_tokenizer_end_with_one_line_of_error(
    cases: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = save_checkpoint(cases("llama"), tmp_path / "run" / "last.ckpt")
    with pytest.raises(SystemExit, match=r"^error: .* exists; choose another"):
        run_script(monkeypatch, path, tmp_path / "run")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="^error: "):
        run_script(monkeypatch, path, tmp_path / "out", "--tokenizer", tmp_path / "nowhere")
