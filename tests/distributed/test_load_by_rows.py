"""A sharded model that each rank reads by rows from a folder is, bit for bit, the model that transformers loads."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from ranks import run_ranks
from running import assert_same
from safetensors.torch import load_file, save_file
from small_runs import train
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from whole import whole_tensors

from nvfp4_train.models.build import build_model
from nvfp4_train.models.causal_lm import ModelConfig, load_model
from nvfp4_train.models.folder import open_folder
from nvfp4_train.quant.policy import QuantConfig

SMALL: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "qwen2_bias": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    # Full and sliding attention have rotary embeddings of their own, and the embedding a scale in a buffer.
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    # Four experts, which three ranks share as two, two and none.
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    ),
}
CASES |= {
    # Experts with inputs first, which are held with outputs first: gate and up alternate, or they do not.
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8}),
    "llama4": ("llama4_text", {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 48}),
}
IDS = torch.arange(24).view(2, 12)


def save(case: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with random weights, in several files."""
    model_type, changes = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | changes), dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if case == "mistral":
        model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, max_shard_size="8KB")
    if case == "llama":
        (folder / "generation_config.json").unlink()
    return folder


def load_sharded(path: str) -> PreTrainedModel:
    opened = open_folder(ModelConfig(path=path))
    assert opened is not None
    model, _ = opened
    assert all(parameter.is_meta for parameter in model.parameters())
    return for_training(path, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


def for_training(path: str, **sharding: Any) -> PreTrainedModel:
    config, cpu = ModelConfig(path=path), torch.device("cpu")
    return build_model(config, QuantConfig(), cpu, compute_dtype=torch.bfloat16, **sharding).model


def compare(root: str) -> dict[str, list[str]]:
    """By case, what differs from the model that transformers loads."""
    return {case: differences(f"{root}/{case}") for case in CASES}


def differences(path: str) -> list[str]:
    model, whole = load_sharded(path), for_training(path)
    masters, expected = dict(whole_tensors(model)), whole.state_dict()
    buffers, expected_buffers = dict(model.named_buffers()), dict(whole.named_buffers())
    found = [name for name in expected if not same(masters.get(name), expected[name])]
    found += [name for name in expected_buffers if not same(buffers.get(name), expected_buffers[name])]
    if masters.keys() != expected.keys() or buffers.keys() != expected_buffers.keys():
        found.append("names")
    if model.config.to_dict() != whole.config.to_dict():
        found.append("config")
    if model.generation_config.to_dict() != whole.generation_config.to_dict():
        found.append("generation_config")
    is_tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, whole)]
    if is_tied[0] != is_tied[1]:
        found.append("ties")
    with torch.no_grad():
        if not same(model(IDS, use_cache=False).logits, whole(IDS, use_cache=False).logits):
            found.append("logits")
    return found


def same(tensor: Tensor | None, expected: Tensor) -> bool:
    return tensor is not None and tensor.dtype == expected.dtype and torch.equal(tensor, expected)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for case in CASES:
        save(case, folder / case)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def compared(request: pytest.FixtureRequest, root: Path) -> list[dict[str, list[str]]]:
    return run_ranks(request.param, compare, str(root), gpus=False)


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_one_that_transformers_loads(case: str, compared: list[dict[str, list[str]]], root: Path) -> None:
    assert len(list((root / case).glob("*.safetensors"))) > 2
    assert [rank[case] for rank in compared] == [[]] * len(compared)


def train_both(path: str) -> dict[str, Any]:
    options = {"model": {"path": path}, "steps": 3}
    runs = {how: train(how, **options) for how in ("ddp", "fsdp2")}
    train("fsdp2", **options, save=(2, f"{path}/middle.ckpt"))
    return runs | {"resumed": train("fsdp2", **options, resume=f"{path}/middle.ckpt")}


def test_a_run_from_a_folder_is_that_of_a_replicated_model(tmp_path: Path) -> None:
    (first, _) = run_ranks(2, train_both, str(save("llama_tied", tmp_path, torch.float32)))
    assert first["ddp"]["losses"] == first["fsdp2"]["losses"]
    assert_same(first["ddp"]["start"], first["fsdp2"]["start"])
    for how in ("fsdp2", "resumed"):
        assert_same(first["ddp"]["end"], first[how]["end"])


def edited(folder: Path, change: Any) -> ModelConfig:
    """The folder's tensors in one file, after a change to them."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(path=str(folder))


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


NORM = "model.layers.1.input_layernorm.weight"
FAULTS = {
    "missing": (lambda tensors: tensors.pop(NORM), f"misses {NORM}"),
    "unexpected": (lambda tensors: tensors.update(extra=torch.ones(1)), "holds tensors that the model has not: extra"),
    "shape": (lambda tensors: tensors.update({NORM: torch.ones(31)}), f"of another shape than the config says: .*{NORM}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_other_tensors_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    config = edited(save("llama", tmp_path), change)
    for load in (open_folder, load_model):
        with pytest.raises(ValueError, match=f"model.path='{tmp_path}' .*{message}"):
            load(config)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    file = min(save("llama", tmp_path).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{file.name} is cut short"):
        open_folder(ModelConfig(path=str(tmp_path)))


def test_tensors_that_transformers_drops_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert open_folder(edited(save("llama", tmp_path), lambda tensors: tensors.update({name: torch.ones(8)}))) is not None


def read_alone(path: str) -> str:
    try:
        return str(same(dict(whole_tensors(load_sharded(path)))["lm_head.weight"], torch.full((67, 32), 2.0)))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("embedding", "outcome"), [(2.0, "True"), (None, "True"), (3.0, "lm_head.weight and .* differ")])
def test_either_or_both_of_two_tied_tensors_may_be_stored(embedding: float | None, outcome: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.full((67, 32), 2.0)
        del tensors["model.embed_tokens.weight"]
        if embedding is not None:
            tensors["model.embed_tokens.weight"] = torch.full((67, 32), embedding)

    config = edited(save("llama_tied", tmp_path), change)
    (got,) = run_ranks(1, read_alone, config.path, gpus=False)
    assert re.search(outcome, got)


def test_names_that_only_a_full_load_knows_are_left_to_it(tmp_path: Path) -> None:
    """A file from the base model has its names without a prefix."""
    config = edited(
        save("llama_tied", tmp_path), lambda tensors: [rename(tensors, n, n.removeprefix("model.")) for n in [*tensors]]
    )
    assert open_folder(config) is None
    assert load_model(config).get_parameter(NORM).shape == (32,)


def test_a_name_of_the_hub_is_read_from_the_cache() -> None:
    cached = Path(HF_HUB_CACHE) / "models--nobody--small"
    save("llama", cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    assert open_folder(ModelConfig(path="nobody/small")) is not None


def test_a_model_without_a_path_is_left_to_a_full_construction() -> None:
    assert open_folder(ModelConfig(config={"model_type": "llama"})) is None
