"""Master weights on their way to a folder: checked against the model's config, scaled by group, and as they are served."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nvfp4_train.checkpoints import SavedTensors
from nvfp4_train.export.layout import HubLayout, shown
from nvfp4_train.kernels.fp4_kernel import nvfp4_block_amax, nvfp4_fake_quant, nvfp4_global_scale, nvfp4_quantize
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule
from nvfp4_train.quant.policy import sibling_set

MASTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS_AT_ONCE = 1 << 20
"""Quantizing in pieces of this size keeps its intermediate values, 20 bytes an element on the CPU, small next to a large matrix."""


def own_tensors(weights: Mapping[str, Tensor], layout: HubLayout) -> Mapping[str, Tensor]:
    """The tensors that the model writes, checked against its config by name, shape and dtype.

    Tensors of a checkpoint on disk are read when they are asked for, and here only where two of them are tied.
    """
    if missing := layout.shapes.keys() - weights.keys():
        raise ValueError(f"weights must hold every tensor of {layout.architecture}, missing: {shown(missing)}")
    if unknown := weights.keys() - layout.shapes.keys() - layout.aliases.keys():
        raise ValueError(f"weights must hold tensors of {layout.architecture} only, got unknown names: {shown(unknown)}")
    for name, shape in layout.shapes.items():
        described = weights.meta(name) if isinstance(weights, SavedTensors) else weights[name]
        if described.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)} of the config, got {tuple(described.shape)}")
        if name not in layout.buffers and described.dtype not in MASTER_DTYPES:
            raise ValueError(f"{name} must be a float master weight, got {described.dtype}")
    for name, source in layout.aliases.items():
        if name in weights and not _is_same(weights[name], weights[source]):
            raise ValueError(
                f"{name} and {source} are tied in the config but differ; set tie_word_embeddings=False to keep both"
            )
    return _OwnTensors(weights, layout)


def _is_same(alias: Tensor, source: Tensor) -> bool:
    # Tied tensors are normally one storage; a copy that went its own way would be lost. Both have to be alive while addresses are
    # compared: a tensor may be read from disk to where the last one was.
    return alias.data_ptr() == source.data_ptr() or alias.equal(source)


class _OwnTensors(Mapping[str, Tensor]):
    """Those tensors of `weights` that the model writes, each asked for when it is used."""

    def __init__(self, weights: Mapping[str, Tensor], layout: HubLayout) -> None:
        self._weights = weights
        self._names = layout.shapes

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_groups(groups: Sequence[Sequence[str]], layout: HubLayout) -> None:
    """Raise ValueError where a serving engine could not read the groups as quantized linears."""
    linears = layout.linears()
    group_of: dict[str, int] = {}
    for index, group in enumerate(groups):
        for name in group:
            if name not in linears:
                raise ValueError(f"groups: {name} is no nn.Linear of {layout.architecture}")
            if name in group_of:
                raise ValueError(f"groups: {name} is listed twice; a module is in exactly one group")
            if name.rpartition(".")[2] == "lm_head":
                raise ValueError(
                    f"groups: {name} must stay in bf16, since serving engines read no NVFP4 output embedding by default"
                )
            weight = f"{name}.weight"
            if weight in layout.aliases or weight in layout.aliases.values():
                raise ValueError(f"groups: the weight of {name} is tied to another module, so it has to stay in bf16")
            if linears[name] is None:
                raise ValueError(f"groups: the hub stores {weight} in another layout, so it has to stay in bf16")
            if (num_inputs := layout.shapes[weight][1]) % BLOCK_SIZE:
                raise ValueError(
                    f"groups: {name} has {num_inputs} inputs, no multiple of {BLOCK_SIZE}, so it has to stay in bf16"
                )
            group_of[name] = index
    if not group_of:
        raise ValueError("groups must name at least one module to quantize, got none")
    for name, index in group_of.items():
        for sibling in sibling_set(name):
            if sibling in linears and group_of.get(sibling) != index:
                state = "in another group" if sibling in group_of else "not quantized"
                raise ValueError(
                    f"groups: {name} is quantized but its sibling {sibling} is {state}; serving engines fuse siblings and keep "
                    "one global scale, so put them in one group"
                )


def group_scales(
    weights: Mapping[str, Tensor], groups: Sequence[Sequence[str]], layout: HubLayout, rule: ScaleRule
) -> dict[str, Tensor]:
    """s2 (one element, on the CPU) of each quantized weight by name. Reads every tensor once and refuses NaN and Inf."""
    scales = {}
    for group in groups:
        amaxes = []
        for name in (f"{member}.weight" for member in group):
            amaxes.append(nvfp4_block_amax(weights[name]).amax().cpu())
            refuse_unless(bool(amaxes[-1].isfinite()), name)
        if amaxes:
            s2 = nvfp4_global_scale(torch.stack(amaxes).amax(), rule)
            scales.update({f"{member}.weight": s2 for member in group})
    for name in weights:
        if name not in scales:
            refuse_unless(bool(to_served(name, weights[name], layout).isfinite().all()), name)
    return scales


def refuse_unless(is_finite: bool, name: str) -> None:
    """Raise ValueError with the name of a weight."""
    if not is_finite:
        raise ValueError(f"{name} holds NaN or Inf (in bf16), which is never written; nothing was exported")


def to_served(name: str, weight: Tensor, layout: HubLayout) -> Tensor:
    """An unquantized tensor in the dtype that is served."""
    return weight if name in layout.buffers else weight.to(torch.bfloat16)


class ServedWeights(Mapping[str, Tensor]):
    """What a reader of the folder has to compute with, by `state_dict` name: bf16, from masters by fake quantization.

    `weights` are those of `own_tensors`, `global_scales` is s2 by name of each quantized one, as `group_scales` finds it under rule.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layout: HubLayout,
        global_scales: Mapping[str, Tensor],
        rule: ScaleRule = MAX_RULE,
    ):
        self.weights = weights
        self.layout = layout
        self.global_scales = global_scales
        self.rule = rule

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        if name not in self.global_scales:
            return to_served(name, weight, self.layout)
        s2 = self.global_scales[name].to(weight.device)
        return torch.cat([nvfp4_fake_quant(rows, s2, torch.bfloat16, self.rule) for rows in _pieces(weight)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def packed(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K / 2] and block scales float8_e4m3fn [N, K / 16] of a quantized weight."""
        weight = self.weights[name]
        s2 = self.global_scales[name].to(weight.device)
        codes, scales = zip(*(nvfp4_quantize(rows, s2, self.rule) for rows in _pieces(weight)), strict=True)
        # As bytes: on CUDA, cat knows no float8 in some versions.
        return torch.cat(codes), torch.cat([part.view(torch.uint8) for part in scales]).view(scales[0].dtype)


def _pieces(weight: Tensor) -> Iterable[Tensor]:
    """The rows of a matrix, some at a time."""
    return weight.split(rows_at_once(weight.shape[1]))


def rows_at_once(num_columns: int) -> int:
    """How many rows of a matrix are quantized or decoded at a time, so that intermediate results stay small beside it."""
    return max(1, ELEMENTS_AT_ONCE // num_columns)
