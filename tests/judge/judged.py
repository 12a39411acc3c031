"""Small models that are quantized in part, and text for them."""

import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from nvfp4_train.judge.sensitivity import Comparison
from nvfp4_train.judge.units import Unit, smallest_units
from nvfp4_train.models.build import Trainable, make_trainable
from nvfp4_train.models.prepare import prepare
from nvfp4_train.quant.policy import CalibrationConfig, QuantConfig
from nvfp4_train.quant.store import ReplicatedWeightStore

PLAIN = QuantConfig(equalize=None, calibration=CalibrationConfig(sequences=0))
W4A4 = QuantConfig(equalize=None, activations="nvfp4")


def tokens(num_batches: int = 2, rows: int = 2, length: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 64, (rows, length), generator=generator)} for _ in range(num_batches)]


def lively_model(family: str, **fields: object) -> nn.Module:
    """A model whose layers matter: at their initial size they would hardly change its logits."""
    model = tiny_model(family, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    return model.eval()


def quantized(model: nn.Module, config: QuantConfig = PLAIN) -> tuple[Trainable, list[Unit], Comparison]:
    """The model is quantized in place."""
    made = make_trainable(model, config, compute_dtype=torch.float32)
    if config.calibration.sequences:
        sequences = [({"input_ids": batch["input_ids"][:1]}, True) for batch in tokens(16)]
        prepare(model, made.store, config, sequences)  # type: ignore[arg-type]
    made.store.update()
    assert isinstance(made.store, ReplicatedWeightStore)
    return made, smallest_units(model, made.selection.manifest), Comparison(model, made.store, made.inputs)  # type: ignore[arg-type]
