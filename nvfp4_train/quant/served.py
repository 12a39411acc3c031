"""Shows every parameter as it will be served, to whoever reads it, while every parameter stays an fp32 master.

A model is cut into units: decoder layers, and the root, which owns the modules that are in no layer. While the forward of a unit runs,
its first one or one that recomputes activations, the `_parameters` of all its modules hold served values: the decoded NVFP4 of
quantized parameters, all others rounded to bf16. It does not matter whose forward reads them. Outside of it the modules hold
their masters, whatever was raised inside, so a checkpoint taken at any moment holds the masters. Gradients pass straight through.

A parameter that transformers keeps in fp32 is served in fp32, so it is shown as it is. Where products are slow in bf16 the model
computes in float32, with the same served values.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SERVED_DTYPE = torch.bfloat16
"""The dtype in which readers hold what is not quantized, and into which they decode what is."""


class _StraightThrough(torch.autograd.Function):
    """Value of the served parameter, gradient to the master."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, served: Tensor) -> Tensor:
        return served.view_as(served)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Rounded(torch.autograd.Function):
    """float32, rounded to bf16. The gradient is not: it is the master's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(SERVED_DTYPE).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Shown:
    """How one module shows its parameters."""

    def __init__(self, module: nn.Module, kept: Collection[str], compute_dtype: torch.dtype) -> None:
        self.module = module
        self.kept = frozenset(kept)
        """Names of parameters that are served in fp32."""
        self.compute_dtype = compute_dtype
        self.compute_weights: dict[str, Tensor] = {}
        """Served values that the weight store refreshes once per optimizer step, by parameter name in the module."""

    def served(self, name: str, parameter: Tensor | None) -> Tensor | None:
        """What a reader of the parameter sees. One that FSDP2 has gathered in the dtype of the computation is served already."""
        if parameter is None or name in self.kept or not parameter.is_floating_point():
            return parameter
        if name in self.compute_weights:
            return _StraightThrough.apply(parameter, self.compute_weights[name])
        return to_served(parameter, self.compute_dtype)


def to_served(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """x rounded to bf16, in the dtype of the computation (bf16 or fp32)."""
    return x.to(SERVED_DTYPE) if compute_dtype is SERVED_DTYPE else _Rounded.apply(x)


class _ServedWhenRead(dict[str, Any]):
    """Parameters of an embedding as the rest of its unit sees them: the table is rounded, whole, if somebody does read it."""

    def __init__(self, shown: Shown, masters: dict[str, Any]) -> None:
        super().__init__(masters)
        self.masters = masters
        self._shown = shown
        self._unread = set(masters)

    def __getitem__(self, name: str) -> Any:
        if name in self._unread:
            self._unread.remove(name)
            self[name] = self._shown.served(name, super().__getitem__(name))
        return super().__getitem__(name)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]


class _ServedEmbedding(nn.Embedding):
    """Looks up rows of the master and rounds those, instead of the whole table: less work, and their gradients add up in fp32."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        shown = self._parameters
        self._parameters = getattr(shown, "masters", shown)
        try:
            return to_served(super().forward(ids), self.compute_dtype)
        finally:
            self._parameters = shown


class _ServedUnit:
    """Mixin before the class of a unit."""

    shown: tuple[Shown, ...]
    """Of the modules of the unit that have parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        masters = [shown.module._parameters for shown in self.shown]
        try:
            for shown, held in zip(self.shown, masters, strict=True):
                if isinstance(shown.module, _ServedEmbedding):
                    shown.module._parameters = _ServedWhenRead(shown, held)  # type: ignore[assignment]
                else:
                    shown.module._parameters = {name: shown.served(name, p) for name, p in held.items()}  # type: ignore[misc]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for shown, held in zip(self.shown, masters, strict=True):
                shown.module._parameters = held


def served_units(model: nn.Module) -> list[nn.Module]:
    """The units of a Hugging Face model beside the root: its decoder layers, and all layers that recompute their activations.

    Decoder layers are what the model never splits over devices (`_no_split_modules`). Other modules have no units.
    """
    layers = set(getattr(model, "_no_split_modules", None) or ())
    return [
        module
        for module in model.modules()
        if type(module).__name__ in layers or any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)
    ]


def show_served(
    model: nn.Module, units: Sequence[nn.Module] = (), *, kept: Collection[str] = (), compute_dtype: torch.dtype = SERVED_DTYPE
) -> dict[str, Shown]:
    """Let the forwards of a model and of its `units` compute with served values, in place.

    `kept` are names of parameters that are served in fp32. Units may lie within one another; a module belongs to the innermost.
    Returns who shows a parameter, by every name of it (`named_parameters(remove_duplicate=False)`).
    """
    names: dict[nn.Module, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(f"{prefix}." if prefix else "")
    shown_by: dict[str, Shown] = {}
    for unit in (model, *units):
        shown = []
        for module in _modules_of(unit, units):
            leaves = [leaf for leaf, parameter in module._parameters.items() if parameter is not None]
            if not leaves:
                continue
            in_fp32 = [leaf for leaf in leaves if any(prefix + leaf in kept for prefix in names[module])]
            shown.append(Shown(module, in_fp32, compute_dtype))
            shown_by |= {prefix + leaf: shown[-1] for prefix in names[module] for leaf in leaves}
            if type(module) is nn.Embedding and module.max_norm is None and unit in (model, module) and not in_fp32:
                module.__class__ = _ServedEmbedding
                module.compute_dtype = compute_dtype  # type: ignore[assignment]
        # An embedding that is a unit by itself rounds what it looks up, and nobody else reads it.
        if not isinstance(unit, _ServedEmbedding):
            _mix_in(unit)
            unit.shown = tuple(shown)  # type: ignore[assignment]
    return shown_by


def units_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every unit of a model to which `show_served` has been applied, the root first."""
    names = [name for name, module in model.named_modules() if isinstance(module, _ServedUnit)]
    shown = {entry.module for name in names for entry in model.get_submodule(name).shown}  # type: ignore[union-attr]
    names += [name for name, module in model.named_modules() if isinstance(module, _ServedEmbedding) and module not in shown]
    return [(name, model.get_submodule(name)) for name in names]


def modules_of_unit(unit: nn.Module) -> list[nn.Module]:
    """The modules of a unit that have parameters."""
    return [shown.module for shown in unit.shown] if isinstance(unit, _ServedUnit) else [unit]


def served_parameters(unit: nn.Module, compute_dtype: torch.dtype) -> list[tuple[nn.Module, dict[str, Tensor | None]]]:
    """What a unit shows now, by module and by name there; outside of its forward, and of a sharded one while it is unsharded."""
    if not isinstance(unit, _ServedUnit):
        return [(unit, {name: to_served(p, compute_dtype) for name, p in unit._parameters.items() if p is not None})]
    return [
        (shown.module, {name: shown.served(name, p) for name, p in shown.module._parameters.items()}) for shown in unit.shown
    ]


def _modules_of(unit: nn.Module, units: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules of a unit, itself first, without those of other units inside it."""
    modules = list(unit.modules())
    inside = set(modules) & set(units) - {unit}
    skipped = {module for other in inside for module in other.modules()}
    return [module for module in modules if module not in skipped]


_classes: dict[type, type] = {}


def _mix_in(unit: nn.Module) -> None:
    cls = type(unit)
    if issubclass(cls, _ServedUnit):
        return
    if cls not in _classes:
        # Checkpointing layers of transformers wrap the forward of a subclass, too: what is recomputed begins with this one.
        _classes[cls] = type(cls.__name__, (_ServedUnit, cls), {"__module__": cls.__module__})
    unit.__class__ = _classes[cls]
