"""Models whose code comes with their folder: refused until it is trusted, and kept in the export."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from running import ROOT, forked_python, launch, train_environment
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from nvfp4_train.data.tokenizer import byte_tokenizer
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, load_config, load_model

CONFIGURATION = """
from transformers import PretrainedConfig


class CarriedConfig(PretrainedConfig):
    model_type = "carried"

    def __init__(self, vocab_size=272, hidden_size=64, num_hidden_layers=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_carried import CarriedConfig


class CarriedLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None].to(x.dtype)
        return x + self.mix_proj(self.norm(past))


class CarriedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CarriedConfig
    _no_split_modules = ["CarriedLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CarriedLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, **kwargs):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(x))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model that transformers does not know."""
    path = tmp_path_factory.mktemp("remote") / "carried"
    path.mkdir()
    (path / "configuration_carried.py").write_text(CONFIGURATION)
    (path / "modeling_carried.py").write_text(MODELING)
    config = {
        "model_type": "carried",
        "architectures": ["CarriedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_carried.CarriedConfig",
            "AutoModelForCausalLM": "modeling_carried.CarriedForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    made = load_config(ModelConfig(path=str(path), trust_remote_code=True))
    code = {name: (path / name).read_text() for name in ("configuration_carried.py", "modeling_carried.py")}
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, trust_remote_code=True).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    for name, text in code.items():
        (path / name).write_text(text)
    return path


def test_code_of_a_folder_does_not_run_unless_it_is_trusted(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has code of its own.*model.trust_remote_code=true"):
        load_model(ModelConfig(path=str(folder)))
    model = load_model(ModelConfig(path=str(folder), trust_remote_code=True))
    assert type(model).__name__ == "CarriedForCausalLM"
    assert next(model.parameters()).dtype is torch.float32


def test_the_launcher_names_the_option_in_one_line(folder: Path, tmp_path: Path) -> None:
    refused = launch(tmp_path / "run", f"model.path={folder}", check=False)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert "model.trust_remote_code=true" in line


def test_a_trusted_model_is_trained_and_exported_with_its_code(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("trainer.max_steps=2", "quant.start_step=0", "model.trust_remote_code=true", "model.compute_dtype=bfloat16")
    launch(run, f"model.path={folder}", *options)
    export = run / "export"
    for name in ("configuration_carried.py", "modeling_carried.py"):
        assert (export / name).read_text() == (folder / name).read_text()
    config = json.loads((export / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_carried.CarriedForCausalLM"
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = []
    for quantization in (None, CompressedTensorsConfig(dequantize=True)):
        options = {} if quantization is None else {"quantization_config": quantization}
        model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16, trust_remote_code=True, **options)
        logits.append(compute_logits(model.eval(), ids))
    assert torch.equal(*logits)
    script = ROOT / "launch" / "export.py"
    python, server = forked_python()

    def export_again(*more: str) -> subprocess.CompletedProcess[str]:
        command = [python, str(script), str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "again"), *more]
        return subprocess.run(command, capture_output=True, text=True, env=train_environment() | server, cwd=ROOT)

    assert "--trust-remote-code" in export_again().stderr
    again = export_again("--trust-remote-code")
    assert again.returncode == 0, again.stderr
    # The card of a run tells of the run.
    for path in (path for path in export.iterdir() if path.name != "README.md"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
