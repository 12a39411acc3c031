"""What an export needs from a training checkpoint, read without the training framework."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from nvfp4_train.checkpoints import UNREADABLE, SavedTensors, find_damage, is_sharded_checkpoint, read_checkpoint, read_rest
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.models.architecture import config_of
from nvfp4_train.models.not_built import NotBuilt
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
    """Folder of the tokenizer beside the checkpoint, if there is one. It has the other files of the original, too."""
    path: str | None
    """Where the model came from, if that is known: a folder or hub name."""
    not_built: NotBuilt | None
    """What the original holds beside the model."""


def load_checkpoint(path: Path, *, trust_remote_code: bool = False) -> ExportableCheckpoint:
    """Read a checkpoint file or the folder of a sharded checkpoint, whose weights stay on disk until they are used.

    With `trust_remote_code` the code that came with the model may run; it is read beside the tokenizer.

    All of it is read once, and compared with its checksums. Raises ValueError where the checkpoint is damaged, or cannot be exported.
    So do the weights of a folder, later, where they cannot be read.
    """
    if not path.is_file() and not is_sharded_checkpoint(path):
        raise ValueError(f"checkpoint must be a file, or the folder of a sharded checkpoint, got {path}")
    if damage := find_damage(path):
        raise ValueError(f"{path} {damage}")
    try:
        checkpoint = read_rest(path) if is_sharded_checkpoint(path) else read_checkpoint(path)
    except (OSError, *UNREADABLE) as error:
        raise ValueError(f"{path} is no checkpoint that torch.load reads with weights_only=True: {error}") from error
    try:
        saved = checkpoint["hyper_parameters"]["export"]
        settings, generation = saved["config"], saved["generation_config"]
        manifest = _manifest(saved)
        settings["model_type"]  # noqa: B018 (raises)
        # An older checkpoint does not say.
        not_built = NotBuilt.from_dict(saved["not_built"]) if saved.get("not_built") else None
        weights, quant_state = (_tensors(path, checkpoint, prefix) for prefix in (STATE_PREFIX, QUANT_STATE_PREFIX))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold a state_dict and hyper_parameters['export'] with config, generation_config and manifest, as "
            f"training with a quantized model saves them; wrong or missing: {error}"
        ) from error
    tokenizer = path.parent / "tokenizer"
    try:
        config = config_of(settings, tokenizer, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return ExportableCheckpoint(
        weights=weights,
        quant_state=quant_state,
        manifest=manifest,
        config=config,
        generation_config=None if generation is None else GenerationConfig.from_dict(generation),
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        path=saved.get("path"),
        not_built=not_built,
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
