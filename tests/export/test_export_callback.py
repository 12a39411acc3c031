"""A run exports what its forward computed, also of models with tensors that no folder can hold in NVFP4, or that stay in fp32."""

from pathlib import Path

import lightning as L
import pytest
import torch
from export_models import CASES, SMALL
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from nvfp4_train.callbacks.export import Export
from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.export.convert import convert_folder
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig
from nvfp4_train.quant.policy import CalibrationConfig, QuantConfig


class Tokens(L.LightningDataModule):
    tokenizer = None

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader([{"input_ids": torch.randint(67, (2, 12), generator=generator)} for _ in range(3)], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


@pytest.mark.parametrize(
    ("name", "compute_dtype"),
    [
        ("llama_tied", "float32"),
        ("sarvam_moe", "bfloat16"),
        ("hrm_text", "bfloat16"),
        ("deepseek_v3", "bfloat16"),
        ("deepseek_v3", "float32"),
        ("hunyuan_v1_moe", "bfloat16"),
        ("granitemoeshared", "bfloat16"),
        ("gpt_oss", "bfloat16"),
        ("llama4", "bfloat16"),
        ("nemotron_h", "bfloat16"),
    ],
)
def test_a_run_exports_the_model_that_it_trained(name: str, compute_dtype: str, tmp_path: Path) -> None:
    model_type, fields = CASES[name]
    config = {"model_type": model_type} | SMALL | fields | ({"H_cycles": 1, "L_cycles": 1} if name == "hrm_text" else {})
    torch.manual_seed(0)
    # The data is too little to calibrate with.
    quant = QuantConfig(calibration=CalibrationConfig(sequences=0), equalize=None)
    module = QATModule(model=ModelConfig(config=config, compute_dtype=compute_dtype), quant=quant, optim=OptimConfig(lr=1e-2))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[Requantize(), Export(folder=str(tmp_path / "export"))],
    )
    trainer.fit(module, Tokens())
    convert_folder(tmp_path / "export", tmp_path / "plain", to="bf16")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert module.model is not None
    assert module.store is not None
    weights = module.model.state_dict()
    for key, tensor in loaded.state_dict().items():
        expected = module.store.compute_weight(key) if key in module.store.manifest.names else weights[key]
        expected = expected if expected.shape == tensor.shape else expected.mT
        assert torch.equal(tensor, expected.to(tensor.dtype)), key
    if compute_dtype == "bfloat16":
        input_ids = torch.arange(24).view(2, 12)
        with torch.no_grad():
            assert torch.equal(module.eval()(input_ids), loaded.eval()(input_ids).logits)
