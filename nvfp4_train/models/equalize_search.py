"""Refines the scales of equalization by what they are for: a small error of the products of quantized weights and inputs.

A channel's scale changes how the 16 weights of its block in every row are quantized, how the 16 inputs of its block are, and nothing
else. So blocks are refined independently, all at once, one channel of each after the other: coordinate descent over log2 s, by

    loss = mean_n d_n' H d_n + mean_x e_x' G e_x       d_n = Q(w_n s) / s - w_n,  H = mean_x x x'
                                                       e_x = s Q(x / s) - x,      G = mean_n w_n w_n'

over the weights w_n of the block in every row n and over its inputs x: the mean square of what errors of weights, and those of inputs,
add to an output of the layer. Q is the max rule for weights and the chain of serving engines for inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.models.fold_sites import FoldSite
from nvfp4_train.models.sharding import local_rows
from nvfp4_train.quant.calibration import InputStatistics, second_moments

MAX_LOG2 = 8
"""s lies between 2^-8 and 2^8. A channel that is nearly dead would have more, and its weights would drown those of their blocks."""
STEPS = (0.5, 0.25)
"""Steps of log2 s, one sweep after another."""
SWEEPS = 2
"""Sweeps over the channels of a block with each step."""
MAX_ROWS = 256
"""Rows of a group's weights, evenly spaced, whose errors are looked at."""
NUM_INPUTS = 256
"""Inputs of which errors are looked at. They are drawn from the normal distribution with the second moments that were measured."""
HEADROOM = 2.0
"""Of the inputs' scale, which hardly matters here."""


def refine(
    sites: Sequence[FoldSite],
    scales: Sequence[Tensor],
    groups: Mapping[str, Sequence[Tensor]],
    column_amax: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
    *,
    steps: Sequence[float] = STEPS,
) -> list[Tensor]:
    """Better scales by feeder channel, float32 on the CPU, for each site. Call it on every rank; all of them get the same.

    A site with a channel that is read at different places of blocks keeps its scales.

    Args:
        scales: Where the search begins.
        groups: The weights of every group that reads a site, whole or sharded, before anything is folded.
        column_amax: max_n |W_nj| of every group, over all ranks.
        statistics: Of the inputs of these groups, before anything is folded.
        steps: Of log2 s.
    """
    searches = [_Search(site, s, groups, column_amax, statistics) for site, s in zip(sites, scales, strict=True)]
    places = [(place, sign * step) for step in steps for _ in range(SWEEPS) for place in range(BLOCK_SIZE) for sign in (1, -1)]
    least = _losses(searches, [search.log2_s for search in searches])
    for place, step in places:
        tried = [search.moved(place, step) for search in searches]
        losses = _losses(searches, tried)
        for search, log2_s, before, after in zip(searches, tried, least, losses, strict=True):
            search.log2_s = torch.where((after < before).unsqueeze(1), log2_s, search.log2_s)
        least = [torch.minimum(before, after) for before, after in zip(least, losses, strict=True)]
    return [search.scales() for search in searches]


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A group of quantized weights that reads a site, block by block."""

    units: Tensor
    """The unit whose scales each block has, int64 [K / 16]."""
    weights: Tensor
    """Rows of this rank, float32 [n, K]."""
    column_amax: Tensor
    """Largest weights by column, of all rows of all ranks, float32 [K]."""
    inputs: Tensor
    """float32 [T, K]."""
    amax: Tensor
    """Largest inputs by channel, float32 [K]."""
    hessian: Tensor
    """H of each block, float64 [K / 16, 16, 16]."""
    gram: Tensor
    """G of each block, of one row on average over all ranks: float64 [K / 16, 16, 16]."""
    num_rows: float
    """Rows that all ranks look at."""

    def loss_of_weights(self, s: Tensor) -> Tensor:
        """Of each block, and one row on average over all ranks, this rank's part: float64 [K / 16]."""
        scaled = self.weights * s
        s2 = reference.global_scale((self.column_amax * s).amax())
        d = torch.ops.nvfp4.fake_quant(scaled, s2, torch.float32) / s - self.weights
        return (second_moments(d) * self.hessian).sum((1, 2)) / self.num_rows

    def loss_of_inputs(self, s: Tensor) -> Tensor:
        """Of each block, and one row on average: float64 [K / 16], the same on all ranks."""
        input_scale = reference.global_scale(HEADROOM * (self.amax / s).amax()).view(1)
        e = torch.ops.nvfp4.fake_quant_input(self.inputs / s, input_scale) * s - self.inputs
        return (second_moments(e) * self.gram).sum((1, 2)) / len(e)


class _Search:
    """The search at one site. A unit are 16 channels of the feeder that are a block wherever they are read."""

    def __init__(
        self,
        site: FoldSite,
        s: Tensor,
        groups: Mapping[str, Sequence[Tensor]],
        column_amax: Mapping[str, Tensor],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        self._s = s
        blocks = {group: channels.view(-1, BLOCK_SIZE) for group, channels in site.inputs.items()}
        self._units, index = torch.cat(list(blocks.values())).unique(dim=0, return_inverse=True)
        is_separable = self._units.unique().numel() == self._units.numel()
        parts = index.split([len(part) for part in blocks.values()])
        self._readers = [
            _reader(groups[group], column_amax[group], statistics[group], units)
            for group, units in zip(blocks, parts, strict=True)
            if is_separable
        ]
        device = groups[next(iter(blocks))][0].device
        self.log2_s = s[self._units].log2().to(device)
        """float32 [units, 16]."""
        is_alive = torch.zeros(site.num_channels, dtype=torch.bool)
        for group, channels in site.inputs.items():
            is_alive[channels] |= (statistics[group].rms.cpu() > 0) & (column_amax[group] > 0)
        self._is_alive = is_alive[self._units].to(device)

    def moved(self, place: int, step: float) -> Tensor:
        """log2 s with a step at one place of every unit, but in channels that are always 0."""
        log2_s = self.log2_s.clone()
        log2_s[:, place] += step * self._is_alive[:, place]
        return log2_s.clamp_(-MAX_LOG2, MAX_LOG2)

    def losses(self, log2_s: Tensor) -> Tensor:
        """Of every unit, this rank's part of that of weights, and that of inputs: float64 [2, units]."""
        losses = torch.zeros(2, len(log2_s), dtype=torch.float64, device=log2_s.device)
        for reader in self._readers:
            s = log2_s[reader.units].flatten().exp2()
            losses.index_add_(1, reader.units, torch.stack((reader.loss_of_weights(s), reader.loss_of_inputs(s))))
        return losses

    def scales(self) -> Tensor:
        """By feeder channel."""
        if not self._readers:
            return self._s
        s = self._s.clone()
        s[self._units] = self.log2_s.exp2().cpu()
        return s


def _reader(weights: Sequence[Tensor], column_amax: Tensor, statistics: InputStatistics, units: Tensor) -> _Reader:
    width, device = weights[0].shape[-1], local_rows(weights[0])[0].device
    stride = -(-sum(weight.numel() for weight in weights) // width // MAX_ROWS)
    some = []
    # Numbers of rows, of those in `some`, and G.
    sums = torch.zeros(2 + width * BLOCK_SIZE, dtype=torch.float64, device=device)
    for weight in weights:
        rows, first = local_rows(weight)
        first *= weight[0].numel() // width
        rows = rows.reshape(-1, width).float()
        # Every stride-th row of the whole weight, so that they do not depend on the number of ranks.
        some.append(rows[-first % stride :: stride])
        sums += torch.cat((sums.new_tensor([len(rows), len(some[-1])]), second_moments(rows).flatten()))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    num_rows, num_some = sums[:2].tolist()
    return _Reader(
        units=units.to(device),
        weights=torch.cat(some),
        column_amax=column_amax.float().to(device),
        num_rows=num_some,
        inputs=draw_inputs(statistics.hessian).to(device),
        amax=statistics.amax.to(device),
        hessian=statistics.hessian.double().to(device),
        gram=sums[2:].view(-1, BLOCK_SIZE, BLOCK_SIZE) / num_rows,
    )


def _losses(searches: Sequence[_Search], log2_s: Sequence[Tensor]) -> list[Tensor]:
    """The loss of every unit, float64 [units], for each search: the same on all ranks."""
    both = torch.cat([search.losses(tried) for search, tried in zip(searches, log2_s, strict=True)], 1)
    of_weights, of_inputs = both[0].contiguous(), both[1]
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(of_weights)
    return list((of_weights + of_inputs).split([len(tried) for tried in log2_s]))


def draw_inputs(hessian: Tensor) -> Tensor:
    """Inputs with the second moments H, float32 [NUM_INPUTS, K] on the CPU: the same numbers on every machine."""
    factor = torch.linalg.cholesky(hessian.double().cpu())
    normal = torch.randn(len(hessian), NUM_INPUTS, BLOCK_SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (normal @ factor.mT).transpose(0, 1).flatten(1).float()
