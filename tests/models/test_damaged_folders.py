"""A folder that is not whole is refused in one line that names the file and the way out, whichever way it is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import config as datasets_config
from huggingface_hub import constants
from tiny_models import tiny_model

from nvfp4_train.data.cache import check_data_cache
from nvfp4_train.data.tokenizer import byte_tokenizer, load_tokenizer
from nvfp4_train.load_errors import reading
from nvfp4_train.models.causal_lm import ModelConfig, load_config, load_frozen, load_model
from nvfp4_train.models.folder import open_folder
from nvfp4_train.models.not_built import original_files
from nvfp4_train.models.weight_files import check_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
SHARD = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as one file, in three shards, and pickled."""
    model = tiny_model("llama", dtype=torch.bfloat16, vocab_size=272)
    made = {kind: tmp_path_factory.mktemp("whole") / kind for kind in ("one", "shards", "pickled")}
    for kind, folder in made.items():
        model.save_pretrained(folder, max_shard_size="60KB" if kind == "shards" else "1GB")
        byte_tokenizer().save_pretrained(folder)
    (made["pickled"] / "model.safetensors").unlink()
    torch.save(model.state_dict(), made["pickled"] / "pytorch_model.bin")
    return made


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def point(file: Path) -> None:
    file.write_text(POINTER)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def break_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[20] = 0
    file.write_bytes(content)


def link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "blobs" / "gone")


def drop_map(file: Path) -> None:
    file.write_text('{"metadata": {}}')


WEIGHTS: list[tuple[str, str, Callable[[Path], None], str]] = [
    (
        "one",
        "model.safetensors",
        cut,
        r"model.safetensors is cut short: its header says 170,728 bytes, it has 170,678; download",
    ),
    ("one", "model.safetensors", lengthen, r"model.safetensors is too long: its header says"),
    ("one", "model.safetensors", empty, r"model.safetensors is no safetensors file, or cut short, at 0 bytes"),
    ("one", "model.safetensors", break_header, r"its header is damaged"),
    ("one", "model.safetensors", point, r"model.safetensors is a Git LFS pointer.*git lfs pull"),
    ("one", "model.safetensors", link_to_nothing, r"model.safetensors is a link to a file that does not exist"),
    ("one", "model.safetensors", Path.unlink, r"no file named model.safetensors"),
    ("shards", SHARD, cut, rf"{SHARD} is cut short: its header says 52,184 bytes, it has 52,134"),
    ("shards", SHARD, point, rf"{SHARD} is a Git LFS pointer"),
    ("shards", SHARD, Path.unlink, rf"{SHARD}, which {INDEX} names, is missing"),
    ("shards", INDEX, halve, rf"{INDEX} is damaged.*download it again"),
    ("shards", INDEX, drop_map, rf"{INDEX} has no weight_map"),
    ("pickled", "pytorch_model.bin", halve, r"pytorch_model.bin is cut short, at"),
    ("pickled", "pytorch_model.bin", point, r"pytorch_model.bin is a Git LFS pointer"),
]


@pytest.mark.parametrize(("kind", "name", "damage", "message"), WEIGHTS, ids=[f"{n} {d.__name__}" for _, n, d, _ in WEIGHTS])
def test_weights_that_are_not_whole(
    kind: str, name: str, damage: Callable[[Path], None], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    config = ModelConfig(path=str(folder))
    readers: list[Callable[[], object]] = [lambda: load_model(config), lambda: load_frozen(config)]
    if kind != "pickled":
        readers.append(lambda: open_folder(config) or load_model(config))
    if damage is not Path.unlink or kind == "shards":
        readers += [lambda: check_folder(str(folder)), lambda: original_files(str(folder))]
    for read in readers:
        read()
    damage(folder / name)
    load_config(config)
    for read in readers:
        with pytest.raises(ValueError, match=rf"^model.path='{folder}': .*{message}") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_a_pickle_that_would_run_code_is_not_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["pickled"], folder)
    torch.save({"weight": Path("a class")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="hold more than tensors, and are not loaded; bring them as safetensors"):
        load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config.json is damaged: .*; download it again"),
        (POINTER, r"config.json is a Git LFS pointer"),
        ("[1]", r"config.json must hold a JSON object, got a list"),
        ("{}", r"model_type"),
        ('{"model_type": "llama", "hidden_size": "big"}', r"'hidden_size' expected int, got str"),
    ],
)
def test_a_damaged_config(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^model.path='{tmp_path}': .*{message}") as refused:
        load_config(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        ("tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "none"}}', "Set data.tokenizer: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json is damaged"),
    ],
)
def test_a_damaged_tokenizer(name: str, content: str, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["one"], folder)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_tokenizer(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import a_package_that_is_missing\n", "a_package_that_is_missing"),
        ("def (\n", "SyntaxError"),
        ("raise KeyError('what it needs')\n", "KeyError: 'what it needs'"),
        ("from transformers import PretrainedConfig as Other\n", "OwnConfig"),
        (None, "configuration_own.py"),
    ],
)
def test_code_of_a_folder_that_does_not_load(code: str | None, message: str, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Own"], "auto_map": auto_map}))
    if code is not None:
        (tmp_path / "configuration_own.py").write_text(code)
    with pytest.raises(ValueError, match=rf"^the code of model.path='{tmp_path}' does not load: .*{message}"):
        load_config(ModelConfig(path=str(tmp_path), trust_remote_code=True))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_atention"])
def test_an_attention_kernel_that_is_not_there(name: str, folders: dict[str, Path]) -> None:
    config = ModelConfig(path=str(folders["one"]), attn_implementation=name)
    for read in (load_model, load_frozen, open_folder):
        with pytest.raises(ValueError, match=rf"^model.attn_implementation='{name}' cannot be used: ") as refused:
            read(config)
        assert "\n" not in str(refused.value)


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = tmp_path / "file" / "datasets"
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", cache)
    with pytest.raises(ValueError, match=rf"the cache of datasets, {cache}, cannot be written .*set HF_HOME"):
        check_data_cache()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with (
        pytest.raises(ValueError, match=r"^model.path='a/b': the cache .* cannot be used .*set HF_HOME"),
        reading("model.path='a/b'", "a/b"),
    ):
        cache.mkdir()
