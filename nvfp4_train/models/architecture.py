"""Which transformers class a config stands for, and which of its parameters belong to the language model.

The class is the folder's own: the first of `architectures`, so that a multimodal folder stays one. A config without `architectures`,
as `model.config` makes it, is that of transformers' class for causal LMs, or for images and text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from nvfp4_train.errors import one_line
from nvfp4_train.load_errors import reading
from nvfp4_train.models.quirks import give_text_outputs_images

OUTSIDE = "not part of the language model"
"""Why a linear of a tower or a projector stays in bf16."""

MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)

_remote_classes: dict[str, type[PreTrainedModel]] = {}
"""Classes by name whose code, from a model folder, this process was allowed to run."""


def read_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a folder or hub name, and with `trust_remote_code` its class from the folder's own code.

    Raises ValueError where there is none, or it cannot be read, or the folder has code of its own that is not trusted or fails.
    """
    where = f"model.path={path!r}"
    with reading(where, path):
        settings, _ = PretrainedConfig.get_config_dict(path)
    if "auto_map" in settings and trust_remote_code:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=True)
            if reference := _code_reference(config):
                config.architectures = [_trust(reference, path)]
        except Exception as error:
            # The code may raise anything.
            raise ValueError(f"the code of {where} does not load: {type(error).__name__}: {one_line(error)}") from error
        return config
    try:
        with reading(where, path):
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{where} has code of its own, which would run here; read it, then set model.trust_remote_code=true"
        ) from error


def read_exported_config(folder: Path) -> PretrainedConfig:
    """The config of a folder that was written here; its own code is trusted if this process was allowed to run the original's.

    Raises OSError or ValueError where there is none.
    """
    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or [None]
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=architectures[0] in _remote_classes)


def config_of(settings: Mapping[str, Any], folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model that was trained, from its `to_dict`; its own code, if it has any, is read from `folder`.

    Raises ValueError where the class is not known here, or its code is not trusted.
    """
    architecture = next(iter(settings.get("architectures") or ()), "")
    code = settings.get("auto_map") or {}
    is_own_code = any(name.rpartition(".")[2] == architecture for name in code.values())
    if is_own_code and not trust_remote_code:
        raise ValueError(
            f"{architecture} is from the model's own code, which would run here; read it, then say --trust-remote-code"
        )
    model_type = settings["model_type"]
    # Its `get` knows only classes that have been used.
    config_class: Any = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    if is_own_code:
        local = {name: reference.rpartition("--")[2] for name, reference in code.items()}
        if "AutoConfig" in local:
            config_class = get_class_from_dynamic_module(local["AutoConfig"], folder)
        _trust(next(name for name in local.values() if name.rpartition(".")[2] == architecture), folder)
    if config_class is None:
        raise ValueError(f"this version of transformers knows no model_type {model_type!r}")
    return config_class.from_dict(dict(settings))


def _trust(reference: str, path: str | Path) -> str:
    """Make a class of a folder's own code known. Returns its name."""
    cls: Any = get_class_from_dynamic_module(reference, path)
    _remote_classes[cls.__name__] = cls
    return cls.__name__


def has_own_code(config: PretrainedConfig) -> bool:
    """Whether the model's class is from the folder's own code."""
    return _named_class(config) in _remote_classes.values()


def _code_reference(config: PretrainedConfig) -> str | None:
    auto_map = getattr(config, "auto_map", None) or {}
    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    return next((auto_map[name] for name in names if name in auto_map), None)


def model_class(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class of a model with this config, and the config that its constructor takes.

    Raises ValueError where there is none, or the class is no language model that reads tokens from left to right.
    """
    cls: Any = _named_class(config)
    if cls is None:
        cls = next((mapping[type(config)] for mapping in MAPPINGS if type(config) in mapping), None)
    if cls is None:
        named = ", ".join(getattr(config, "architectures", None) or []) or "no class"
        raise ValueError(
            f"transformers {transformers.__version__} has no language model for model_type {config.model_type!r} (its config names "
            f"{named}); a newer transformers may, or the folder's own code with model.trust_remote_code=true"
        )
    if reason := _no_language_model(cls, config):
        raise ValueError(f"the model must be a causal language model, got {cls.__name__}: {reason}")
    if config.model_type == "llama4":
        give_text_outputs_images()
    # A text model may be built of the config of a multimodal one.
    is_text_alone = cls.config_class is not None and cls.config_class is config.sub_configs.get("text_config")
    return cls, config.get_text_config() if is_text_alone else config


def _named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the config names, where it is known here."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    found = _remote_classes.get(name) or getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _no_language_model(cls: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    is_decoder_alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] is cls
    if getattr(config, "is_encoder_decoder", False) and not is_decoder_alone:
        return "it has an encoder, whose input is not the text that the decoder continues"
    is_remote = cls in _remote_classes.values()
    if not is_remote and not (cls.can_generate() and "input_ids" in signature(cls.forward).parameters):
        return "it gives no logits of a next token"
    return None


def name_class(model: nn.Module) -> None:
    """Let the config of a model of transformers name its class, where it names none: one config may stand for several classes."""
    if isinstance(model, PreTrainedModel) and not model.config.architectures and hasattr(transformers, type(model).__name__):
        model.config.architectures = [type(model).__name__]


@contextmanager
def naming_packages(cls: type[PreTrainedModel], attention: str | None = None) -> Iterator[None]:
    """Raise ValueError where a part of a model (a tower of timm, say) needs a package that is not installed.

    `attention` is the kernel that the user asked for, which may be no part of this transformers, or of a package that is missing.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        said = one_line(error.__cause__ or error)
        if attention is not None and ("attention" in said.lower() or "attn" in said):
            raise ValueError(f"model.attn_implementation={attention!r} cannot be used: {said}") from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{cls.__name__} needs a package that is not installed: {one_line(error)}") from error


def parameters_outside(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that are not the language model's: those of towers and projectors.

    Where the config has a text config, the language model is the decoder, the embedding of tokens and the output embedding. Otherwise
    it is all but the towers, each with what lies around it.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.get_text_config() is model.config:
        return {f"{prefix}.{name}" for prefix, tower in _towers(model, ends) for name, _ in tower.named_parameters()}
    parts: list[Any] = [model.get_decoder(), *ends]
    inside = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in inside}


def _towers(model: PreTrainedModel, ends: Sequence[nn.Module | None]) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules around models of another part of the config, that hold neither embedding."""
    parts = [getattr(model.config, name, None) for name in model.config.sub_configs]
    types = tuple(type(part) for part in parts if isinstance(part, PretrainedConfig))
    for name, module in model.named_modules() if types else ():
        if isinstance(module, PreTrainedModel) and module is not model and isinstance(module.config, types):
            pieces = name.split(".")
            for length in range(1, len(pieces) + 1):
                around = model.get_submodule(".".join(pieces[:length]))
                if not set(around.modules()) & set(ends):
                    yield ".".join(pieces[:length]), around
                    break


def modules_outside(model: PreTrainedModel) -> list[nn.Module]:
    """The largest modules that hold only such parameters, and have a forward."""
    outside = parameters_outside(model)

    def find(prefix: str, module: nn.Module) -> Iterator[nn.Module]:
        names = [prefix + name for name, _ in module.named_parameters(remove_duplicate=False)]
        if names and outside.issuperset(names) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield module
        elif not outside.isdisjoint(names):
            for name, child in module.named_children():
                yield from find(f"{prefix}{name}.", child)

    return list(dict.fromkeys(find("", model))) if outside else []


def freeze_outside(model: PreTrainedModel) -> None:
    """Stop the training of all that is outside of the language model: text gives it no input."""
    outside = parameters_outside(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in outside:
            parameter.requires_grad_(False)


def positions(config: PretrainedConfig) -> int | None:
    """How many positions the language model has; None where the config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


_OF_THIS_PROCESS = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "name_or_path",
    "use_cache",
    "attn_implementation",
)


def check_same_config(source: str | Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ValueError, which names the field, where the config of a checkpoint and that of the model that continues from it differ.

    Fields that one transformers has and another has not are passed over.
    """
    there, here = (json.loads(json.dumps(config, default=str)) for config in (saved, ours))
    for name in _different_fields(there, here):
        *parts, field = name.split(".")
        for part in parts:
            there, here = there[part], here[part]
        raise ValueError(
            f"the checkpoint {source} was saved with another model: {name} of its config is {there[field]} there and "
            f"{here[field]} here; set model.* as in the run that saved it"
        )


def _different_fields(there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name in there.keys() & here.keys():
        if name.startswith("_") or name in _OF_THIS_PROCESS:
            continue
        if isinstance(there[name], Mapping) and isinstance(here[name], Mapping):
            yield from _different_fields(there[name], here[name], f"{within}{name}.")
        elif there[name] != here[name]:
            yield within + name
