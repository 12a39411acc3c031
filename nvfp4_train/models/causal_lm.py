"""A Hugging Face causal LM with fp32 masters: from a folder, a hub name, or a config with random weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from: exactly one of `path` and `config`."""

    path: str | None = None
    """A local folder or a hub name of a Hugging Face causal LM; it wins over `config`."""
    config: Mapping[str, Any] | None = None
    """Fields of a Hugging Face config, `model_type` among them: a model with random weights."""
    attn_implementation: str | None = None
    """Attention kernel, as transformers names it; None is the model's default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""
    compile: bool = False
    """torch.compile every decoder layer; one compilation serves all of them."""

    def __post_init__(self) -> None:
        if self.path is None and self.config is None:
            raise ValueError("model.path or model.config is required, got neither")
        if self.path is None and "model_type" not in (self.config or {}):
            raise ValueError(f"model.config needs a model_type, got the keys {sorted(self.config or {})}")


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The Hugging Face config of the model. Raises ValueError where the path holds none, or an already quantized model."""
    if config.path is None:
        fields = dict(config.config or {})
        model_type = fields.pop("model_type")
        try:
            hf_config = AutoConfig.for_model(model_type, **fields)
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"model.config: {error}") from error
        _refuse_misspelt(fields, AutoConfig.for_model(model_type))
        return hf_config
    if _looks_local(config.path) and not (Path(config.path) / "config.json").is_file():
        raise ValueError(f"model.path must be a folder with a config.json or a hub name, got {config.path!r}")
    try:
        hf_config = AutoConfig.from_pretrained(config.path)
    except OSError as error:
        raise ValueError(
            f"model.path={config.path!r} could not be read as a local folder or reached as a hub name: {error}"
        ) from error
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ValueError(f"model.path={config.path!r} is already quantized; training starts from the bf16 model")
    return hf_config


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model in training mode with fp32 parameters, whole. Raises ValueError where the path does not hold exactly its tensors."""
    hf_config = load_config(config)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": config.attn_implementation}
    if config.path is None:
        # Each kind of device draws other numbers, and some of Lightning's strategies build a model on the GPU.
        with torch.device("cpu"):
            return _for_training(AutoModelForCausalLM.from_config(hf_config, **options), config)
    # Tensors of another shape are refused below, with the others.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        config.path, config=hf_config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, info = loaded
    refuse_other_tensors(config.path, info["missing_keys"], info["unexpected_keys"], map(str, info["mismatched_keys"]))
    return _for_training(model, config)


def refuse_other_tensors(
    path: str, missing: Iterable[str], unexpected: Iterable[str], of_other_shape: Iterable[str] = ()
) -> None:
    """Raise ValueError if there are any: training would start from random weights, or lose some."""
    faults = {
        "misses": missing,
        "holds tensors that the model has not:": unexpected,
        "holds tensors of another shape than the config says:": of_other_shape,
    }
    for fault, names in faults.items():
        if ordered := sorted(names):
            more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
            raise ValueError(f"model.path={path!r} {fault} {', '.join(ordered[:3])}{more}")


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The model of `model.path` in training mode with fp32 parameters on the meta device, and its buffers on the CPU."""
    assert config.path is not None
    hf_config = load_config(config)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=config.attn_implementation)
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(config.path)
        except OSError:
            # Without such a file from_pretrained makes one of the model's config.
            model.generation_config = GenerationConfig.from_pretrained(
                config.path, config_file_name="config.json", _from_model_config=True
            )
    return _for_training(model, config)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters made in the context take no memory, buffers are computed on the CPU: whatever a class keeps in them is right."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is on the meta device already is tied to another.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        # Its memory is given back before anything is written to it: random initial values are drawn after the registration.
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def compute_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of token ids [B, T], each row of which is one sequence, without padding."""
    with _unpacked_rows():
        return model(input_ids=input_ids, use_cache=False).logits


@contextmanager
def _unpacked_rows() -> Iterator[None]:
    """Spare transformers its search for several sequences in a row: in every forward the host would wait for its answer."""
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model: the modules that transformers never splits over devices."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def _for_training(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # from_pretrained returns a model in evaluation mode.
    return model.train()


def _refuse_misspelt(fields: Mapping[str, Any], default: PretrainedConfig) -> None:
    """Transformers keeps an unknown field as an attribute that changes nothing, so one that is nearly known is a slip."""
    known = {*default.to_dict(), *default.attribute_map, *(getattr(default, "rope_parameters", None) or {}), "rope_scaling"}
    known |= {name for cls in type(default).__mro__ for name in getattr(cls, "__annotations__", {})}
    for name in fields:
        if name not in known and (close := get_close_matches(name, known, n=1, cutoff=0.85)):
            raise ValueError(f"model.config: a {default.model_type} config has no field {name}; did you mean {close[0]}?")


def _looks_local(path: str) -> bool:
    return Path(path).exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1
