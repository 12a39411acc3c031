"""Makes a model train with its served weights: selects what is quantized, lets modules show it, and makes the store."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nvfp4_train.models.architecture import freeze_outside, model_class, name_class
from nvfp4_train.models.causal_lm import (
    COMPUTE_DTYPES,
    ModelConfig,
    decoder_layers,
    hold_as_served,
    load_frozen,
    load_model,
    read_original,
    serve_buffers,
)
from nvfp4_train.models.folder import open_folder
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.not_built import NotBuilt, find_not_built
from nvfp4_train.models.originals import note
from nvfp4_train.models.prepare import prepare
from nvfp4_train.models.served_dtype import class_of, served_dtypes
from nvfp4_train.models.sharding import allocate, fsdp_units, gathered_as_served, local_rows, shard_frozen, shard_model
from nvfp4_train.quant.calibration import check_num_tokens
from nvfp4_train.quant.expert_inputs import open_inputs
from nvfp4_train.quant.experts import held_rows_first, hold_rows_first
from nvfp4_train.quant.inputs import InputQuantizers
from nvfp4_train.quant.linear import quantize_inputs
from nvfp4_train.quant.policy import QuantConfig, Selection, select
from nvfp4_train.quant.served import SERVED_DTYPE, ServedUnit, parts_called_alone, served_units, show_served
from nvfp4_train.quant.sharded import ShardedWeightStore
from nvfp4_train.quant.store import ReplicatedWeightStore, WeightStore


def quantize(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    calibration: Iterable[Tensor] = (),
) -> WeightStore:
    """Let a model compute with NVFP4 weights, in place: any `nn.Module` with linears, on one device. Parameters stay masters.

    The returned store holds what was quantized (`manifest`). Call its `update()` after every optimizer step, so that it follows the
    masters; with a fitted rule `update(refit=True)` chooses anew. Until the first update the forward computes with masters rounded to
    bf16. The first update is done here, unless config says that quantization begins later, or never.

    Args:
        model: Its floating-point parameters are fp32 or bf16, and stay as they are, but for experts' matrices with inputs first, which
            are held with outputs first. It computes with NVFP4 weights when it is called
            itself; so do, called by themselves, the body and the head of a transformers model, but no other parts.
        config: Which weights, and how; everything but the output embedding and routers by default.
        compute_dtype: Dtype of products and activations, bfloat16 or float32; weights have their served values in both. By default
            the dtype of the model's first parameter.
        calibration: Sequences of a causal LM of transformers, int64 [1, T], on which its inputs are measured. With them the masters
            are equalized as config says; the `hessian` rule and quantized activations need them.

    Raises:
        ValueError: Nothing is left to quantize, a pattern of config matches nothing (see `select`), a parameter or compute_dtype is of
            another dtype, the model has been quantized before, or config needs a calibration that is not given, or cannot be done.
    """
    config = config or QuantConfig()
    if isinstance(model, ServedUnit):
        raise ValueError("model must not have been quantized before; use the store of that call, or another copy of the model")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in COMPUTE_DTYPES.values():
            raise ValueError(f"{name} must be float32 or bfloat16, got {parameter.dtype}; see model.float()")
    first = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), SERVED_DTYPE)
    compute_dtype = compute_dtype or first
    if compute_dtype not in COMPUTE_DTYPES.values():
        raise ValueError(f"compute_dtype must be torch.bfloat16 or torch.float32, got {compute_dtype!r}")
    sequences = _checked_calibration(model, config, calibration)
    if isinstance(model, PreTrainedModel):
        serve_buffers(model, compute_dtype)
    made = make_trainable(model, config, compute_dtype=compute_dtype)
    if sequences:
        assert isinstance(model, PreTrainedModel)
        prepare(model, made.store, config, [({"input_ids": ids}, True) for ids in sequences])
    if config.enabled and config.start_step == 0:
        made.store.update()
    return made.store


def _checked_calibration(model: nn.Module, config: QuantConfig, calibration: Iterable[Tensor]) -> list[Tensor]:
    """The sequences. Raises ValueError where they are none that `model` can be calibrated with, or are needed and not given."""
    sequences = list(calibration)
    if not sequences:
        if config.scale_rule.is_fitted or config.needs_input_scales:
            raise ValueError(f"calibration must hold sequences with rule={config.rule!r} in {config.serving}, got none")
        return []
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"calibration takes causal LMs of transformers, got a {type(model).__name__}")
    vocab_size = model.config.get_text_config().vocab_size
    for ids in sequences:
        is_sequence = isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1 and ids.dtype is torch.int64
        if not is_sequence or not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"calibration must hold token ids below {vocab_size}, int64 [1, T] each, got {got}")
    check_num_tokens(sum(ids.numel() for ids in sequences))
    return sequences


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model that shows its served values, and what refreshes them."""

    selection: Selection
    store: WeightStore
    inputs: InputQuantizers
    """The quantizers of the inputs of quantized weights. They are off; the store's first update enables them, if quant says so."""


def make_trainable(
    model: nn.Module,
    quant: QuantConfig,
    *,
    compute_dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool = True,
    compile_layers: bool = False,
    fill: Callable[[], None] | None = None,
) -> Trainable:
    """Choose what is quantized, let the model show served values, and shard it over the mesh if there is one, in place.

    `fill` is called once the model is sharded, and gives it its weights. The caller does the store's first update.
    """
    name_class(model)
    layout = HubLayout(model.config) if _is_causal_lm(model) else None  # type: ignore[arg-type]
    selection = select(model, quant, layout)
    hold_rows_first(model, selection.manifest.names)
    open_inputs(model, selection.manifest.names)
    # The store, and with it the scales, is made last. Nobody reads them before that.
    inputs = quantize_inputs(model, selection.manifest, lambda group: store.state.input_scale(group))
    kept = kept_in_fp32(model)
    sharded_units = [] if mesh is None else fsdp_units(model, kept=kept, compute_dtype=compute_dtype)
    units = [*served_units(model), *(module for unit in sharded_units for module in unit.modules if module is not model)]
    shown = show_served(
        model,
        list(dict.fromkeys(units)),
        also=[] if mesh is not None else parts_called_alone(model),
        kept=kept,
        gathered_as_served=gathered_as_served(sharded_units),
        compute_dtype=compute_dtype,
    )
    # Else inductor would leave out the rounding of float32 to served values.
    options = None if compute_dtype is SERVED_DTYPE else {"emulate_precision_casts": True}
    for layer in decoder_layers(model) if compile_layers else ():
        layer.compile(options=options)
    store: WeightStore
    if mesh is None:
        store = ReplicatedWeightStore(model, selection.manifest, shown, compute_dtype=compute_dtype)
    else:
        shard_model(mesh, sharded_units, reshard_after_forward=reshard_after_forward)
        if fill is not None:
            fill()
        store = ShardedWeightStore(
            model,
            selection.manifest,
            gather=quant.gather,
            gathered_in_fp32={module for unit in sharded_units if unit.in_fp32 for module in unit.modules},
            compute_dtype=compute_dtype,
        )
    store.inputs = inputs if quant.activations == "nvfp4" else None
    return Trainable(selection=selection, store=store, inputs=inputs)


def _is_causal_lm(model: nn.Module) -> bool:
    """Whether it is of a class that readers of an exported folder build."""
    try:
        return isinstance(model, PreTrainedModel) and class_of(model) is model_class(model.config)[0]
    except ValueError:
        return False


def kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers keeps in fp32 when it loads the model in bf16; none for other modules."""
    if not isinstance(model, PreTrainedModel):
        return set()
    dtypes = served_dtypes(model)
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if dtypes[name] is torch.float32}


@dataclass(frozen=True, kw_only=True)
class BuiltModel(Trainable):
    """A model that is ready to train."""

    model: PreTrainedModel
    not_built: NotBuilt | None
    """What the folder holds beside the model; None where that is nothing."""
    note: str | None
    """A line for the user about the original."""


def build_model(
    config: ModelConfig,
    quant: QuantConfig,
    device: torch.device,
    *,
    compute_dtype: torch.dtype,
    frozen: Sequence[str] = (),
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool = True,
) -> BuiltModel:
    """Load or make the model of a config, and make it trainable; sharded over the mesh if there is one.

    `frozen` are patterns of parameters that are not trained, see `freeze`. A sharded model gets its weights here, on the device.
    A model that is not sharded is still on the CPU.
    """
    # Random initial weights may not depend on the number of ranks, so a model without a path is built whole on each.
    opened = None if mesh is None else open_folder(config, compute_dtype)
    model = load_model(config, compute_dtype) if opened is None else opened[0]
    not_built = find_not_built(config, model)
    freeze_outside(model)
    freeze(model, frozen)

    def read_rows() -> None:
        if opened is not None:
            allocate(model, device)
            opened[1].read_into(model)

    made = make_trainable(
        model,
        quant,
        compute_dtype=compute_dtype,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        compile_layers=config.compile,
        fill=read_rows,
    )
    return BuiltModel(
        model=model,
        selection=made.selection,
        store=made.store,
        inputs=made.inputs,
        not_built=not_built,
        note=note(read_original(config)[1]),
    )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the training of the parameters with a name that matches a pattern. Raises ValueError where one matches none, or all."""
    names: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"optim.frozen: pattern {pattern!r} matches no parameter; names look like {', '.join(list(names)[:3])}"
            )
        for name in matched:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError(f"optim.frozen must leave a parameter to train, got {list(patterns)}, which match all")


@dataclass(frozen=True, kw_only=True)
class ModelBuilder:
    """Builds other models beside the student, the one that trains: frozen, with bf16 values; sharded or compiled if the student is."""

    student: nn.Module
    """Before its first step."""
    config: ModelConfig
    """Where it comes from."""
    device: torch.device
    compute_dtype: torch.dtype = SERVED_DTYPE
    """Dtype of products and activations."""
    mesh: DeviceMesh | None = None

    def __call__(self, config: ModelConfig | None = None) -> nn.Module:
        """The model of a config, in evaluation mode on the device; without one a copy of the student as it was loaded."""
        if config is not None:
            config = replace(config, trust_remote_code=config.trust_remote_code or self.config.trust_remote_code)
        # A model of random weights has no other original than the student itself.
        is_copy = config is None and self.config.path is None
        opened = None if self.mesh is None or is_copy else open_folder(config or self.config, self.compute_dtype)
        model = load_frozen(config or self.config) if opened is None else opened[0].requires_grad_(False).eval()
        if is_copy:
            state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in self.student.state_dict().items()}
            rows_first = held_rows_first(self.student)
            model.load_state_dict({name: tensor.mT if name in rows_first else tensor for name, tensor in state.items()})
        hold_as_served(model, self.compute_dtype)
        for layer in decoder_layers(model) if self.config.compile else ():
            layer.compile()
        if self.mesh is None:
            return model.to(self.device)  # type: ignore[arg-type]
        shard_frozen(self.mesh, model)
        if opened is not None:
            allocate(model, self.device)
            opened[1].read_into(model)
            round_to_served(model)
        return model


@torch.no_grad()
def round_to_served(model: PreTrainedModel) -> None:
    """Round every parameter, sharded or not, to the dtype that it is served in, in place. It stays in its own dtype."""
    dtypes = served_dtypes(model)
    for name, parameter in model.named_parameters():
        rows, _ = local_rows(parameter)
        rows.copy_(rows.to(dtypes[name]))
