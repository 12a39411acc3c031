"""From what there is to judge to what computes: the plain transformers class, whose parameters hold the values that are served.

So all kinds of models compute by the same code, and differ in their weights, and in W4A4 in the codes of inputs, alone.
"""

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from nvfp4_train.export.checkpoint import load_checkpoint
from nvfp4_train.export.in_memory import input_scales, tensors_in_memory
from nvfp4_train.export.masters import FromMasters
from nvfp4_train.export.packed_folder import PackedFolder, format_of
from nvfp4_train.export.replicated import FromStore
from nvfp4_train.export.served import ServedWeights
from nvfp4_train.export.verify import verify_export
from nvfp4_train.judge.subjects import BF16, CHECKPOINT, EXPORT, Subject
from nvfp4_train.kernels.fp4_kernel import is_input_scale
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.models.build import build_model
from nvfp4_train.models.causal_lm import ModelConfig, from_config, hold_as_served, load_frozen
from nvfp4_train.models.prepare import prepare
from nvfp4_train.models.quirks import parameters_on_meta, take_rows_for_single_sequences
from nvfp4_train.progress import progress_bar
from nvfp4_train.quant.calibration import Batch
from nvfp4_train.quant.expert_inputs import open_inputs
from nvfp4_train.quant.inputs import InputQuantizers
from nvfp4_train.quant.linear import quantize_inputs
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import SERVINGS, QuantConfig
from nvfp4_train.quant.served import SERVED_DTYPE

UNQUANTIZED = "bf16"
"""The only serving of a model that is not quantized."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how models compute."""

    device: torch.device
    compute_dtype: torch.dtype
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    is_shown: bool = True
    """Whether this rank shows progress."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that computes, in evaluation mode, on the device."""

    model: PreTrainedModel
    servings: tuple[str, ...]
    """As what it can be measured: `UNQUANTIZED`, or of `SERVINGS`."""
    inputs: InputQuantizers | None = None
    notes: Sequence[str] = ()
    """Lines for the user."""

    @contextmanager
    def serving(self, name: str) -> Iterator[None]:
        """Compute inside the context as one of `servings`."""
        if self.inputs is None:
            yield
            return
        with self.inputs.serving(name):
            yield


def load(
    subject: Subject, place: Place, *, quant: QuantConfig, calibration: Callable[[int], list[tuple[Batch, bool]]]
) -> Loaded:
    """Make a model of what was found. `quant` and `calibration`, which gives sequences as `models.prepare` takes them, are for one that
    is quantized on the fly. Raises ValueError where it cannot be read, or quantized. Where there is a process group, a collective.
    """
    # As the models do that train.
    take_rows_for_single_sequences()
    with torch.no_grad():
        if subject.kind == BF16:
            model = load_frozen(_model_config(subject, place))
            hold_as_served(model, place.compute_dtype)
            return Loaded(model=model.to(place.device), servings=(UNQUANTIZED,))  # type: ignore[arg-type]
        if subject.kind == EXPORT:
            found = _load_export(Path(subject.path), place)
        elif subject.kind == CHECKPOINT:
            found = _load_checkpoint(Path(subject.path), place)
        else:
            found = _quantize(subject, place, quant, calibration)
            # The masters leave the device before the served values come to it.
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        return _on_device(found, place)


class _Quantized(NamedTuple):
    """A quantized model, still on the CPU."""

    model: PreTrainedModel
    input_scales: Mapping[str, Tensor]
    """1 / g by name of the quantized weights; empty where its inputs cannot be quantized."""
    without: str
    """Why they cannot, if so."""


def _model_config(subject: Subject, place: Place) -> ModelConfig:
    return ModelConfig(
        path=subject.path, attn_implementation=place.attn_implementation, trust_remote_code=place.trust_remote_code
    )


def _load_export(path: Path, place: Place) -> _Quantized:
    format = format_of(path)
    verify_export(path, format=format)
    folder = PackedFolder(path, format)
    model = served_model(folder.layout.served_config, tensors_in_memory(folder), place)
    return _Quantized(model, input_scales(folder), "the folder has no input scales, as an export for W4A16 has none")


def _load_checkpoint(path: Path, place: Place) -> _Quantized:
    found = load_checkpoint(path, trust_remote_code=place.trust_remote_code)
    served = FromMasters(found.weights, found.manifest, found.config, found.quant_state)
    return _of_served(served, found.config, found.quant_state, place, "the checkpoint's run had not been calibrated")


def _quantize(
    subject: Subject, place: Place, quant: QuantConfig, calibration: Callable[[int], list[tuple[Batch, bool]]]
) -> _Quantized:
    """As launch/ptq.py does it."""
    built = build_model(_model_config(subject, place), quant, place.device, compute_dtype=place.compute_dtype)
    model = built.model.to(place.device).eval()  # type: ignore[arg-type]
    if num_sequences := quant.calibration.sequences:
        bar = progress_bar(f"{subject.label}: calibration", is_shown=place.is_shown)
        prepare(model, built.store, quant, calibration(num_sequences), progress=bar)
    if quant.needs_input_scales:
        built.inputs.check_calibrated()
    built.store.update(refit=True)
    built.store.check_finite()
    served, state = FromStore(model, built.store), built.store.state.state_dict()
    return _of_served(served, model.config, state, place, "quant.calibration.sequences=0 calibrates nothing")


def _of_served(
    served: ServedWeights, config: PretrainedConfig, state: Mapping[str, Tensor], place: Place, without: str
) -> _Quantized:
    manifest, experts = served.manifest, served.layout.experts

    def in_class() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in served.items():
            # Experts with inputs first are held with outputs first.
            is_transposed = served.is_quantized(name) and name in experts and experts[name].is_transposed
            yield name, (tensor.mT if is_transposed else tensor).cpu().contiguous()

    scales: dict[str, Tensor] = {}
    for group in manifest.groups:
        scale = state[key].cpu() if (key := f"{group[0]}.input_scale") in state else torch.zeros(1)
        scales |= dict.fromkeys(group, scale)
    is_calibrated = all(is_input_scale(scale.item()) for scale in scales.values())
    return _Quantized(served_model(config, in_class(), place), scales if is_calibrated else {}, without)


def _on_device(found: _Quantized, place: Place) -> Loaded:
    """The model where it computes, with inputs that are quantized when it is told to."""
    model: PreTrainedModel = found.model.to(place.device)  # type: ignore[arg-type]
    if not found.input_scales:
        return Loaded(model=model, servings=("w4a16",), notes=[f"measured as W4A16 alone: {found.without}"])
    live = {name: scale.to(place.device) for name, scale in found.input_scales.items()}
    open_inputs(model, live)
    # Each weight quantizes its own input. Siblings that share one get the same codes.
    manifest = QuantManifest(groups=tuple((name,) for name in live), rule=ScaleRule())
    inputs = quantize_inputs(model, manifest, live.__getitem__)
    return Loaded(model=model, servings=tuple(SERVINGS), inputs=inputs)


def served_model(config: PretrainedConfig, tensors: Iterable[tuple[str, Tensor]], place: Place) -> PreTrainedModel:
    """The plain class with these tensors, by `state_dict` name and without tied copies, on the CPU.

    Raises ValueError where one is missing.
    """
    options = {"dtype": SERVED_DTYPE, "attn_implementation": place.attn_implementation}
    with parameters_on_meta():
        model = from_config(copy.deepcopy(config), options)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    """Of every tensor, where it stands: tied ones in several places."""
    of_name: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for kind in (module._parameters, module._buffers):
            for leaf, tensor in kind.items():
                if tensor is not None:
                    places = holders.setdefault(id(tensor), [])
                    places.append((module, leaf))
                    of_name[f"{prefix}.{leaf}".removeprefix(".")] = places
    for name, tensor in tensors:
        parameter = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
        for module, leaf in of_name[name]:
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                module._parameters[leaf] = parameter  # type: ignore[assignment]
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"weights must hold every parameter of {type(model).__name__}, missing: {', '.join(missing[:3])}")
    hold_as_served(model, place.compute_dtype)
    return model.requires_grad_(False).eval()
