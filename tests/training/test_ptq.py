"""launch/ptq.py: calibrates, quantizes, measures and exports without a training step, by every rule and for every serving."""

import json
from pathlib import Path

import pytest
import torch
from running import ROOT, SMALL, launch, metrics
from safetensors.torch import load_file

from nvfp4_train.export import verify_export
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES
from nvfp4_train.module import QATModule
from nvfp4_train.quant.policy import SERVINGS
from nvfp4_train.run.build import build
from nvfp4_train.run.compose import compose_options

RULES = tuple(BLOCK_SCALE_RULES)


def quantize(run_dir: Path, *overrides: str) -> None:
    """What the launcher does, in this process."""
    options, _ = compose_options(ROOT, [*SMALL, "logger=none", f"run_dir={run_dir}", *overrides])
    torch.manual_seed(0)
    trainer, module, data = build(options, trains=False)
    trainer.fit(module, data)
    assert trainer.global_step == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", ["next_token", "distillation"])
def test_the_gpu_does_the_work(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, measure = [], QATModule.measure
    monkeypatch.setattr(QATModule, "measure", lambda self, batches: devices.append(self.device.type) or measure(self, batches))
    quantize(tmp_path / "run", "trainer=gpu", f"loss={loss}", "quant.activations=nvfp4")
    assert devices
    assert set(devices) == {"cuda"}


def exported(run_dir: Path) -> bytes:
    return (run_dir / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, by rule and serving."""
    root = tmp_path_factory.mktemp("ptq")
    for rule in RULES:
        for serving, activations in SERVINGS.items():
            quantize(root / rule / serving, f"quant.rule={rule}", f"quant.activations={activations}", "quant.start_step=7")
    return root


@pytest.mark.parametrize("serving", SERVINGS)
@pytest.mark.parametrize("rule", RULES)
def test_a_model_is_quantized_without_training(rule: str, serving: str, runs: Path) -> None:
    run_dir = runs / rule / serving
    (group,) = json.loads((run_dir / "export" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert (group["input_activations"] is not None) == (serving == "w4a4")
    assert not list(run_dir.glob("checkpoints/*.ckpt"))
    found = metrics(run_dir)
    assert found["step"] == 0
    assert found["val/loss_quantized"] == found["val/loss_ptq"] == found[f"val/loss_ptq_{serving}"]
    assert found["val/loss_ptq_w4a16"] != found["val/loss_ptq_w4a4"]


def test_rules_differ_and_servings_have_the_same_weights(runs: Path) -> None:
    assert len({exported(runs / rule / "w4a16") for rule in RULES}) == len(RULES)
    for rule in RULES:
        w4a16, w4a4 = (load_file(runs / rule / serving / "export" / "model.safetensors") for serving in SERVINGS)
        assert all(tensor.equal(w4a4.pop(name)) for name, tensor in w4a16.items())
        assert len(w4a4) == 14
        assert all(name.endswith(".input_global_scale") for name in w4a4)
        numbers = [metrics(runs / rule / serving) for serving in SERVINGS]
        for serving in SERVINGS:
            assert numbers[0][f"val/loss_ptq_{serving}"] == numbers[1][f"val/loss_ptq_{serving}"]


def test_the_launcher_writes_the_same_bytes_on_one_device_and_sharded_over_two(tmp_path: Path) -> None:
    """In both formats, whose weights are gathered once each."""
    # Seven sequences are no multiple of two ranks.
    options = ("quant.rule=hessian", "quant.serve=w4a4", "quant.calibration.sequences=7", "callbacks.export.format=both")
    for name, ranks, how in (("one", 0, ()), ("two", 2, ("trainer=fsdp2", "trainer.accelerator=cpu"))):
        output = launch(tmp_path / name, *options, *how, ranks=ranks, script="ptq.py").stdout
        assert "inputs in NVFP4, " in output
        assert output.count("codes compared") == 2
        assert ",export_modelopt," in output
        assert not list(tmp_path.glob(f"{name}/checkpoints/*.ckpt"))
        assert metrics(tmp_path / name)["step"] == 0
        card = (tmp_path / name / "export_modelopt" / "README.md").read_text()
        assert "| method | PTQ" in card
        assert "`python launch/ptq.py " in card
        assert "PTQ, at the switch, W4A4" in card
        assert "at the end" not in card
    for folder in ("export", "export_modelopt"):
        one, two = (tmp_path / name / folder for name in ("one", "two"))
        assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
        # The cards differ in the options of the trainer.
        for file in one.iterdir():
            assert file.name == "README.md" or file.read_bytes() == (two / file.name).read_bytes(), file.name
    assert verify_export(tmp_path / "one" / "export_modelopt", format="modelopt").quantizes_inputs
