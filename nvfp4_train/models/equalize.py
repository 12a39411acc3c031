"""Moves the spread of activations over channels into the weights that read them, and leaves nothing to compute at serving.

SmoothQuant's identity (Xiao et al., 2023), folded: a channel j of the input of quantized weights W is divided by s_j, in the
parameters of what feeds it, and column j of every weight that reads it is multiplied by s_j. With s_j = rms(x_j)^alpha /
max_n |W_nj|^(1 - alpha), over its geometric mean, neither x nor W has channels that are much larger than others. What the unquantized
model computes changes by roundings alone and, if every s is rounded to a power of two, by no bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn

from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.models.channel_codes import power_of_two
from nvfp4_train.models.fold_axes import Axis, along
from nvfp4_train.models.fold_sites import FoldSite, find_sites, kind_of
from nvfp4_train.models.sharding import local_rows
from nvfp4_train.quant.calibration import InputStatistics
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.undisturbed import reshard, undisturbed

MAX_LOG2 = 8
"""s lies between 2^-8 and 2^8. A channel that is nearly dead would have more, and its weights would drown those of their blocks."""

STATE_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
"""The power of the gradient that a state of Adam is an average of. A parameter times c has the gradient over c."""


@dataclass(frozen=True, kw_only=True)
class Equalized:
    """What was folded."""

    statistics: dict[str, InputStatistics]
    """Of the inputs as they are now, by the first parameter name of every group."""
    folded: list[str]
    """Names of the norms and linears whose outputs were scaled."""
    skipped: dict[str, str]
    """Norms and linears, or quantized linears without one of them to scale, by module name, with the reason."""


@torch.no_grad()
def equalize(
    model: nn.Module,
    manifest: QuantManifest,
    statistics: Mapping[str, InputStatistics],
    alpha: float,
    input_ids: Tensor,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    round_to_pow2: bool = False,
) -> Equalized:
    """Fold equalization into a causal LM, in place: on one device, replicated, or sharded by FSDP2. Call it on every rank.

    Which parameters a channel runs through is found on the model itself, and proven: with every site scaled by random powers of two
    the logits are the same bits, or the sites to blame are skipped. A norm that computes with 1 + weight rounds its new weight to
    bf16 when it is served; all else is exact with `round_to_pow2`.

    Args:
        model: Computes with masters meanwhile (`WeightStore.masters_only`); update the store afterwards.
        statistics: Of the input of every group, from `calibrate`, on any device.
        alpha: How much of the spread of activations moves into the weights, between 0 and 1: `quant.equalize`.
        input_ids: Any tokens, int64 [1, T], 16 to 64 of them, the same on every rank.
        optimizer: Its averages of gradients (Adam's) are scaled as the gradients of the folded model are.
        round_to_pow2: Round every s to a power of two.

    Raises:
        ValueError: alpha is outside of 0 to 1, or the optimizer has a state that is no average of Adam's.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"quant.equalize must be none or lie between 0 and 1, got {alpha}")
    with undisturbed(model):
        sites, skipped = find_sites(model, manifest, input_ids)
        wrong = _Proof(model, input_ids).wrong_sites(sites)
    skipped |= {site.name: "scaling it changes the logits, so something else depends on its output, too" for site in wrong}
    sites = [site for site in sites if site not in wrong]
    if optimizer is not None:
        _check_states(sites, optimizer)

    groups = {group[0]: [model.get_parameter(name) for name in group] for group in manifest.groups}
    # Before any fold: rows that one site scales are in the columns of another, whose scales would follow them.
    column_amax = _column_amax({group: groups[group] for site in sites for group in site.inputs})
    scales = [_scales(site, statistics, column_amax, alpha, round_to_pow2) for site in sites]
    equalized = dict(statistics)
    for site, s in zip(sites, scales, strict=True):
        _fold(site, s, optimizer)
        for group, channels in site.inputs.items():
            equalized[group] = equalized[group].divided_by(s[channels].to(statistics[group].rms.device))
    return Equalized(statistics=equalized, folded=[site.name for site in sites], skipped=skipped)


def _column_amax(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """max_n |W_nj| over all weights of a group and over all ranks, which may have a part of the rows each: float64 [K] on the CPU."""
    if not groups:
        return {}
    amax = {
        group: torch.stack([_amax(local_rows(weight)[0]) for weight in weights]).amax(0) for group, weights in groups.items()
    }
    flat = torch.cat(list(amax.values()))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(flat, distributed.ReduceOp.MAX)
    parts = flat.cpu().double().split([len(part) for part in amax.values()])
    return dict(zip(amax, parts, strict=True))


def _amax(rows: Tensor) -> Tensor:
    """By column, float32 [K], over the rows of one matrix or of all experts; also of none."""
    rows = rows.flatten(0, -2)
    return rows.abs().amax(0).float() if len(rows) else torch.zeros(rows.shape[1], device=rows.device)


def _scales(
    site: FoldSite,
    statistics: Mapping[str, InputStatistics],
    column_amax: Mapping[str, Tensor],
    alpha: float,
    round_to_pow2: bool,
) -> Tensor:
    """s by channel of the feeder, float32 on the CPU; 1 where no quantized weight reads a channel, or only zeros meet there.

    A channel may be read by several weights, and at several of their columns (query heads share the channels of a value head): its
    rms is over all of that, and its largest weight is the largest of all.
    """
    squares, tokens, amax = torch.zeros(3, site.num_channels, dtype=torch.float64)
    for group, channels in site.inputs.items():
        of_group = statistics[group]
        squares.index_add_(0, channels, of_group.rms.cpu().double().square() * of_group.num_tokens)
        tokens.index_add_(0, channels, torch.full(channels.shape, of_group.num_tokens, dtype=torch.float64))
        amax.scatter_reduce_(0, channels, column_amax[group], "amax")
    is_alive = (squares > 0) & (amax > 0)
    log2 = alpha * (squares / tokens).sqrt()[is_alive].log2() - (1 - alpha) * amax[is_alive].log2()
    # Over the geometric mean, so that neither activations nor weights grow as a whole.
    log2 = (log2 - log2.mean()).clamp(-MAX_LOG2, MAX_LOG2)
    s = torch.ones(site.num_channels)
    s[is_alive] = power_of_two(log2.round().long()) if round_to_pow2 else log2.exp2().float()
    return s


def _fold(site: FoldSite, s: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Divide the feeder's parameters by s, float32 [channels], and multiply those of its readers."""
    scaled: set[tuple[int, int]] = set()
    for axes, factors in ((site.outputs, 1 / s), (site.readers, s)):
        for axis in axes:
            # Modules may share a parameter.
            if (key := (id(axis.parameter), axis.dim)) not in scaled:
                scaled.add(key)
                _scale(axis, factors, optimizer)


def _scale(axis: Axis, factors: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    parameter = axis.parameter
    rows, first = local_rows(parameter)
    of_rows = factors[axis.channels]
    of_rows = along(of_rows[first : first + len(rows)] if axis.dim == 0 else of_rows, axis.dim, rows)
    if axis.offset:
        rows.add_(axis.offset).mul_(of_rows).sub_(axis.offset)
    else:
        rows.mul_(of_rows)
    for name, state in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
        if name in STATE_POWERS:
            local_rows(state)[0].div_(of_rows ** STATE_POWERS[name])


def _check_states(sites: Sequence[FoldSite], optimizer: torch.optim.Optimizer) -> None:
    for axis in (axis for site in sites for axis in (*site.outputs, *site.readers)):
        for name, state in optimizer.state.get(axis.parameter, {}).items():
            if isinstance(state, Tensor) and state.shape == axis.parameter.shape and name not in STATE_POWERS:
                raise ValueError(
                    f"quant.equalize can scale an optimizer's {', '.join(STATE_POWERS)}, got a state {name} of "
                    f"{type(optimizer).__name__}; switch quantization on before the first step, or set quant.equalize=none"
                )


class _Proof:
    """Compares logits before and after a fold with random powers of two, which changes no bit if it is right."""

    def __init__(self, model: nn.Module, input_ids: Tensor) -> None:
        self._model, self._input_ids = model, input_ids
        self._expected = self._logits()
        # 0 with deterministic kernels.
        self._noise = _largest_difference(self._logits(), self._expected)
        self._generator = torch.Generator().manual_seed(0)

    def wrong_sites(self, sites: Sequence[FoldSite]) -> list[FoldSite]:
        """The sites to leave out, so that the rest is right together."""
        wrong = self._wrong_among(sites)
        rest = [site for site in sites if site not in wrong]
        return wrong if not wrong or self._is_right(rest) else list(sites)

    def _wrong_among(self, sites: Sequence[FoldSite]) -> list[FoldSite]:
        if self._is_right(sites):
            return []
        kinds: dict[str, list[FoldSite]] = {}
        for site in sites:
            kinds.setdefault(kind_of(site.name), []).append(site)
        if len(kinds) == 1:
            return self._wrong_of_kind(sites)
        return [site for of_kind in kinds.values() for site in self._wrong_among(of_kind)]

    def _wrong_of_kind(self, sites: Sequence[FoldSite]) -> list[FoldSite]:
        """The one site that is wrong, or all where it is not one alone: then the kind is."""
        halves = sites[: len(sites) // 2], sites[len(sites) // 2 :]
        wrong = [half for half in halves if not self._is_right(half)]
        return self._wrong_of_kind(wrong[0]) if len(sites) > 1 and len(wrong) == 1 else list(sites)

    def _is_right(self, sites: Sequence[FoldSite]) -> bool:
        """The same on all ranks."""
        scales = [self._random(site) for site in sites]
        with _folded(sites, scales):
            difference = _largest_difference(self._logits(), self._expected)
        # Not by >, which is false for NaN.
        is_wrong = ~(difference <= 4 * self._noise)
        if distributed.is_available() and distributed.is_initialized():
            is_wrong = is_wrong.int()
            distributed.all_reduce(is_wrong, distributed.ReduceOp.MAX)
        return not is_wrong

    def _random(self, site: FoldSite) -> Tensor:
        """Powers of two for the channels that are read."""
        s = torch.ones(site.num_channels)
        for axis in site.readers:
            s[axis.channels] = power_of_two(torch.randint(0, 5, axis.channels.shape, generator=self._generator))
        return s

    def _logits(self) -> Tensor:
        logits = compute_logits(self._model, self._input_ids)
        reshard(self._model)
        return logits


@contextmanager
def _folded(sites: Sequence[FoldSite], scales: Sequence[Tensor]) -> Iterator[None]:
    """Sites folded with some powers of two, and unfolded afterwards, which is exact for all but subnormal numbers.

    The output of a norm with 1 + weight is divided itself, because its new weight would be rounded.
    """
    handles = []
    for site, s in zip(sites, scales, strict=True):
        if site.is_exact:
            _fold(site, s)
        else:
            _fold(replace(site, outputs=[]), s)
            handles.append(site.feeder.register_forward_hook(lambda module, args, x, s=s: x / s.to(x)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for site, s in zip(sites, scales, strict=True):
            _fold(site if site.is_exact else replace(site, outputs=[]), 1 / s)


def _largest_difference(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().masked_fill(x == y, 0.0).max()
