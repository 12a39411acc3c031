"""Statistics of the inputs of quantized weights, which forwards alone show."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_train.kernels.reference import E4M3_MAX
from nvfp4_train.quant.inputs import InputQuantizers, inputs_watched
from nvfp4_train.quant.local_weight import LocalWeight
from nvfp4_train.quant.statistics import Statistic


class InputClipping(Statistic):
    """The share of an input's blocks whose amax / 6, in units of the input scale, exceeds 448: their largest values saturate.

    It is of the first `tokens` tokens of the last batch of every rank, in a forward of their own without a gradient; of an expert's
    input, of the tokens that were sent to it. Such a forward takes longer than all other statistics together, so one is made at the
    first look and at every `every`-th from there on. Other looks have no such share, and neither has a model without quantized inputs.
    """

    names = ("input_clipped_share",)

    def __init__(self, *, tokens: int = 256, every: int = 5) -> None:
        if tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {tokens}; null the statistic to turn it off")
        if every < 1:
            raise ValueError(f"every must be at least 1, which measures at each look, got {every}")
        self.tokens = tokens
        self.every = every
        self._num_looks = 0
        self._counts: dict[str, Tensor] = {}
        """Clipped blocks and all blocks, float64 [2], by parameter."""

    def is_due(self) -> bool:
        """Whether the look that begins measures inputs. Call it once a look, on every rank."""
        self._num_looks += 1
        self._counts = {}
        return (self._num_looks - 1) % self.every == 0

    @torch.no_grad()
    def measure(self, model: nn.Module, quantizers: InputQuantizers, run: Callable[[], Any]) -> None:
        """Count in the inputs of the forwards that `run` makes. Under FSDP2 call it on every rank. Waits for nothing."""
        found: dict[str, Tensor] = {}

        def count(group: str, x: Tensor, scale: Tensor) -> None:
            # g * (amax * fp32(1 / 6)), as `reference.quantize_input` has it before it rounds.
            ratio = scale.reciprocal() * (torch.ops.nvfp4.block_amax(x) * (1 / 6))
            num_clipped = (ratio > E4M3_MAX).sum(dtype=torch.float64)
            counts = torch.stack((num_clipped, torch.full_like(num_clipped, ratio.numel())))
            found[group] = found[group] + counts if group in found else counts

        with inputs_watched(model, quantizers, count):
            run()
        self._counts = {name: found[group[0]] for group in quantizers.groups if group[0] in found for name in group}

    def local(self, weight: LocalWeight) -> Tensor:
        counts = self._counts.get(weight.name)
        return _no_counts(weight.master.device) if counts is None else counts

    def finish(self, sums: Tensor) -> dict[str, float]:
        num_clipped, num_blocks = sums.tolist()
        return {"input_clipped_share": num_clipped / num_blocks} if num_blocks else {}


@cache
def _no_counts(device: torch.device) -> Tensor:
    """Float64 [2], one tensor for every weight, since most looks measure no input."""
    return torch.zeros(2, dtype=torch.float64, device=device)
