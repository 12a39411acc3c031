"""A Hugging Face causal LM with fp32 masters: from a folder, a hub name, or a config with random weights."""

import copy
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from nvfp4_train.load_errors import reading
from nvfp4_train.models.architecture import model_class, modules_outside, naming_packages, read_config
from nvfp4_train.models.originals import dequantizing, forget_quantization, take_quantization
from nvfp4_train.models.quirks import (
    compute_buffers_as_loaded,
    parameters_on_meta,
    several_documents_in_a_row,
    take_rows_for_single_sequences,
)
from nvfp4_train.models.served_dtype import class_of, served_dtypes
from nvfp4_train.models.weight_files import weight_files
from nvfp4_train.quant.served import SERVED_DTYPE

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from: exactly one of `path` and `config`."""

    path: str | None = None
    """A local folder or a hub name of a Hugging Face causal LM; it wins over `config`."""
    config: Mapping[str, Any] | None = None
    """Fields of a Hugging Face config, `model_type` among them: a model with random weights."""
    trust_remote_code: bool = False
    """Run the code that comes with the folder, if it has any. Read it first."""
    attn_implementation: str | None = None
    """Attention kernel, as transformers names it; None is the model's default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""
    compile: bool = False
    """torch.compile every decoder layer; one compilation serves all of them."""
    compute_dtype: str = "auto"
    """Dtype of products and activations: `bfloat16`, `float32`, or `auto`, which is float32 on a CPU without bf16 products.

    Weights have the same served values in both.
    """

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("auto", *COMPUTE_DTYPES):
            raise ValueError(f"model.compute_dtype must be auto, bfloat16 or float32, got {self.compute_dtype!r}")
        if self.path is None and self.config is None:
            raise ValueError("model.path or model.config is required, got neither")
        if self.path is None and "model_type" not in (self.config or {}):
            raise ValueError(f"model.config needs a model_type, got the keys {sorted(self.config or {})}")


def choose_compute_dtype(option: str, device: torch.device) -> tuple[torch.dtype, str]:
    """What `model.compute_dtype` says on a device, and why."""
    if option != "auto":
        return COMPUTE_DTYPES[option], "as model.compute_dtype says"
    if device.type != "cpu":
        return torch.bfloat16, f"the {device.type} device multiplies in bf16"
    if _cpu_multiplies_bf16():
        return torch.bfloat16, "this CPU multiplies in bf16"
    return torch.float32, "this CPU has no bf16 products; weights have the values that will be served all the same"


def _cpu_multiplies_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in fp32: with AVX512-BF16 or AMX, unless the environment turns them off."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    # Two environment variables limit PyTorch and oneDNN to an older instruction set.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit not in ("", "DEFAULT", "ALL") and not any(part in limit for part in ("BF16", "FP16", "AMX", "AVX10")):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX", "AVX10")):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The Hugging Face config of the model, without a trace of a quantization that is undone while loading.

    Raises ValueError where the path holds none, or a model that cannot be trained.
    """
    return read_original(config)[0]


def read_original(config: ModelConfig) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """What `load_config` returns, and the quantization config of the folder, if it has one. Raises as `load_config` does."""
    if config.path is None:
        fields = dict(config.config or {})
        model_type = fields.pop("model_type")
        try:
            hf_config = AutoConfig.for_model(model_type, **fields)
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"model.config: {error}") from error
        _refuse_misspelt(fields, AutoConfig.for_model(model_type))
        return model_class(hf_config)[1], None
    if looks_local(config.path) and not (Path(config.path) / "config.json").is_file():
        raise ValueError(f"model.path must be a folder with a config.json or a hub name, got {config.path!r}")
    hf_config = read_config(config.path, trust_remote_code=config.trust_remote_code)
    quantization = take_quantization(hf_config, config.path)
    try:
        return model_class(hf_config)[1], quantization
    except ValueError as error:
        raise ValueError(f"model.path={config.path!r}: {error}") from error


def load_model(config: ModelConfig, compute_dtype: torch.dtype = SERVED_DTYPE) -> PreTrainedModel:
    """The model in training mode with fp32 parameters, whole. Raises ValueError where the path does not hold exactly its tensors."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": config.attn_implementation}
    if config.path is None:
        # Each kind of device draws other numbers, and some of Lightning's strategies build a model on the GPU.
        with torch.device("cpu"):
            return _for_training(from_config(load_config(config), options), config, compute_dtype)
    return _for_training(_load_exactly(config, options), config, compute_dtype)


def load_frozen(config: ModelConfig) -> PreTrainedModel:
    """The model as it is served before any quantization, whole: in bf16 and in evaluation mode, without gradients."""
    options: dict[str, Any] = {"dtype": SERVED_DTYPE, "attn_implementation": config.attn_implementation}
    model = from_config(load_config(config), options) if config.path is None else _load_exactly(config, options)
    return model.requires_grad_(False).eval()


def from_config(hf_config: PretrainedConfig, options: Mapping[str, Any]) -> PreTrainedModel:
    """A model with random weights. Raises ValueError where it has no class, or needs a package that is not installed."""
    cls, hf_config = model_class(hf_config)
    with naming_packages(cls, options.get("attn_implementation")):
        return cls._from_config(hf_config, **options)


def hold_as_served(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Give every parameter the dtype that it is served in, in place; bf16 ones are held in the dtype of the computation."""
    dtypes = served_dtypes(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(compute_dtype if dtypes[name] is SERVED_DTYPE else dtypes[name])
    serve_buffers(model, compute_dtype)
    compute_in(model.config, compute_dtype)


def compute_in(config: PretrainedConfig, compute_dtype: torch.dtype) -> None:
    """Some classes take the dtype to compute in from their config."""
    config.dtype = compute_dtype
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            part.dtype = compute_dtype


def _load_exactly(config: ModelConfig, options: Mapping[str, Any]) -> PreTrainedModel:
    assert config.path is not None
    hf_config, quantization = read_original(config)
    # A scale of FP8 that is rounded to bf16 beforehand gives other weights.
    dtype, options = options["dtype"], options if quantization is None else {**options, "dtype": torch.float32}
    cls, _ = model_class(hf_config)
    # Errors of safetensors name no file.
    weight_files(config.path)
    packages = naming_packages(cls, options["attn_implementation"])
    with dequantizing(hf_config, quantization) as arguments, packages, reading(f"model.path={config.path!r}", config.path):
        # Tensors of another shape are refused with the others.
        loaded: Any = cls.from_pretrained(
            config.path, output_loading_info=True, ignore_mismatched_sizes=True, **arguments, **options
        )
    model, info = loaded
    of_other_shape = [f"{key} {tuple(found)} instead of {tuple(own)}" for key, found, own in info["mismatched_keys"]]
    refuse_other_tensors(config.path, info["missing_keys"], info["unexpected_keys"], of_other_shape)
    if quantization is not None:
        forget_quantization(model)
        for parameter in model.parameters():
            # 5.17 dequantizes MXFP4 to bf16 whatever it is asked for.
            parameter.data = parameter.data.to(torch.float32)
    if dtype is not options["dtype"]:
        dtypes = served_dtypes(model)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
    return model


def refuse_other_tensors(
    path: str, missing: Iterable[str], unexpected: Iterable[str], of_other_shape: Iterable[str] = ()
) -> None:
    """Raise ValueError if any tensor is listed: training would start from random weights, or lose some."""
    faults = {
        "misses": missing,
        "holds tensors that the model has not:": unexpected,
        "holds tensors of another shape than the config says:": of_other_shape,
    }
    for fault, names in faults.items():
        if ordered := sorted(names):
            more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
            raise ValueError(f"model.path={path!r} {fault} {', '.join(ordered[:3])}{more}")


def empty_model(config: ModelConfig, compute_dtype: torch.dtype = SERVED_DTYPE) -> PreTrainedModel:
    """The model of `model.path` in training mode with fp32 parameters on the meta device, and its buffers on the CPU."""
    assert config.path is not None
    hf_config = load_config(config)
    with parameters_on_meta():
        model = from_config(hf_config, {"dtype": torch.float32, "attn_implementation": config.attn_implementation})
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(config.path)
        except OSError:
            # Without such a file from_pretrained makes a generation config from the model's config.
            model.generation_config = GenerationConfig.from_pretrained(
                config.path, config_file_name="config.json", _from_model_config=True
            )
    return _for_training(model, config, compute_dtype)


def plain_class(model: PreTrainedModel, dtype: torch.dtype = SERVED_DTYPE) -> PreTrainedModel:
    """The transformers class as a reader builds it: in evaluation mode, its parameters on the meta device, its buffers on the CPU."""
    config = copy.deepcopy(model.config)
    parts = {name: getattr(model.config, name, None) for name in config.sub_configs} | {"": model.config}
    # A text model may compute attention in another way than the tower beside it.
    by_part = {name: part._attn_implementation for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    attention: Any = by_part if len(by_part) > 1 else by_part[""]
    with parameters_on_meta():
        plain = class_of(model)._from_config(config, dtype=dtype, attn_implementation=attention)
    compute_buffers_as_loaded(plain)
    return plain.eval()


def compute_logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of token ids [B, T].

    Each row is one sequence without padding, or, with position_ids, int64 [B, T] that start at 0 with each document, several documents
    that do not see each other: `models.isolation` checks whether a model keeps them apart.
    """
    return call_on_tokens(model, input_ids, position_ids).logits


def call_on_tokens(model: nn.Module, input_ids: Tensor, position_ids: Tensor | None) -> Any:
    """The output of a transformers model, or of its body, as `compute_logits` calls it."""
    if position_ids is None:
        return model(input_ids=input_ids, use_cache=False)
    with several_documents_in_a_row():
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a language model: the modules that transformers never splits over devices, or subclasses that FSDP2 made.

    Those of towers are not among them.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    towers = modules_outside(model) if isinstance(model, PreTrainedModel) else []
    outside = {module for tower in towers for module in tower.modules()}
    return [
        module
        for module in model.modules()
        if module not in outside and names.intersection(cls.__name__ for cls in type(module).__mro__)
    ]


def _for_training(model: PreTrainedModel, config: ModelConfig, compute_dtype: torch.dtype) -> PreTrainedModel:
    take_rows_for_single_sequences()
    serve_buffers(model, compute_dtype)
    compute_in(model.config, compute_dtype)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # from_pretrained returns a model in evaluation mode.
    return model.train()


def serve_buffers(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Give every buffer the value and the dtype that it is served with; bf16 ones are held in the dtype of the computation."""
    dtypes, saved = served_dtypes(model), model.state_dict().keys()
    computed = dict(plain_class(model).named_buffers())
    for name, buffer in model.named_buffers():
        # Every reader computes unsaved buffers anew, in its own dtype.
        value = (buffer if name in saved else computed[name]).to(dtypes[name])
        owner = model.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = value.to(compute_dtype if value.dtype is SERVED_DTYPE else value.dtype)


def _refuse_misspelt(fields: Mapping[str, Any], default: PretrainedConfig) -> None:
    """Raise ValueError for a field that is nearly a known one: transformers keeps it as an attribute that changes nothing."""
    known = {*default.to_dict(), *default.attribute_map, *(getattr(default, "rope_parameters", None) or {}), "rope_scaling"}
    known |= {name for cls in type(default).__mro__ for name in getattr(cls, "__annotations__", {})}
    for name in fields:
        if name not in known and (close := get_close_matches(name, known, n=1, cutoff=0.85)):
            raise ValueError(f"model.config: a {default.model_type} config has no field {name}; did you mean {close[0]}?")


def looks_local(path: str) -> bool:
    """Whether a model is a path, there or not, and no hub name."""
    return Path(path).exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1
