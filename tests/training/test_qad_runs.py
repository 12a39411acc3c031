"""Runs of distillation with quantized inputs and a fitted rule: what they report, export, and continue from."""

import functools
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path

import pytest
import torch
from running import ROOT, assert_same, forked_python, launch, metrics, train_environment
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_train.checkpoints import read_checkpoint

# The switch is after step 1, and the rule chooses anew after steps 2 and 4.
STEPS = (
    "loss=distillation",
    "loss.hidden=0.5",
    "quant.rule=hessian",
    "quant.activations=nvfp4",
    "quant.refit_every=2",
    "quant.start_step=1",
    "optim.lr=1e-3",
    "optim.frozen=[*embed_tokens*,lm_head*]",
    # The schedule does not depend on the number of steps.
    "optim.min_lr_ratio=1",
    "trainer.max_steps=5",
    "trainer.log_every_n_steps=1",
)
HOW = {0: (), 2: ("trainer=fsdp2", "trainer.accelerator=cpu")}
"""Options of a run in one process, or sharded over two ranks."""
LAST = Path("checkpoints") / "last.ckpt"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, str]]:
    """Folder and output of the run that nothing interrupts."""

    @functools.cache
    def run(ranks: int) -> tuple[Path, str]:
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        return run_dir, launch(run_dir, *STEPS, *HOW[ranks], ranks=ranks).stdout

    return run


def assert_same_files(first: Path, second: Path, apart_from: Set[str] = frozenset()) -> None:
    names = {file.name for file in first.iterdir()}
    assert names == {file.name for file in second.iterdir()}
    for name in names - apart_from:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def weights_config(export: Path) -> dict:
    (group,) = json.loads((export / "config.json").read_text())["quantization_config"]["config_groups"].values()
    return group


def input_scales(export: Path) -> dict[str, Tensor]:
    """What is stored of the input of every quantized linear, by name."""
    suffix = ".input_global_scale"
    tensors = load_file(export / "model.safetensors")
    return {name.removesuffix(suffix): scale for name, scale in tensors.items() if name.endswith(suffix)}


def test_metrics_are_those_of_the_masters_and_of_every_serving(whole_run: Callable[[int], tuple[Path, str]]) -> None:
    found = metrics(whole_run(0)[0])
    states = ("master_at_switch", "ptq_w4a16", "ptq_w4a4", "master", "quantized_w4a16", "quantized_w4a4")
    for state in states:
        assert found[f"val/kl_{state}"] >= 0
        assert 0 <= found[f"val/top1_agreement_{state}"] <= 1
        mix = found[f"val/kl_{state}"] + 0.5 * found[f"val/hidden_error_{state}"]
        assert found[f"val/loss_{state}"] == pytest.approx(mix, rel=1e-5, abs=1e-9)
    assert found["val/kl_master_at_switch"] == pytest.approx(0, abs=1e-5), "until the switch there is nothing to learn"
    assert 0 < found["val/kl_ptq_w4a16"] < found["val/kl_ptq_w4a4"] == found["val/kl_ptq"]
    assert found["val/loss_quantized_w4a16"] != found["val/loss_quantized_w4a4"] == found["val/loss_quantized"]


@pytest.mark.parametrize("ranks", HOW)
def test_the_export_is_w4a4_and_its_input_codes_were_compared(ranks: int, whole_run: Callable[[int], tuple[Path, str]]) -> None:
    run_dir, output = whole_run(ranks)
    assert weights_config(run_dir / "export")["input_activations"]["num_bits"] == 4
    scales = input_scales(run_dir / "export")
    assert len(scales) == 14
    assert all(torch.frexp(scale).mantissa.item() == 0.5 for scale in scales.values()), "powers of two"
    for layer in ("model.layers.0", "model.layers.1"):
        queries, keys, values = (scales[f"{layer}.self_attn.{name}_proj"] for name in "qkv")
        assert queries == keys == values
        assert scales[f"{layer}.mlp.gate_proj"] == scales[f"{layer}.mlp.up_proj"]
    compared = re.search(r"verified .* inputs in NVFP4, ([\d,]+) of their codes compared", output)
    assert compared is not None, output
    # 64 tokens of the inputs of two layers: three of 64 channels, and one of 96.
    assert compared.group(1) == f"{64 * 2 * (3 * 64 + 96):,}"


@pytest.mark.parametrize("ranks", HOW)
def test_an_export_of_the_checkpoint_is_that_of_the_run(
    ranks: int, whole_run: Callable[[int], tuple[Path, str]], tmp_path: Path
) -> None:
    run_dir, _ = whole_run(ranks)
    python, server = forked_python()
    command = [python, ROOT / "launch" / "export.py", run_dir / LAST, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, env=train_environment() | server)
    assert result.returncode == 0, result.stderr
    assert "inputs in NVFP4, their codes not compared" in result.stdout
    # A checkpoint does not tell how it was trained.
    for folder in (run_dir / "export", tmp_path / "out"):
        assert "W4A4" in (folder / "README.md").read_text()
    assert_same_files(run_dir / "export", tmp_path / "out", apart_from={"README.md"})


@pytest.mark.parametrize("ranks", HOW)
def test_a_run_that_stopped_between_two_choices_ends_with_the_same_bits(
    ranks: int, whole_run: Callable[[int], tuple[Path, str]], tmp_path: Path
) -> None:
    """After step 3 each block keeps the choice of step 2, which its masters no longer tell."""
    whole, _ = whole_run(ranks)
    launch(tmp_path, *STEPS, *HOW[ranks], "trainer.max_steps=3", ranks=ranks)
    stopped = read_checkpoint(tmp_path / LAST)["state_dict"]
    output = launch(tmp_path, *STEPS, *HOW[ranks], "ckpt_path=auto", ranks=ranks).stdout
    assert f"ckpt_path=auto: {tmp_path / LAST}" in output

    ends = [read_checkpoint(run_dir / LAST) for run_dir in (whole, tmp_path)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "hyper_parameters"):
        assert_same(ends[0][key], ends[1][key], key)
    assert_same_files(whole / "export", tmp_path / "export")
    numbers = metrics(whole), metrics(tmp_path)
    for name in numbers[0].keys() - {"train/tokens_per_s"}:
        assert numbers[0][name] == numbers[1][name], name
    assert (whole / "sequences.json").read_bytes() == (tmp_path / "sequences.json").read_bytes()

    masters = {name: tensor for name, tensor in ends[0]["state_dict"].items() if name.startswith("model.")}
    kept = {name for name, tensor in masters.items() if torch.equal(tensor, stopped[name])}
    assert kept == {"model.model.embed_tokens.weight", "model.lm_head.weight"}, "what is frozen, and nothing else"
    state = {name: tensor for name, tensor in ends[0]["state_dict"].items() if name.startswith("quant_state.")}
    leaves = Counter(name.rpartition(".")[2] for name in state)
    assert leaves == {"steps": 14, "hessian": 8, "input_scale": 8}
    assert all(tensor.any() for tensor in state.values())
    is_new = [not torch.equal(tensor, stopped[name]) for name, tensor in state.items() if name.endswith(".steps")]
    assert any(is_new), "chosen after step 4"


@pytest.mark.parametrize("ranks", HOW)
def test_what_trained_as_w4a4_is_served_as_w4a16_when_told_so(
    ranks: int, whole_run: Callable[[int], tuple[Path, str]], tmp_path: Path
) -> None:
    """The run continues from its last step: no step is left to train."""
    whole, _ = whole_run(ranks)
    launch(tmp_path, *STEPS, *HOW[ranks], f"ckpt_path={whole / LAST}", "quant.serve=w4a16", ranks=ranks)
    assert weights_config(tmp_path / "export")["input_activations"] is None
    assert not input_scales(tmp_path / "export")
    w4a4, w4a16 = (load_file(run_dir / "export" / "model.safetensors") for run_dir in (whole, tmp_path))
    assert_same({name: tensor for name, tensor in w4a4.items() if "input_global_scale" not in name}, w4a16)
    for name in ("kl_quantized", "kl_quantized_w4a16", "kl_quantized_w4a4", "loss_ptq"):
        assert metrics(tmp_path)[f"val/{name}"] == metrics(whole)[f"val/{name}"], name
