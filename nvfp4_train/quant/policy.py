"""Which weights are quantized, and which of them share one global scale.

A policy is a list of name patterns over the model's `nn.Linear` modules and the parameters of its experts. The output embedding,
routers and gates, weights shared with an embedding and weights whose input dimension is no multiple of 16 stay in bf16 and are
reported with the reason.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.quant.experts import ExpertWeight, find_experts
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.roles import Roles

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Modules of one parent that serving engines fuse into one matrix with one global scale."""

SERVINGS = {"w4a16": "none", "w4a4": "nvfp4"}
"""How an exported model may be served: the name of a serving -> what it does to the inputs of quantized weights."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """The pass over training data that measures the inputs of quantized weights, before quantization begins."""

    sequences: int = 64
    """Sequences of data.seq_len tokens, over all ranks. 0 goes without calibration, and so without all that needs one."""

    def __post_init__(self) -> None:
        if self.sequences < 0:
            raise ValueError(f"quant.calibration.sequences must be at least 0, got {self.sequences}")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What is quantized, how, and from when on."""

    enabled: bool = True
    """False trains the same code without fake quantization: the baseline of every comparison."""
    include: Sequence[str] = ("*",)
    """Shell patterns over full names of linears and of experts' parameters; what matches one is quantized."""
    exclude: Sequence[str] = ()
    """Shell patterns over full names of what stays in bf16."""
    global_scale: str = "pow2"
    """`pow2` raises the global scale to a power of two, so that every reader decodes the same bits; `exact` is the quotient."""
    rule: str = "max"
    """How the scale of a block is chosen: a name in `kernels.scale_rules.BLOCK_SCALE_RULES`."""
    refit_every: int = 10
    """Optimizer steps from one choice of a fitted rule (`hessian`) to the next; in between each block keeps its choice."""
    calibration: CalibrationConfig = CalibrationConfig()
    equalize: float | str | None = 0.5
    """Exponent alpha, 0 to 1, of the equalization that is folded into the model before quantization begins; `none` leaves it out."""
    equalize_pow2: bool = False
    """Round the scales of the equalization to powers of two: the folded model computes the bits of the original. Costs accuracy."""
    activations: str = "none"
    """`nvfp4` trains with quantized inputs of quantized weights (W4A4), `none` with weights alone (W4A16)."""
    serve: str | None = None
    """What the export is for: `w4a16` or `w4a4`; None is what was trained."""
    input_headroom: float = 2.0
    """A static input scale leaves room for this many times the largest input that calibration saw."""
    start_step: int = 0
    """Optimizer step from which on the forward computes with quantized weights."""
    gather: str = "packed"
    """How the weights of a sharded model travel: `packed` codes and scales, 0.5625 byte a weight, or decoded `bf16`, 2 bytes."""

    def __post_init__(self) -> None:
        self.scale_rule  # noqa: B018 (raises)
        if self.gather not in ("packed", "bf16"):
            raise ValueError(f"quant.gather must be 'packed' or 'bf16', got {self.gather!r}")
        if self.start_step < 0:
            raise ValueError(f"quant.start_step must be at least 0, got {self.start_step}")
        if self.refit_every < 1:
            raise ValueError(f"quant.refit_every must be at least 1, got {self.refit_every}")
        if self.activations not in SERVINGS.values():
            raise ValueError(f"quant.activations must be 'none' or 'nvfp4', got {self.activations!r}")
        if self.serve not in (None, *SERVINGS):
            raise ValueError(f"quant.serve must be 'w4a16', 'w4a4' or null, got {self.serve!r}")
        if not 1 <= self.input_headroom <= 256:
            raise ValueError(f"quant.input_headroom must lie in 1 to 256, got {self.input_headroom}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"quant.equalize must be none, or an exponent from 0 to 1, got {self.equalize!r}")
        for option, needs in (
            ("rule", self.scale_rule.is_fitted),
            ("equalize", self.alpha is not None),
            ("activations", self.activations != "none"),
            ("serve", self.serve == "w4a4"),
        ):
            if needs and not self.calibration.sequences:
                raise ValueError(
                    f"quant.calibration.sequences must be at least 1 with quant.{option}={getattr(self, option)}, got 0"
                )
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"quant.{name} must be a list of patterns, got the string {getattr(self, name)!r}")

    @property
    def scale_rule(self) -> ScaleRule:
        return ScaleRule(global_scale=self.global_scale, block_scale=self.rule)

    @property
    def alpha(self) -> float | None:
        """The exponent of the equalization; None without one."""
        if self.equalize is None or self.equalize == "none":
            return None
        if isinstance(self.equalize, str):
            raise ValueError(f"quant.equalize must be none, or an exponent from 0 to 1, got {self.equalize!r}")
        return float(self.equalize)

    @property
    def serving(self) -> str:
        """The serving that the export is for, a name in `SERVINGS`."""
        return self.serve or self.trained_serving

    @property
    def trained_serving(self) -> str:
        """The serving that the training forward computes."""
        return next(name for name, activations in SERVINGS.items() if activations == self.activations)

    @property
    def needs_input_scales(self) -> bool:
        """Whether inputs of quantized weights are quantized, in training or as it is served."""
        return "nvfp4" in (self.activations, SERVINGS[self.serving])

    @property
    def measures_inputs(self) -> bool:
        """Whether a weight cannot be quantized before its inputs have been measured."""
        return self.needs_input_scales or self.scale_rule.is_fitted


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The outcome of a policy on one model."""

    manifest: QuantManifest
    kept: dict[str, str]
    """Linears and parameters of experts that stay in bf16, by name, with the reason."""


class Layout(Protocol):
    """What a folder of the model can hold: `models.layout.HubLayout`. A protocol, because `models` imports `quant`."""

    def reason_to_keep(self, name: str) -> str | None:
        """Why no folder can hold a parameter in NVFP4; None where one can."""


@dataclass(frozen=True, kw_only=True)
class Quantizable:
    """What has a weight that may be quantized: the `nn.Linear` modules of a model, and its expert parameters, by name."""

    linears: dict[str, nn.Linear]
    experts: dict[str, ExpertWeight]

    @classmethod
    def of(cls, model: nn.Module) -> "Quantizable":
        return cls(
            linears={name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)},
            experts=find_experts(model),
        )

    @property
    def names(self) -> list[str]:
        """Names as `Selection.kept` and the patterns of a policy have them."""
        return [*self.linears, *self.experts]

    def parameter_name(self, name: str) -> str:
        return name if name in self.experts else f"{name}.weight".removeprefix(".")


def unfit(model: nn.Module, layout: Layout | None) -> dict[str, str]:
    """Everything `Quantizable` that no option can quantize, with the reason. The policy and the export both follow this rule."""
    found = Quantizable.of(model)
    get_output_embedding = getattr(model, "get_output_embeddings", None)
    output_embedding = get_output_embedding() if callable(get_output_embedding) else None
    embedding_weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    reasons: dict[str, str] = {}
    for name, module in found.linears.items():
        if module is output_embedding or name.rpartition(".")[2] == "lm_head":
            reasons[name] = "output embedding"
        elif id(module.weight) in embedding_weights:
            reasons[name] = "shares its weight with an embedding"
        elif layout is not None and (reason := layout.reason_to_keep(f"{name}.weight")):
            reasons[name] = reason
        elif module.in_features % BLOCK_SIZE:
            reasons[name] = f"{module.in_features} inputs are no multiple of {BLOCK_SIZE}"
        elif type(module) is not nn.Linear:
            reasons[name] = f"a {type(module).__name__} computes in its own way"
    for name, weight in found.experts.items():
        if layout is not None and (reason := layout.reason_to_keep(name)):
            reasons[name] = reason
        elif weight.num_inputs % BLOCK_SIZE:
            reasons[name] = f"{weight.num_inputs} inputs are no multiple of {BLOCK_SIZE}"
    for name, weight in found.experts.items():
        if name not in reasons and weight.partner in reasons:
            reasons[name] = f"serving engines take all weights of an expert or none, and {weight.partner} is none"
    return reasons


def select(model: nn.Module, config: QuantConfig, layout: Layout | None = None) -> Selection:
    """Apply the policy to a Hugging Face causal LM, before any module of it is replaced.

    Without a `layout` weights may be selected that no export can write.

    Raises ValueError where a pattern matches nothing, nothing is left to quantize, or only some of a set of siblings or of the weights
    of experts are selected (serving engines take all of them for quantized, or none).
    """
    found = Quantizable.of(model)
    if not found.names:
        raise ValueError(
            f"a model to quantize must have an nn.Linear, got {type(model).__name__} with none{_conv1d_reason(model)}"
        )
    for option in ("include", "exclude"):
        for pattern in getattr(config, option):
            if not any(fnmatchcase(name, pattern) for name in found.names):
                examples = ", ".join(found.names[:3])
                raise ValueError(
                    f"quant.{option}: pattern {pattern!r} matches no nn.Linear and no experts of the model; names look like {examples}"
                )

    kept = unfit(model, layout)
    roles = Roles(model, found.experts)
    chosen: list[str] = []
    for name in found.names:
        if name in kept:
            continue
        if name in found.linears and (role := roles.role_of(name, found.linears[name])):
            kept[name] = role
        elif name in found.experts and config.measures_inputs and not found.experts[name].can_open_inputs:
            kept[name] = (
                f"inputs of {type(found.experts[name].module).__name__} cannot be measured, as hessian and W4A4 need it"
            )
        elif not any(fnmatchcase(name, pattern) for pattern in config.include):
            kept[name] = "not in quant.include"
        elif any(fnmatchcase(name, pattern) for pattern in config.exclude):
            kept[name] = "in quant.exclude"
        else:
            chosen.append(name)
    if not chosen:
        reasons = ", ".join(f"{names} ({reason})" for reason, names in _by_reason(kept).items())
        raise ValueError(
            f"the policy selects no weight of this model, all are kept in bf16: {reasons}{_conv1d_reason(model)}; see quant.include"
        )
    groups = tuple(tuple(found.parameter_name(name) for name in group) for group in _groups(chosen, found))
    manifest = QuantManifest(groups=groups, rule=config.scale_rule, activations=SERVINGS[config.serving])
    return Selection(manifest=manifest, kept=kept)


def _conv1d_reason(model: nn.Module) -> str:
    """Why nothing of a model of transformers' Conv1D can be quantized; nothing of other models."""
    transposed = [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    if not transposed:
        return ""
    return (
        f"; {transposed[0]} and all {len(transposed)} layers of its kind are transformers.pytorch_utils.Conv1D, which keeps a weight "
        "as [in, out], and no reader of packed folders loads it"
    )


def sibling_set(name: str) -> tuple[str, ...]:
    """Names of a module and its siblings, by `SIBLINGS`; only its own where it has none."""
    parent, dot, leaf = name.rpartition(".")
    for leaves in SIBLINGS:
        if leaf in leaves:
            return tuple(parent + dot + sibling for sibling in leaves)
    return (name,)


def _groups(chosen: Sequence[str], found: Quantizable) -> tuple[tuple[str, ...], ...]:
    """Join siblings, and modules that share one parameter, into groups in the order of the model."""
    group_of: dict[str, list[str]] = {name: [name] for name in chosen}
    by_parameter: dict[int, str] = {}
    for name in chosen:
        if name in found.experts:
            together = [name, found.experts[name].partner]
            others = [name]
        else:
            together = [sibling for sibling in sibling_set(name) if sibling in found.linears]
            others = [*together, by_parameter.setdefault(id(found.linears[name].weight), name)]
        missing = [sibling for sibling in together if sibling not in group_of]
        if missing:
            raise ValueError(
                f"{name} would be quantized but its sibling {missing[0]} would not; serving engines fuse {', '.join(together)}: "
                "select all or none of them with quant.include and quant.exclude"
            )
        for other in others:
            if group_of[other] is not group_of[name]:
                merged = group_of[name] + group_of[other]
                for member in merged:
                    group_of[member] = merged
    unique = {id(group): group for group in group_of.values()}
    return tuple(tuple(sorted(group, key=chosen.index)) for group in unique.values())


def _other_matrices_by_class(model: nn.Module, quantized: Collection[int]) -> dict[str, list[str]]:
    """Names of parameters of at least two dimensions that are in no linear, embedding or convolution, and are not quantized."""
    found: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1 and id(parameter) not in quantized:
                found.setdefault(type(module).__name__, []).append(f"{prefix}.{leaf}".removeprefix("."))
    return found


def _by_reason(kept: Mapping[str, str]) -> dict[str, str]:
    """The first few names for each reason."""
    listed = {}
    for reason in dict.fromkeys(kept.values()):
        names = [name for name, why in kept.items() if why == reason]
        listed[reason] = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return listed


def selection_table(model: nn.Module, selection: Selection) -> str:
    """A printable table: what is quantized, what is not and why, sibling groups, bits per weight of the whole model."""
    manifest, parameters = selection.manifest, dict(model.named_parameters(remove_duplicate=False))
    quantized = {id(parameters[name]): parameters[name].numel() for name in manifest.names}
    total = sum(parameter.numel() for parameter in model.parameters())
    num_quantized = sum(quantized.values())
    # 4 bits of code and 8 / 16 bits of scale for a quantized weight, bf16 for the rest.
    bits = (4.5 * num_quantized + 16 * (total - num_quantized)) / total
    # One for a matrix and its siblings. The gate and the up matrix of an expert are one parameter.
    num_scales = sum(parameters[group[0]].shape[0] if parameters[group[0]].dim() == 3 else 1 for group in manifest.groups)
    shared = sum(len(group) > 1 for group in manifest.groups)
    experts = [name for name in manifest.names if parameters[name].dim() == 3]
    rows = [
        ("quantized linears", f"{len(manifest.names) - len(experts)}"),
        *([("quantized parameters of experts", f"{len(experts)}, of 3 dimensions")] if experts else []),
        ("parameters in NVFP4", f"{num_quantized:,} of {total:,} ({num_quantized / total:.1%})"),
        ("parameters in bf16", f"{total - num_quantized:,}"),
        ("global scales", f"{num_scales}, {shared} of them shared by siblings"),
        ("bits per weight", f"{bits:.3f}"),
    ]
    rows += [(f"in bf16: {reason}", names) for reason, names in _by_reason(selection.kept).items()]
    for kind, names in _other_matrices_by_class(model, quantized).items():
        rows.append((f"in bf16: matrices of {kind}", f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)
