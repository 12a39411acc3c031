"""What the quantized weights get to see: statistics of their inputs, from one pass of forwards before quantization begins.

They are the same bits on any number of ranks, nearly always: what one call of a module adds is rounded to float32, and a float64 sum
of such numbers is exact, whatever their order, as long as their magnitudes are within 2^20 or so of one another.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.expert_inputs import closed_groups
from nvfp4_train.quant.experts import input_module, owner_of
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import sibling_set
from nvfp4_train.quant.undisturbed import undisturbed

Batch = Mapping[str, Tensor]

MIN_TOKENS = 256
"""Fewer tokens than this do not tell a 16 x 16 matrix of second moments from noise."""

DAMPING = 1e-6
"""Share of a group's mean square that is added to the diagonal of H. So H weighs errors equally where inputs are always 0."""

ROWS_AT_ONCE = 512
"""Tokens of which a float64 copy is made."""


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """The input x of a group of weights, as they receive it, over the calibration tokens. Experts of a layer have one for each of
    their two parameters, over the tokens of all experts.
    """

    hessian: Tensor
    """H_b, the mean of x_b x_b' of every block b of 16 channels, with a small damping: float32 [K / 16, 16, 16]."""
    amax: Tensor
    """Largest magnitude by channel, float32 [K]."""
    rms: Tensor
    """Root of the mean square by channel, float32 [K]; 0 in a channel that is always 0."""
    num_tokens: int
    """Tokens that were seen."""

    def divided_by(self, s: Tensor) -> "InputStatistics":
        """The statistics of x / s, for positive s, float32 [K]."""
        blocks = s.view(-1, BLOCK_SIZE)
        return InputStatistics(
            hessian=self.hessian / (blocks.unsqueeze(-1) * blocks.unsqueeze(-2)),
            amax=self.amax / s,
            rms=self.rms / s,
            num_tokens=self.num_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The outcome of a calibration."""

    statistics: dict[str, InputStatistics]
    """By the first parameter name of every group."""
    notes: list[str]
    """What a user should know: dead channels, groups that saw no token. One sentence each."""


# Autograd may use what is made here in later steps, so not inference_mode.
@torch.no_grad()
def calibrate(
    model: nn.Module,
    manifest: QuantManifest,
    batches: Iterable[tuple[Batch, bool]],
    run: Callable[[Batch], Any],
) -> Calibration:
    """Measure the input of every group of quantized weights. Call it on every rank, while the forward computes with masters.

    A group whose linears saw no token, as happens to an expert, takes the statistics of groups in its decoder layer with inputs of
    the same size: of those with its own last name if there are any.

    Args:
        model: Comes back as it was. Its masters may be sharded.
        manifest: The quantized weights. Linears of a group that are siblings have one input, of which the first is measured.
        batches: One sequence each, {"input_ids": int64 [1, T], ...}, and whether it counts. Ranks share the sequences. A forward of a
            sharded model is a collective, so a rank that has fewer of them runs others that do not count.
        run: One forward of the model on a batch.

    Raises:
        ValueError: Fewer than 256 tokens in all, an input that is not finite, always 0, or never seen.
    """
    sums = _InputSums(model, manifest)
    num_tokens = 0
    with undisturbed(model), sums.recording():
        for batch, is_counted in batches:
            sums.is_counting = is_counted
            num_tokens += batch["input_ids"].numel() if is_counted else 0
            run(batch)
    num_tokens = sums.add_up_over_ranks(num_tokens)
    check_num_tokens(num_tokens)
    sums.check_finite()
    statistics: dict[str, InputStatistics] = {}
    notes = list(sums.notes)
    for group in sums.groups:
        donors = sums.donors(group)
        statistics[group] = sums.statistics(donors)
        if donors != [group]:
            more = f" and {len(donors) - 1} more" if len(donors) > 1 else ""
            notes.append(f"{owner_of(group)} saw no calibration token: it takes the statistics of {owner_of(donors[0])}{more}")
        elif (dead := _num_dead(group, statistics[group])) > 0:
            width = len(statistics[group].rms)
            notes.append(f"{owner_of(group)} has {dead} dead input channels of {width}: they were 0 in every calibration token")
    return Calibration(statistics=statistics, notes=notes)


def check_num_tokens(num_tokens: int) -> None:
    """Raise ValueError where so many tokens, of all ranks, are too few to calibrate with."""
    if num_tokens < MIN_TOKENS:
        raise ValueError(
            f"calibration must see at least {MIN_TOKENS} tokens, got {num_tokens}; raise quant.calibration.sequences or data.seq_len"
        )


class _InputSums:
    """Sums over the inputs of all groups, each by the group's first parameter, and the hooks that add to them."""

    def __init__(self, model: nn.Module, manifest: QuantManifest) -> None:
        closed = closed_groups(model, manifest)
        groups = [group for group in manifest.groups if group[0] not in closed]
        self.groups = [group[0] for group in groups]
        self.notes = [f"{owner_of(name)} computes in a way of its own, so its input was not measured" for name in closed]
        widths = [model.get_parameter(group).shape[-1] for group in self.groups]
        device = next(model.parameters()).device
        # Second moments, the tokens of every group, and those of all batches: one tensor, so that one collective adds them up.
        sizes = [*(width * BLOCK_SIZE for width in widths), len(widths), 1]
        self._all = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        *moments, tokens, self._all_tokens = self._all.split(sizes)
        self._moments = {g: part.view(-1, BLOCK_SIZE, BLOCK_SIZE) for g, part in zip(self.groups, moments, strict=True)}
        self._tokens = dict(zip(self.groups, tokens, strict=True))
        self._all_amax = torch.zeros(sum(widths), device=device)
        self._amax = dict(zip(self.groups, self._all_amax.split(widths), strict=True))
        self._num_tokens: dict[str, int] = {}
        self._modules = [(input_module(model, name), group[0]) for group in groups for name in _with_own_input(group)]
        self.is_counting = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Add every input to the sums inside the context, while `is_counting`."""
        handles = [m.register_forward_pre_hook(partial(self._add, group), with_kwargs=True) for m, group in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, group: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if not self.is_counting or not x.numel():
            return
        x = x.detach().reshape(-1, x.shape[-1])
        self._moments[group] += _second_moments(x).float()
        self._tokens[group] += len(x)
        torch.maximum(self._amax[group], x.abs().amax(0).float(), out=self._amax[group])

    def add_up_over_ranks(self, num_tokens: int) -> int:
        """Afterwards the sums are those of all ranks. Returns how many tokens all of them counted."""
        self._all_tokens += num_tokens
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._all)
            distributed.all_reduce(self._all_amax, distributed.ReduceOp.MAX)
        counts = torch.stack([*self._tokens.values(), self._all_tokens[0]]).long().tolist()
        self._num_tokens = dict(zip(self.groups, counts, strict=False))
        return counts[-1]

    def check_finite(self) -> None:
        # By the sums, because a maximum over ranks may lose a NaN.
        is_finite = torch.stack([moments.isfinite().all() for moments in self._moments.values()]).tolist()
        for group, finite in zip(self.groups, is_finite, strict=True):
            if not finite:
                raise ValueError(
                    f"{owner_of(group)} must have a finite input to be calibrated, got NaN, Inf or values above 1e18; see model.path"
                )

    def donors(self, group: str) -> list[str]:
        """The groups whose statistics a group takes: its own, unless it saw no token."""
        if self._num_tokens[group]:
            return [group]
        shape, layer = self._moments[group].shape, _layer(group)
        of_layer = [g for g in self.groups if self._num_tokens[g] and self._moments[g].shape == shape and _layer(g) == layer]
        if not of_layer:
            raise ValueError(
                f"calibration must reach every quantized weight, but {owner_of(group)} saw no token, nor has its layer another input "
                "of its size; raise quant.calibration.sequences, or leave it out with quant.exclude"
            )
        return [g for g in of_layer if _leaf(g) == _leaf(group)] or of_layer

    def statistics(self, groups: Sequence[str]) -> InputStatistics:
        """Over the tokens of some groups."""
        num_tokens = sum(self._num_tokens[group] for group in groups)
        hessian = torch.stack([self._moments[group] for group in groups]).sum(0) / num_tokens
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        squares = diagonal.flatten()
        diagonal += DAMPING * squares.mean()
        return InputStatistics(
            hessian=hessian.float(),
            amax=torch.stack([self._amax[group] for group in groups]).amax(0),
            rms=squares.sqrt().float(),
            num_tokens=num_tokens,
        )


def _num_dead(group: str, statistics: InputStatistics) -> int:
    num_dead, width = int((statistics.rms == 0).sum()), len(statistics.rms)
    if num_dead == width:
        raise ValueError(
            f"{owner_of(group)} must have an input to be calibrated, got 0 in all {width} channels of {statistics.num_tokens} tokens; "
            "see model.path, or leave it out with quant.exclude"
        )
    return num_dead


def _second_moments(x: Tensor) -> Tensor:
    """Sum of x_b x_b' over the rows of x [T, K]: float64 [K / 16, 16, 16].

    In float64, because products of float32 matrices have as many bits as `torch.set_float32_matmul_precision` says.
    """
    num_blocks = x.shape[-1] // BLOCK_SIZE
    total = torch.zeros(num_blocks, BLOCK_SIZE, BLOCK_SIZE, dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS_AT_ONCE):
        blocks = rows.double().view(-1, num_blocks, BLOCK_SIZE).transpose(0, 1)
        total.baddbmm_(blocks.mT, blocks)
    return total


def _with_own_input(group: Iterable[str]) -> list[str]:
    """Of every set of siblings in a group the first. A group has several sets where their modules share parameters."""
    first: dict[tuple[str, ...], str] = {}
    for name in group:
        first.setdefault(sibling_set(owner_of(name)), name)
    return list(first.values())


def _leaf(parameter: str) -> str:
    return owner_of(parameter).rpartition(".")[2]


def _layer(parameter: str) -> str:
    """The name up to its first number; the whole model where it has none."""
    parts = parameter.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1])
