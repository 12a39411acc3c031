"""Shows the forward every parameter as it will be served, while the parameter itself stays an fp32 master.

A model is cut into units: the decoder layers, and the root, which owns the modules that are in no layer. While the forward of a unit
runs, also one that recomputes activations, the `_parameters` of all its modules hold served values: decoded NVFP4 for quantized
parameters, bf16 for all others. The forward of any module may read them. Afterwards, also after an error, the modules hold their
masters again, so a checkpoint that is taken while no forward runs holds the masters. Gradients pass straight through.

A parameter that transformers keeps in fp32 is served in fp32, so it is shown as it is. Where products are slow in bf16 the model
computes in float32, with the same served values.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

SERVED_DTYPE = torch.bfloat16
"""The dtype in which readers hold unquantized parameters, and to which they decode quantized ones."""


class _StraightThrough(torch.autograd.Function):
    """The forward gives the served value; the backward passes the gradient to the master."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, served: Tensor) -> Tensor:
        return served.view_as(served)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, served: Tensor) -> Tensor:
    """The value of `served`, with the gradient of x. Both have one shape."""
    return _StraightThrough.apply(x, served)


def rows_first_of(module: nn.Module) -> frozenset[str]:
    """Names in a module of the parameters that are held as [E, N, K], and that its forward reads as [E, K, N]. See `experts`."""
    return getattr(module, "rows_first", frozenset())


class _Rounded(torch.autograd.Function):
    """Rounds float32 to bf16 values. The gradient, which is the master's, is not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(SERVED_DTYPE).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Shown:
    """One place where a unit shows a parameter. The store puts there the compute weight to show instead of the master."""

    def __init__(self, compute_weights: dict[str, Tensor], key: str) -> None:
        self._compute_weights = compute_weights
        self._key = key

    @property
    def compute_weight(self) -> Tensor | None:
        """None where the rounded master is shown."""
        return self._compute_weights.get(self._key)

    @compute_weight.setter
    def compute_weight(self, weight: Tensor | None) -> None:
        if weight is None:
            self._compute_weights.pop(self._key, None)
        else:
            self._compute_weights[self._key] = weight


def to_served(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """x rounded to bf16, in the dtype of the computation (bf16 or fp32)."""
    return x.to(SERVED_DTYPE) if compute_dtype is SERVED_DTYPE else _Rounded.apply(x)


class _ServedWhenRead(dict[str, Any]):
    """Parameters of an embedding as the other modules of its unit see them. The table is rounded, whole, when one of them reads it."""

    def __init__(self, masters: dict[str, Any], compute_dtype: torch.dtype) -> None:
        super().__init__(masters)
        self.masters = masters
        self._compute_dtype = compute_dtype
        self._unread = set(masters)

    def __getitem__(self, name: str) -> Any:
        if name in self._unread:
            self._unread.remove(name)
            self[name] = to_served(super().__getitem__(name), self._compute_dtype)
        return super().__getitem__(name)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]


class _ServedEmbedding(nn.Embedding):
    """Looks up rows of the master and rounds those instead of the whole table. That is less work, and gradients add up in fp32."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        shown = self._parameters
        self._parameters = getattr(shown, "masters", shown)
        try:
            return to_served(super().forward(ids), self.compute_dtype)
        finally:
            self._parameters = shown


def set_parameters(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Replace `_parameters` of a module. `nn.Module.__setattr__` is avoided: torch.compile would guard its steps in every call."""
    object.__setattr__(module, "_parameters", parameters)


class _ServedModule(NamedTuple):
    """A module of a unit whose shown parameters differ from the held ones."""

    module: nn.Module
    path: tuple[str, ...]
    """Names of the submodules that lead from the unit to the module."""
    names: tuple[tuple[str, str | None], ...]
    """Each parameter's name in the module, and in the unit. The latter is None where the parameter's own value is shown."""
    rows_first: frozenset[str]
    """Names in the module of what is shown transposed."""


class ServedUnit:
    """Mixin, put before the class of a unit. While `forward` or `within` runs, the unit's modules hold served values.

    torch.compile guards all that a layer reads in every call, so the unit holds in one place what it needs of its modules.
    """

    served_modules: tuple[_ServedModule, ...]
    compute_weights: dict[str, Tensor]
    """Served values that the store refreshes once per optimizer step, by name in the unit."""
    compute_dtype: torch.dtype
    modules_with_parameters: tuple[nn.Module, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._shown(super().forward, *args, **kwargs)  # type: ignore[misc]

    def within(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` as if it were the unit's forward: the unit's modules hold served values meanwhile.

        So `function` may call submodules and read their parameters. The root of a sharded model is gathered as well, and what of
        this takes part in the backward must be among the tensors that `function` returns.
        """
        return self._shown(function, *args)

    def _shown(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        if not self.served_modules:
            return function(*args, **kwargs)
        modules = self._modules_to_serve()
        masters = [module._parameters for module in modules]
        weights, dtype = self.compute_weights, self.compute_dtype
        try:
            for module, (_, _, names, rows_first), held in zip(modules, self.served_modules, masters, strict=True):
                if isinstance(module, _ServedEmbedding):
                    if not isinstance(held, _ServedWhenRead):
                        set_parameters(module, _ServedWhenRead(held, dtype))
                    continue
                shown: dict[str, Any] = {}
                for name, key in names:
                    parameter = held[name]
                    if key is None:
                        shown[name] = parameter
                    elif key in weights:
                        shown[name] = _StraightThrough.apply(parameter, weights[key])
                    else:
                        shown[name] = to_served(parameter, dtype)
                for name in rows_first:
                    shown[name] = shown[name].transpose(1, 2)
                set_parameters(module, shown)
            return function(*args, **kwargs)
        finally:
            for module, held in zip(modules, masters, strict=True):
                set_parameters(module, held)

    def _modules_to_serve(self) -> list[Any]:
        if not torch.compiler.is_compiling():
            return [served.module for served in self.served_modules]
        # Compiled code finds its modules where the forward does, and guards each of them once.
        modules = []
        for _, path, _, _ in self.served_modules:
            module: Any = self
            for name in path:
                module = module._modules[name]
            modules.append(module)
        return modules

    def served(self) -> list[tuple[nn.Module, dict[str, Tensor | None]]]:
        """The parameters shown now, by module and by name there. A sharded unit must be unsharded."""
        names = {served.module: dict(served.names) for served in self.served_modules}
        found = []
        for module in self.modules_with_parameters:
            shown: dict[str, Tensor | None] = {}
            for name, parameter in module._parameters.items():
                key = names.get(module, {}).get(name)
                if parameter is None or key is None:
                    shown[name] = parameter
                else:
                    shown[name] = self.compute_weights.get(key, to_served(parameter, self.compute_dtype))
            for name in rows_first_of(module):
                shown[name] = shown[name].transpose(1, 2)  # type: ignore[union-attr]
            found.append((module, shown))
        return found


def served_units(model: nn.Module) -> list[nn.Module]:
    """The units of a Hugging Face model beside the root: its decoder layers, and all layers that recompute their activations.

    Decoder layers are the modules that transformers never splits over devices (`_no_split_modules`). Models of other kinds have none.
    """
    layers = set(getattr(model, "_no_split_modules", None) or ())
    return [
        module
        for module in model.modules()
        if type(module).__name__ in layers or any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)
    ]


def parts_called_alone(model: nn.Module) -> list[nn.Module]:
    """The body and the head of a Hugging Face model, which a loss may call in place of the model."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    parts = [getattr(model, "base_model", None), head]
    return [part for part in parts if isinstance(part, nn.Module) and part is not model]


def show_served(
    model: nn.Module,
    units: Sequence[nn.Module] = (),
    *,
    also: Sequence[nn.Module] = (),
    kept: Collection[str] = (),
    gathered_as_served: Collection[nn.Module] = (),
    compute_dtype: torch.dtype = SERVED_DTYPE,
) -> dict[str, list[Shown]]:
    """Let the forwards of a model and of its `units` compute with served values, in place.

    `kept` are names of parameters that are served in fp32. `gathered_as_served` are modules whose served values FSDP2 gathers. Units
    may lie within one another; a module belongs to the innermost. Those in `also` show their modules too when they are called by
    themselves.
    Returns the places that show each parameter, by all of its names (`named_parameters(remove_duplicate=False)`).
    """
    names: dict[nn.Module, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(f"{prefix}." if prefix else "")
    shown: dict[str, list[Shown]] = {}
    for unit in (model, *units, *(part for part in also if part not in units)):
        weights: dict[str, Tensor] = {}
        modules, served = [], []
        for path, module in _modules_of(unit, units):
            leaves: list[tuple[str, str | None]] = []
            for leaf, parameter in module._parameters.items():
                known_as = [prefix + leaf for prefix in names[module]]
                is_shown_as_held = (
                    parameter is None or not parameter.is_floating_point() or any(name in kept for name in known_as)
                )
                key = f"{path}.{leaf}".removeprefix(".")
                leaves.append((leaf, None if is_shown_as_held else key))
                for name in known_as if parameter is not None else ():
                    shown.setdefault(name, []).append(Shown(weights, key))
            if all(parameter is None for parameter in module._parameters.values()):
                continue
            modules.append(module)
            if module in gathered_as_served:
                leaves = [(leaf, None) for leaf, _ in leaves]
            if all(key is None for _, key in leaves) and not rows_first_of(module):
                continue
            served.append(_ServedModule(module, tuple(path.split(".")) if path else (), tuple(leaves), rows_first_of(module)))
            if type(module) is nn.Embedding and module.max_norm is None and unit in (model, module):
                module.__class__ = _ServedEmbedding
                module.compute_dtype = compute_dtype  # type: ignore[assignment]
        # An embedding that is a unit by itself rounds what it looks up, and nobody else reads it.
        if not isinstance(unit, _ServedEmbedding):
            _mix_in(unit)
            unit.served_modules, unit.modules_with_parameters = tuple(served), tuple(modules)  # type: ignore[assignment]
            unit.compute_weights, unit.compute_dtype = weights, compute_dtype  # type: ignore[assignment]
    return shown


def units_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every unit of a model to which `show_served` has been applied, the root first."""
    units: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, ServedUnit):
            units.append((name, module))  # type: ignore[arg-type]
            inside.update(module.modules_with_parameters)
    embeddings = [(name, m) for name, m in model.named_modules() if isinstance(m, _ServedEmbedding) and m not in inside]
    return [*units, *embeddings]


def modules_of_unit(unit: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a unit that have parameters."""
    return unit.modules_with_parameters if isinstance(unit, ServedUnit) else (unit,)


def served_parameters(unit: nn.Module, compute_dtype: torch.dtype) -> list[tuple[nn.Module, dict[str, Tensor | None]]]:
    """The parameters that a unit shows, by module and by name there. Not for use in its forward. A sharded unit must be unsharded."""
    if isinstance(unit, ServedUnit):
        return unit.served()
    return [(unit, {name: to_served(p, compute_dtype) for name, p in unit._parameters.items() if p is not None})]


def _modules_of(unit: nn.Module, units: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The modules of a unit by name there, itself first, without those of other units inside it."""
    inside = set(unit.modules()) & set(units) - {unit}
    skipped = {module for other in inside for module in other.modules()}
    return [(path, module) for path, module in unit.named_modules() if module not in skipped]


_classes: dict[type, type] = {}


def _mix_in(unit: nn.Module) -> None:
    cls = type(unit)
    if issubclass(cls, ServedUnit):
        return
    if cls not in _classes:
        # Checkpointing layers of transformers wrap the forward of a subclass too, so recomputation begins with this one.
        _classes[cls] = type(cls.__name__, (ServedUnit, cls), {"__module__": cls.__module__})
    unit.__class__ = _classes[cls]
