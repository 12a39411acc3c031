"""The model card: what is known of a run and a folder, and nothing that is not."""

import copy
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_models import Trained

from nvfp4_train.callbacks.run_facts import stages
from nvfp4_train.export import export_model
from nvfp4_train.export.card import (
    BEGIN,
    END,
    FolderFacts,
    RunFacts,
    Stage,
    adapted,
    card,
    format_section,
    public_command,
    public_name,
)
from nvfp4_train.export.convert import convert_folder
from nvfp4_train.export.masters import FromMasters

CaseOf = Callable[[str], Trained]
RUN = RunFacts(
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    command=("python", "launch/train.py", "+recipe=smollm2_135m_qad", "data.path=/home/me/text", "run_dir=/scratch/me/1"),
    method="QAD",
    equalization="exponent 0.5",
    steps=250,
    start_step=10,
    tokens=4_096_000,
    stages=(
        Stage(label="masters", numbers={"loss": 0.0, "kl": 0.0}),
        Stage(label="PTQ, W4A16", numbers={"loss": 0.0816, "kl": 0.0816, "top1_agreement": 0.862}),
        Stage(label="trained, W4A16", numbers={"kl": 0.0319}),
    ),
)


def folder(format: str = "compressed_tensors", **changes: Any) -> FolderFacts:
    known = {"activations": "none", "checked": ["our reader: all"], "scale_rule": "hessian", "versions": {"torch": "2.13"}}
    return FolderFacts(format=format, architecture="Qwen3ForCausalLM", **known | changes)


def front_matter(text: str) -> dict[str, Any]:
    start, header, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header)


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without the line of dashes."""
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [cells[0], *cells[2:]]


def test_all_that_is_known_is_told():
    text = card(RUN, folder())
    assert front_matter(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["nvfp4", "compressed-tensors", "w4a16"],
    }
    made = dict(rows(text, "How it was made")[1:])
    assert made["base model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert made["command"] == "`python launch/train.py +recipe=smollm2_135m_qad data.path=text`"
    assert made["training"] == "250 optimizer steps, 4,096,000 tokens, quantized from step 10 on"
    assert made["scale rule"] == "hessian"
    assert made["versions"] == "torch 2.13"
    assert rows(text, "What was measured") == [
        ["", "loss", "KL to the original, nats a token", "same most likely token"],
        ["masters", "0", "0", ""],
        ["PTQ, W4A16", "0.0816", "0.0816", "0.862"],
        ["trained, W4A16", "", "0.0319", ""],
    ]
    assert "- our reader: all" in text


def test_what_is_not_known_is_left_out():
    text = card(RunFacts(), folder(scale_rule=None, versions={}))
    assert "base_model" not in text
    assert [name for name, _ in rows(text, "How it was made")[1:]] == ["quantized"]
    assert "What was measured" not in text
    assert "None" not in text
    without_steps = card(RunFacts(steps=0, method="PTQ"), folder())
    assert "optimizer steps" not in without_steps


@pytest.mark.parametrize(
    ("format", "activations", "expected", "absent"),
    [
        ("compressed_tensors", "none", ["vllm serve", "Qwen3ForCausalLM.from_pretrained", "Marlin"], ["trtllm", "W4A4"]),
        ("compressed_tensors", "nvfp4", ["SM100, SM103 and SM12x", "W4A4", "Marlin"], ["trtllm"]),
        ("modelopt", "none", ["trtllm-serve", "W4A16_NVFP4"], ["Qwen3ForCausalLM"]),
        ("modelopt", "nvfp4", ["trtllm-serve", "on Blackwell"], ["Qwen3ForCausalLM"]),
        ("bf16", "nvfp4", ["whose inputs are not quantized here"], ["Marlin"]),
        ("a format of one's own", "none", ["our reader"], ["vllm serve", "Marlin"]),
    ],
)
def test_readers_and_kernels_are_those_of_the_format(format: str, activations: str, expected: list[str], absent: list[str]):
    section = format_section(format, "Qwen3ForCausalLM", activations, ["our reader: all"], None)
    for text in expected:
        assert text in section
    for text in absent:
        assert text not in section


def test_a_model_that_transformers_does_not_load_packed_has_the_line_that_it_loads():
    text = card(RUN, folder(note="transformers joins tensors; `python launch/convert.py FOLDER OTHER --to bf16`"))
    assert "Transformers joins tensors; `python launch/convert.py FOLDER OTHER --to bf16`." in text
    assert "Qwen3ForCausalLM" not in text


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/home/me/models/my-model/", "my-model"),
        ("~/my-model", "my-model"),
        ("../my-model", "my-model"),
        ("home/me/my-model", "my-model"),
        ("C:\\models\\my-model", "my-model"),
    ],
)
def test_of_a_path_the_last_part_is_public(name: str, public: str):
    assert public_name(name) == public


def test_a_folder_that_exists_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "secret" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("secret/model") == "model"
    assert public_command(["model.path=secret/model"]) == ["model.path=model"]


@pytest.mark.parametrize(
    ("part", "public"),
    [
        ("+recipe=quickstart", ["+recipe=quickstart"]),
        ("trainer=fsdp2", ["trainer=fsdp2"]),
        ("optim.lr=1e-4", ["optim.lr=1e-4"]),
        ("data.path=[/data/a.txt,~/b.txt]", ["data.path=[a.txt,b.txt]"]),
        ("model.path='/data/x y'", ["model.path='x y'"]),
        ("model.path=org/name", ["model.path=org/name"]),
        *((private, []) for private in ("run_dir=/x", "ckpt_path=auto", "logger=wandb", "+logger.wandb.entity=me")),
        *((private, []) for private in ("callbacks.export.folder=/x", "~callbacks.export", "hydra.run.dir=/x")),
    ],
)
def test_a_command_is_told_without_paths_and_without_what_concerns_one_machine(part: str, public: list[str]):
    assert public_command([part]) == public


def test_a_name_that_yaml_would_read_otherwise_is_quoted():
    text = card(RunFacts(base_model="/models/a: b"), folder())
    assert front_matter(text)["base_model"] == "a: b"


def test_only_the_part_of_the_format_changes_with_it():
    text = card(RUN, folder()).replace("## How it was made", "A sentence of mine.\n\n## How it was made") + "And one after.\n"
    section = format_section("modelopt", "Qwen3ForCausalLM", "none", ["another"], None)
    other = adapted(text, "compressed_tensors", "modelopt", section)
    assert other is not None
    assert front_matter(other)["library_name"] == "Model Optimizer"
    assert front_matter(other)["tags"] == ["nvfp4", "modelopt", "w4a16"]
    assert section in other
    assert "our reader" not in other
    assert "A sentence of mine." in other
    assert other.endswith("And one after.\n")
    back = adapted(
        other,
        "modelopt",
        "compressed_tensors",
        format_section("compressed_tensors", "Qwen3ForCausalLM", "none", ["our reader: all"], None),
    )
    assert back == text
    assert adapted("# A card of one's own\n", "compressed_tensors", "modelopt", section) is None


def test_stages_are_what_the_run_has_measured():
    results = {
        "val/loss_master_at_switch": 1.0,
        "val/loss_ptq": 1.1,
        "val/loss_ptq_w4a16": 1.1,
        "val/loss_ptq_w4a4": 1.2,
        "val/kl_ptq_w4a4": 0.2,
        "val/loss_master": 0.8,
        "val/loss_quantized": 0.9,
        "train/tokens_per_s": math.pi,
    }
    found = {stage.label: dict(stage.numbers) for stage in stages(results, is_trained=True)}
    assert found == {
        "masters in bf16, at the switch": {"loss": 1.0},
        "PTQ, at the switch, W4A16": {"loss": 1.1},
        "PTQ, at the switch, W4A4": {"loss": 1.2, "kl": 0.2},
        "masters in bf16, at the end": {"loss": 0.8},
        # Not calibrated again: one number, of the serving that was trained.
        "trained, at the end": {"loss": 0.9},
    }
    assert [stage.label for stage in stages(results, is_trained=False)][-1] == "PTQ, at the switch, W4A4"
    assert stages({}, is_trained=True) == []


def test_an_export_of_masters_tells_of_the_folder_and_of_nothing_else(cases: CaseOf, tmp_path: Path):
    model = cases("llama")
    report = model.export(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    made = dict(rows(text, "How it was made")[1:])
    assert made.keys() == {"quantized", "scale rule", "size", "versions"}
    assert made["scale rule"] == "max, global scales pow2"
    assert "61,440 parameters at 4.507 bits" in made["size"]
    assert f"torch {metadata.version('torch')}" in made["versions"]
    for line in report.verified.readers():
        assert f"- {line}" in text


def test_no_private_path_is_in_a_folder(cases: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = cases("llama")
    config = copy.deepcopy(model.config)
    monkeypatch.setattr(config, "_name_or_path", str(tmp_path / "private" / "my-llama"))
    export_model(tmp_path / "out", FromMasters(model.weights, model.manifest, config))
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text)["base_model"] == "my-llama"
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_converted_folder_has_a_card_of_its_format(cases: CaseOf, tmp_path: Path):
    cases("llama").export(tmp_path / "source")
    source = (tmp_path / "source" / "README.md").read_text()
    for to in ("modelopt", "bf16"):
        convert_folder(tmp_path / "source", tmp_path / to, to=to)
    text = (tmp_path / "modelopt" / "README.md").read_text()
    assert front_matter(text)["tags"] == ["nvfp4", "modelopt", "w4a16"]
    assert "trtllm-serve FOLDER" in text
    assert "compared with the compressed_tensors folder, bit for bit" in text
    assert (
        text.partition("## How it was made")[2].partition(BEGIN)[0]
        == (source.partition("## How it was made")[2].partition(BEGIN)[0])
    )
    plain = (tmp_path / "bf16" / "README.md").read_text()
    assert front_matter(plain)["tags"] == ["nvfp4", "bf16", "w4a16"]
    assert "every value is that of the compressed_tensors folder" in plain
    # A card that its user has written stays.
    (tmp_path / "source" / "README.md").write_text("# Mine\n")
    convert_folder(tmp_path / "source", tmp_path / "again", to="modelopt")
    assert (tmp_path / "again" / "README.md").read_text() == "# Mine\n"
    assert source.count(BEGIN) == source.count(END) == 1
