"""The control of oscillation as an option of a run."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from running import ROOT, launch, load_checkpoint, metrics

from nvfp4_train.callbacks.oscillation import OscillationControl
from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig
from nvfp4_train.quant.policy import QuantConfig

SHORT = ("trainer.val_check_interval=100", "callbacks.served_check=null", "callbacks.scale_stats=null")
EARLY = (
    "callbacks.oscillation.from_share=0.2",
    "callbacks.oscillation.every_n_steps=2",
    "callbacks.oscillation.min_reversals=1",
)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps, of which the last freezes weights. What was trained is exported and verified."""
    run_dir = tmp_path_factory.mktemp("frozen") / "run"
    options = ("trainer.max_steps=5", "optim.lr=1e-2", "optim.warmup_steps=0", "callbacks.oscillation.action=freeze")
    launch(run_dir, *SHORT, *EARLY, *options)
    return run_dir


def test_one_option_turns_it_on(frozen: Path) -> None:
    found = metrics(frozen)
    assert 0 < found["quant/oscillating_share"] == found["quant/frozen_share"] < 1
    checkpoint = load_checkpoint(frozen / "checkpoints" / "last.ckpt")
    histories = [tensor for name, tensor in checkpoint["state_dict"].items() if name.endswith(".history")]
    assert len(histories) == 14
    share = sum(int((history >> 4 == 15).sum()) for history in histories) / sum(history.numel() for history in histories)
    assert share == found["quant/frozen_share"]
    assert (frozen / "export" / "model.safetensors").exists()


def test_a_run_says_which_option_a_checkpoint_with_a_history_needs(frozen: Path, tmp_path: Path) -> None:
    options = ("trainer.max_steps=6", f"ckpt_path={frozen}/checkpoints/last.ckpt")
    result = launch(tmp_path / "run", *SHORT, *options, check=False)
    assert result.returncode == 1
    *_, line = result.stderr.splitlines()
    assert ".history is (" in line
    assert line.endswith("there and missing here; set callbacks.oscillation.action as in the run that saved it")


def test_it_is_off_by_default() -> None:
    options = yaml.safe_load((ROOT / "configs" / "callbacks" / "default.yaml").read_text())
    assert list(options).index("oscillation") < list(options).index("requantize")
    written = {name: value for name, value in options["oscillation"].items() if name != "_target_"}
    assert written == {"action": None, "from_share": 0.7, "every_n_steps": 50, "min_reversals": 2}
    control, default = OscillationControl(**written), OscillationControl()
    assert (control.rule, control.from_share) == (default.rule, default.from_share)
    assert control.state_dict() == {}


def set_up(*callbacks: L.Callback, max_steps: int = 9, **quant: Any) -> None:
    trainer = L.Trainer(
        callbacks=list(callbacks), max_steps=max_steps, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = QATModule(model=ModelConfig(config={"model_type": "llama"}), quant=QuantConfig(**quant), optim=OptimConfig())
    for callback in callbacks:
        callback.setup(trainer, module, "fit")


def test_what_could_not_work_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.oscillation must be listed before callbacks\.requantize"):
        set_up(Requantize(), OscillationControl(action="reset", every_n_steps=3, from_share=0.3))
    with pytest.raises(ValueError, match=r"callbacks\.oscillation\.action must be null where quant\.enabled=false, got reset"):
        set_up(OscillationControl(action="reset"), enabled=False)
    with pytest.raises(ValueError, match="from_share must be 0 to 1, got 70"):
        OscillationControl(from_share=70)
    set_up(OscillationControl(), Requantize(), enabled=False)
    set_up(OscillationControl(action="reset", every_n_steps=3, from_share=0.3), Requantize())
    with pytest.raises(ValueError, match="acts first after step 10 .* which trainer.max_steps=9 does not reach"):
        set_up(OscillationControl(action="reset", every_n_steps=3), Requantize())
    with pytest.raises(ValueError, match="action=freeze needs quant.refit_every=1 under quant.rule=hessian, got 10"):
        set_up(OscillationControl(action="freeze", every_n_steps=3, from_share=0.3), Requantize(), rule="hessian")
    set_up(OscillationControl(action="freeze", every_n_steps=3, from_share=0.3), Requantize(), rule="hessian", refit_every=1)
    # launch/ptq.py, which takes the options of a run, trains nothing.
    set_up(OscillationControl(action="freeze"), Requantize(), max_steps=0, rule="hessian")
