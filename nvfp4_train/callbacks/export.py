"""Writes the NVFP4 checkpoint when training has ended and its last checkpoint is saved."""

from pathlib import Path

import torch
from lightning import Callback, Trainer

from nvfp4_train.export.compressed_tensors import export_compressed_tensors
from nvfp4_train.module import QATModule
from nvfp4_train.quant.linear import SERVED_DTYPE


class Export(Callback):
    """Exports to `folder`, and proves that the folder decodes to the weights that the last forward used."""

    def __init__(self, *, folder: str, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> None:
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.max_shard_bytes = max_shard_bytes

    def setup(self, trainer: Trainer, pl_module: QATModule, stage: str) -> None:  # type: ignore[override]
        if stage == "fit" and self.folder.exists() and not self.overwrite:
            raise ValueError(
                f"callbacks.export.folder must not exist yet, got {self.folder}; choose another run_dir, or set "
                "callbacks.export.overwrite=true"
            )

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        model, store = pl_module.model, pl_module.store
        assert model is not None and store is not None
        if trainer.is_global_zero:
            weights = model.state_dict()
            expected = {name: tensor.to(SERVED_DTYPE) for name, tensor in weights.items() if tensor.is_floating_point()}
            expected |= {
                f"{name}.weight": linear.compute_weight for name, linear in store.modules() if linear.compute_weight is not None
            }
            report = export_compressed_tensors(
                self.folder,
                weights=weights,
                groups=store.groups,
                config=model.config,
                tokenizer=trainer.datamodule.tokenizer,  # type: ignore[attr-defined]
                generation_config=model.generation_config,
                power_of_two=store.power_of_two,
                max_shard_bytes=self.max_shard_bytes,
                overwrite=self.overwrite,
                expected=expected,
            )
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            pl_module.report(
                {
                    "export/bytes": report.verified.bytes,
                    "export/bits_per_weight": 8 * report.verified.bytes / num_parameters,
                    "export/bits_per_quantized_weight": report.verified.bits_per_weight,
                }
            )
        trainer.strategy.barrier("export")
