"""What an export needs from a training checkpoint, read without the training framework."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig

from nvfp4_train.checkpoints import UNREADABLE, SavedTensors, is_sharded_checkpoint, read_checkpoint, read_rest
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.quant.manifest import QuantManifest

STATE_PREFIX = "model."
QUANT_STATE_PREFIX = "quant_state."


@dataclass(frozen=True, kw_only=True)
class ExportableCheckpoint:
    """Master weights and what belongs to them."""

    weights: Mapping[str, Tensor]
    quant_state: Mapping[str, Tensor]
    """`state_dict` of the store's `QuantState`."""
    manifest: QuantManifest
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    tokenizer: Path | None
    """Folder of the tokenizer beside the checkpoint, if there is one."""


def load_checkpoint(path: Path) -> ExportableCheckpoint:
    """Read a checkpoint file or the folder of a sharded checkpoint, whose weights stay on disk until they are used.

    Raises ValueError where the checkpoint cannot be exported. So do the weights of a folder, later, where they cannot be read.
    """
    if not path.is_file() and not is_sharded_checkpoint(path):
        raise ValueError(f"checkpoint must be a file, or the folder of a sharded checkpoint, got {path}")
    try:
        checkpoint = read_rest(path) if is_sharded_checkpoint(path) else read_checkpoint(path)
    except (OSError, *UNREADABLE) as error:
        raise ValueError(f"{path} is no checkpoint that torch.load reads with weights_only=True: {error}") from error
    try:
        saved = checkpoint["hyper_parameters"]["export"]
        settings, generation = saved["config"], saved["generation_config"]
        model_type, manifest = settings["model_type"], _manifest(saved)
        weights, quant_state = (_tensors(path, checkpoint, prefix) for prefix in (STATE_PREFIX, QUANT_STATE_PREFIX))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold a state_dict and hyper_parameters['export'] with config, generation_config and manifest, as "
            f"training with a quantized model saves them; wrong or missing: {error}"
        ) from error
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"this version of transformers knows no model_type {model_type!r}, which {path} was trained with")
    tokenizer = path.parent / "tokenizer"
    return ExportableCheckpoint(
        weights=weights,
        quant_state=quant_state,
        manifest=manifest,
        config=CONFIG_MAPPING[model_type].from_dict(settings),
        generation_config=None if generation is None else GenerationConfig.from_dict(generation),
        tokenizer=tokenizer if tokenizer.is_dir() else None,
    )


def _manifest(saved: Mapping[str, Any]) -> QuantManifest:
    if "manifest" in saved:
        return QuantManifest.from_dict(saved["manifest"])
    # An older checkpoint holds module names, and knows one rule for block scales.
    groups = tuple(tuple(f"{module}.weight" for module in group) for group in saved["groups"])
    return QuantManifest(groups=groups, rule=ScaleRule(global_scale=saved["global_scale"]))


def _tensors(path: Path, checkpoint: Mapping[str, Any], prefix: str) -> Mapping[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    if is_sharded_checkpoint(path):
        return SavedTensors(path, f"state_dict.{prefix}")
    state = checkpoint["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
