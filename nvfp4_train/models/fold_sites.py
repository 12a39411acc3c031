"""Finds, by experiments on a model, where its activations can be scaled channel by channel without changing what it computes.

That is possible where a feeder, a norm or a linear, makes a channel that other modules, its readers, do nothing with but multiply it
by weights: what the feeder's parameters are divided by, the readers' weights are multiplied by. No name of a family is used.

In an experiment the outputs of some modules are multiplied by random powers of two, while every module with parameters computes with
the input that it had without them. So a change reaches none but the direct readers, and they show by which channel each of theirs is
scaled. The sequences of an experiment have one token each: attention then passes values on as they are, whatever queries and keys are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.models.channel_codes import ChannelCodes
from nvfp4_train.models.fold_axes import (
    Axis,
    Call,
    float_positions,
    linear_outputs,
    norm_outputs,
    parameters_of,
    product_inputs,
)
from nvfp4_train.quant.expert_inputs import closed_groups
from nvfp4_train.quant.experts import DOWN_NAME, input_module, owner_of
from nvfp4_train.quant.manifest import QuantManifest

NUM_SEQUENCES = 16
"""Sequences of one token in an experiment."""

Inputs = dict[nn.Module, list[list[Tensor]]]
"""The float tensors that modules were called with, call after call. Modules are in the order of their first calls."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldSite:
    """A feeder, and all that reads it. Axes run over the feeder's channels."""

    name: str
    """Name of the feeder."""
    feeder: nn.Module
    num_channels: int
    outputs: list[Axis]
    """The feeder's own parameters."""
    readers: list[Axis]
    inputs: dict[str, Tensor]
    """The feeder's channel at every channel of a quantized group's input, int64 [K] on the CPU, by the group's first parameter."""

    @property
    def is_exact(self) -> bool:
        """Whether powers of two scale all parameters without rounding them."""
        return not any(axis.offset for axis in self.outputs)


@dataclass(kw_only=True, eq=False)
class _Reading:
    """How a module reads a feeder."""

    position: int
    """Which of its float inputs it is."""
    channels: Tensor
    """The feeder's channel at every channel of that input, int64 on the CPU."""
    axes: list[Axis] = field(default_factory=list)
    """What it is multiplied by; none where that is not known."""


@dataclass(kw_only=True, eq=False)
class _Candidate:
    """What experiments have shown of a feeder."""

    readings: dict[nn.Module, _Reading] = field(default_factory=dict)
    outputs: list[Axis] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)


def kind_of(name: str) -> str:
    """A module's name without its numbers: the same for all layers, and for all experts."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


@torch.no_grad()
def find_sites(model: nn.Module, manifest: QuantManifest, input_ids: Tensor) -> tuple[list[FoldSite], dict[str, str]]:
    """The sites that feed quantized groups, and what cannot be scaled by name, with the reason.

    Call it on every rank with the same input_ids, int64 [B, T], of which 16 tokens are used. Sites are yet to be proven: a reader that
    owns no parameter is not seen here. Linears that no token reached, as happens to experts, are taken to be as others of their kind.
    """
    search = _Search(model, manifest, input_ids.reshape(-1, 1)[:NUM_SEQUENCES])
    search.try_norms()
    search.try_linears()
    search.add_uncalled()
    search.assign_groups()
    search.measure_axes()
    return search.sites(), search.skipped


class _Search:
    def __init__(self, model: nn.Module, manifest: QuantManifest, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.names = {module: name for name, module in model.named_modules()}
        closed = closed_groups(model, manifest)
        self.groups = {g[0]: [_reader(model, name) for name in g] for g in manifest.groups if g[0] not in closed}
        self.recorded = _run(model, ids, _innermost_with_parameters(model))
        self.candidates: dict[nn.Module, _Candidate] = {}
        self.skipped: dict[str, str] = {}
        self.generator = torch.Generator().manual_seed(0)

    def try_norms(self) -> None:
        """All of them in one experiment."""
        self._experiment({module: slice(None) for module in self.recorded if _is_norm(module)})

    def try_linears(self) -> None:
        """For every kind of quantized linears that no norm feeds, one experiment after the other until a feeder is found."""
        for kind in dict.fromkeys(kind_of(self.names[module]) for module in self._unfed()):
            for scaled in self._trials(kind):
                self._experiment(scaled)
                if all(kind_of(self.names[module]) != kind for module in self._unfed()):
                    break

    def _unfed(self) -> list[nn.Linear]:
        fed = {module for candidate in self.candidates.values() for module in candidate.readings}
        quantized = [module for modules in self.groups.values() for module in modules]
        return [m for m in quantized if isinstance(m, nn.Linear) and m in self.recorded and m not in fed]

    def _trials(self, kind: str) -> Iterator[dict[nn.Module, slice]]:
        """Linears that may feed those of a kind: called before one in the same layer, the last one first; and others of their kind."""
        called = list(self.recorded)
        reader = next((module for module in self._unfed() if kind_of(self.names[module]) == kind), None)
        # An experiment for another kind may have found what feeds this one.
        if reader is None:
            return
        for module in reversed(called[: called.index(reader)]):
            if not isinstance(module, nn.Linear) or _numbers(self.names[module]) != _numbers(self.names[reader]):
                continue
            rows, width = module.out_features, reader.in_features
            same_kind = [m for m in called if kind_of(self.names[m]) == kind_of(self.names[module])]
            if rows >= width or width % rows == 0:
                yield dict.fromkeys(same_kind, slice(None))
            if rows == 2 * width:
                # Gate and up in one linear: scaled together they scale no product of them.
                yield dict.fromkeys(same_kind, slice(width, None))
                yield dict.fromkeys(same_kind, slice(width))

    def _experiment(self, parts: Mapping[nn.Module, slice]) -> None:
        """Scale parts of the outputs of modules, and note who reads them."""
        codes = ChannelCodes({module: (_num_channels(module), part) for module, part in parts.items()}, self.generator)
        seen = _run(self.model, self.ids, self.recorded, held=self.recorded, scales=codes.scales)
        for module, calls in self.recorded.items():
            if (read := _read(calls, seen.get(module, []), codes)) is not None:
                feeder, reading = read
                self.candidates.setdefault(feeder, _Candidate()).readings.setdefault(module, reading)

    def add_uncalled(self) -> None:
        """Let linears that no token reached read, and be read, as others of their kind."""
        by_kind = {(kind_of(name), _numbers(name)): module for module, name in self.names.items()}
        known: dict[tuple[str, str], tuple[int, Tensor]] = {}
        for feeder, candidate in self.candidates.items():
            for module, reading in candidate.readings.items():
                kinds = kind_of(self.names[module]), kind_of(self.names[feeder])
                known.setdefault(kinds, (len(_numbers(self.names[feeder])), reading.channels))
        for module, name in self.names.items():
            if not isinstance(module, nn.Linear) or module in self.recorded:
                continue
            for (kind_of_reader, kind_of_feeder), (depth, channels) in known.items():
                # The feeder is in the same expert, or in the same layer.
                own = by_kind.get((kind_of_feeder, _numbers(name)[:depth]))
                if kind_of_reader == kind_of(name) and own is not None:
                    reading = _Reading(position=0, channels=channels)
                    self.candidates.setdefault(own, _Candidate()).readings[module] = reading

    def assign_groups(self) -> None:
        """Note which quantized groups every feeder feeds, and drop feeders of none."""
        feeders_of: dict[nn.Module, list[_Candidate]] = {}
        for candidate in self.candidates.values():
            for module in candidate.readings:
                feeders_of.setdefault(module, []).append(candidate)
        for group, modules in self.groups.items():
            feeders = [c for c in feeders_of.get(modules[0], ()) if all(module in c.readings for module in modules)]
            if len(feeders) == 1:
                feeders[0].inputs[group] = feeders[0].readings[modules[0]].channels
            else:
                self.skipped[owner_of(group)] = "its input is not, channel by channel, the output of one norm or linear"
        self.candidates = {feeder: candidate for feeder, candidate in self.candidates.items() if candidate.inputs}

    def measure_axes(self) -> None:
        """Find the parameters that run over the channels: known for linears, and measured in one more forward for others."""
        measured: set[nn.Module] = set()

        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module in measured:
                return
            measured.add(module)
            call = Call(module=module, args=args, kwargs=kwargs)
            if module in self.candidates:
                self.candidates[module].outputs = norm_outputs(call)
            for reading in (c.readings[module] for c in self.candidates.values() if module in c.readings):
                reading.axes = product_inputs(call, reading.position, reading.channels)

        others: dict[nn.Module, None] = {}
        for feeder, candidate in self.candidates.items():
            if isinstance(feeder, nn.Linear):
                candidate.outputs = linear_outputs(feeder)
            else:
                others[feeder] = None
            for module, reading in candidate.readings.items():
                if isinstance(module, nn.Linear):
                    reading.axes = [Axis(module=module, leaf="weight", dim=1, channels=reading.channels)]
                else:
                    others[module] = None
        _forward(self.model, self.ids, [module.register_forward_hook(measure, with_kwargs=True) for module in others])

    def sites(self) -> list[FoldSite]:
        """The candidates that can be scaled; others are skipped."""
        sites = []
        for feeder, candidate in self.candidates.items():
            name = self.names[feeder]
            others = [self.names[module] for module, reading in candidate.readings.items() if not reading.axes]
            if not candidate.outputs:
                self.skipped[name] = "its output is not proportional to its weight"
            elif others:
                self.skipped[name] = f"{others[0]} does not only multiply its output by weights"
            else:
                sites.append(
                    FoldSite(
                        name=name,
                        feeder=feeder,
                        num_channels=_num_channels(feeder),
                        outputs=candidate.outputs,
                        readers=[axis for reading in candidate.readings.values() for axis in reading.axes],
                        inputs=candidate.inputs,
                    )
                )
        conflicts = self._conflicts(sites)
        self.skipped |= conflicts
        return [site for site in sites if site.name not in conflicts]

    def _conflicts(self, sites: Sequence[FoldSite]) -> dict[str, str]:
        """Sites by name with a parameter that has another role, too, because modules share it; and where that is."""
        owners: dict[int, list[nn.Module]] = {}
        for module in self.names:
            for parameter in parameters_of(module).values():
                owners.setdefault(id(parameter), []).append(module)
        roles: dict[tuple[int, int], list[tuple[FoldSite, Axis]]] = {}
        for site in sites:
            for axis in (*site.outputs, *site.readers):
                roles.setdefault((id(axis.parameter), axis.dim), []).append((site, axis))
        conflicts: dict[str, str] = {}
        for (parameter_id, _), users in roles.items():
            for site, axis in users:
                agreeing = {other.module for its, other in users if its is site and torch.equal(other.channels, axis.channels)}
                differing = [module for module in owners[parameter_id] if module not in agreeing]
                others = [its for its, _ in users if its is not site]
                if differing:
                    conflicts[site.name] = f"{self.names[axis.module]} shares its {axis.leaf} with {self.names[differing[0]]}"
                elif others:
                    conflicts[site.name] = f"{self.names[axis.module]} reads {others[0].name}, too"
        return conflicts


def _reader(model: nn.Module, name: str) -> nn.Module:
    """The module that gets the input of a quantized weight. Experts get that of their first weight, and make that of the other."""
    return input_module(model, name) if name.endswith(f".{DOWN_NAME}") else model.get_submodule(name.rpartition(".")[0])


def _run(
    model: nn.Module,
    ids: Tensor,
    modules: Iterable[nn.Module],
    *,
    held: Inputs | None = None,
    scales: Mapping[nn.Module, Tensor] | None = None,
) -> Inputs:
    """The inputs of modules in a forward. With `held` they compute with those instead; `scales` multiply outputs by channel."""
    seen: Inputs = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        positions, calls = float_positions(leaves), seen.setdefault(module, [])
        inputs = [leaves[position].clone() for position in positions]
        if held is not None and len(calls) < len(held.get(module, [])):
            for position, x in zip(positions, held[module][len(calls)], strict=True):
                # An expert gets other tokens where a router's output is scaled.
                leaves[position] = x.clone() if x.shape == leaves[position].shape else leaves[position]
        calls.append(inputs)
        return tree_unflatten(leaves, spec)

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        assert scales is not None
        is_scalable = isinstance(output, Tensor) and output.shape[-1:] == scales[module].shape
        return output * scales[module].to(output) if is_scalable else None

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(scale) for module in scales or ()]
    _forward(model, ids, handles)
    return {module: calls for module, calls in seen.items() if any(x.numel() for inputs in calls for x in inputs)}


def _forward(model: nn.Module, ids: Tensor, handles: Iterable[Any]) -> None:
    """Run the model once with some hooks, and remove them."""
    try:
        compute_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def _read(
    calls: Sequence[list[Tensor]], scaled_calls: Sequence[list[Tensor]], codes: ChannelCodes
) -> tuple[nn.Module, _Reading] | None:
    """The feeder that a module reads in all of its calls, and how; None where that is not one feeder in one way."""
    if len(calls) != len(scaled_calls):
        return None
    found: list[tuple[nn.Module, _Reading]] = []
    for inputs, scaled in zip(calls, scaled_calls, strict=True):
        if not any(x.numel() for x in inputs):
            continue
        changed = [position for position, (x, y) in enumerate(zip(inputs, scaled, strict=True)) if not torch.equal(x, y)]
        read = codes.find(inputs[changed[0]], scaled[changed[0]]) if len(changed) == 1 else None
        if read is None:
            return None
        found.append((read[0], _Reading(position=changed[0], channels=read[1])))
    feeder, first = found[0]
    for other, reading in found:
        if other is not feeder or reading.position != first.position or not torch.equal(reading.channels, first.channels):
            return None
    return found[0]


def _innermost_with_parameters(model: nn.Module) -> list[nn.Module]:
    """Modules that own parameters. A mixer that does so beside its linears is not among them: it passes its input on to those."""
    owners = dict.fromkeys(module for module in model.modules() if parameters_of(module))
    return [module for module in owners if not any(inner in owners for inner in module.modules() if inner is not module)]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has vectors of one size as parameters, and nothing else."""
    parameters = list(parameters_of(module).values())
    return all(parameter.ndim == 1 and parameter.shape == parameters[0].shape for parameter in parameters)


def _num_channels(feeder: nn.Module) -> int:
    return feeder.out_features if isinstance(feeder, nn.Linear) else next(iter(parameters_of(feeder).values())).numel()


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())
