from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, load_config, load_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_a_saved_bf16_model_is_loaded_as_fp32_masters_in_training_mode(tmp_path: Path) -> None:
    fields = {name: value for name, value in LLAMA.items() if name != "model_type"}
    saved = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, saved.get_parameter(name).float())


def test_random_weights_follow_the_seed() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_model(ModelConfig(config=LLAMA)).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])


def test_random_weights_do_not_depend_on_the_device_that_is_the_default() -> None:
    """Lightning makes it the GPU in some of its strategies, and a GPU draws other numbers."""
    torch.manual_seed(0)
    expected = load_model(ModelConfig(config=LLAMA)).state_dict()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = load_model(ModelConfig(config=LLAMA))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_fields_of_the_config_reach_the_model() -> None:
    config = load_config(ModelConfig(config=LLAMA | {"rope_theta": 5000.0, "rms_norm_eps": 1e-4}))
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert config.rms_norm_eps == 1e-4


def test_fields_that_only_some_configs_carry_are_accepted() -> None:
    """A published Qwen3-MoE config has both, and the default config neither."""
    fields = {"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "head_dim": 16, "num_experts": 4}
    assert load_config(ModelConfig(config=fields)).head_dim == 16


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    fields = {name: value for name, value in LLAMA.items() if name != "model_type"}
    config = AutoConfig.for_model("llama", **fields)
    config.quantization_config = {"quant_method": "compressed-tensors"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized with compressed-tensors, which is not undone here"):
        load_config(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model.path or model.config is required"),
        ({"config": {"hidden_size": 8}}, "needs a model_type"),
        ({"config": LLAMA | {"hiden_size": 8}}, "a llama config has no field hiden_size"),
        ({"config": LLAMA | {"num_hidden_layers": "two"}}, "model.config: .*num_hidden_layers"),
        ({"path": "./nothing-here"}, "must be a folder with a config.json or a hub name"),
        ({"path": "nobody/nothing"}, "could not be read as a local folder or reached as a hub name"),
    ],
)
def test_bad_input_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(ModelConfig(**options))


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", **TINY},
        {"model_type": "mistral", "sliding_window": 4, "num_key_value_heads": 1, **TINY},
        {"model_type": "gemma3_text", "sliding_window": 4, "head_dim": 16, "num_key_value_heads": 1, **TINY},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_logits_are_those_of_the_model_and_the_host_waits_for_no_value(fields: dict) -> None:
    model = load_model(ModelConfig(config=fields)).eval()
    input_ids = torch.randint(0, 64, (2, 12))
    with ReadsOfValues() as reads:
        logits = compute_logits(model, input_ids)
    assert reads.count == 0
    assert torch.equal(logits, model(input_ids=input_ids, use_cache=False).logits)


class ReadsOfValues(TorchDispatchMode):
    """Counts how often the host reads a value of a tensor, for which it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["gptj", "llama"])
def test_buffers_are_those_that_a_reader_computes(model_type: str, tmp_path: Path) -> None:
    """GPT-J's sines were computed in bf16, as its class makes them, where from_pretrained computes them in float32."""
    fields = {"gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}, "llama": TINY}[model_type]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).save_pretrained(tmp_path)
    read = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_buffers())
    trained = dict(load_model(ModelConfig(path=str(tmp_path))).named_buffers())
    assert trained.keys() == read.keys()
    for name, buffer in read.items():
        assert trained[name].dtype is buffer.dtype
        assert torch.equal(trained[name], buffer), name
