"""What became of the weights since the last look: the one statistic with a memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_train.kernels import statistics_reference as measured
from nvfp4_train.kernels.ops import weight_changes
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.local_weight import LocalWeight
from nvfp4_train.quant.statistics import Statistic


@dataclass
class _LastLook:
    """The sampled rows of a weight at the last look."""

    kept: list[Tensor]
    """What `kernels.statistics_reference.weight_changes` takes and changes: masters, codes, scales, s2, and the codes before."""
    num_looks: int = 1

    def is_of(self, master: Tensor) -> bool:
        """Whether the rows have this shape and device still."""
        return (self.kept[0].shape, self.kept[0].device) == (master.shape, master.device)


class Changes(Statistic):
    """How codes move between looks, of every `rows`-th row of each matrix, row 0 included.

        flip_rate               share of the sampled weights whose code has another value than at the last look
        oscillation_rate        share that flipped to the code from before their last flip, both within one window of `window` looks
        change_ratio            sum of |w_hat - last w_hat| over sum of |w - last w|; infinite where masters stood still
        global_scale_changes    share of the global scales that changed: 0 or 1 of a linear

    0 and -0 are one value. Windows follow each other: at the first look of each, earlier flips are forgotten. The ratio grows with the
    number of oscillating weights, whose w_hat moves by whole steps of the grid while w hardly does (Nagel et al. 2022, "Overcoming
    Oscillations in Quantization-Aware Training", has oscillations and how they harm).

    The first look has none of these, and so has the first one after a resume, since no checkpoint has the memory. That is 5.0625
    bytes a sampled weight: master (4), codes (0.5), block scale (0.0625), and the codes before (0.5). With rows=17 it is 0.30 byte for
    each weight of this rank, and that number divides no size of heads or interleaved matrices.
    """

    names = ("flip_rate", "oscillation_rate", "change_ratio", "global_scale_changes")

    def __init__(self, *, rows: int = 17, window: int = 10) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, which samples every row, got {rows}")
        if window < 2:
            raise ValueError(f"window must be at least 2 looks, so that a code can flip and flip back, got {window}")
        self.rows = rows
        self.window = window
        self._last: dict[str, _LastLook] = {}

    def local(self, weight: LocalWeight) -> Tensor:
        # Rows by their index in the whole matrix, so that the sample is the same whatever the sharding.
        sampled = slice(-weight.first_row % self.rows, None, self.rows)
        now = tuple(part[:, sampled] for part in (weight.master, weight.codes, weight.block_scales))
        last = self._last.get(weight.name)
        if last is None or not last.is_of(now[0]):
            kept = [part.clone(memory_format=torch.contiguous_format) for part in (*now, weight.global_scale, now[1])]
            self._last[weight.name] = _LastLook(kept)
            return torch.zeros(measured.NUM_CHANGES, dtype=torch.float64, device=weight.master.device)
        is_new_window = last.num_looks % self.window == 0
        last.num_looks += 1
        sums = weight_changes(*now, weight.global_scale, *last.kept, is_new_window)
        if weight.first_row:
            # A slot counts where its row 0 is.
            sums[measured.SCALE_CHANGES :] = 0
        return sums

    def finish(self, sums: Tensor) -> dict[str, float]:
        flips, oscillations, of_quantized, of_master, num_elements, scale_changes, num_slots = sums.tolist()
        if not num_elements:
            return {}
        values = {"flip_rate": flips / num_elements, "oscillation_rate": oscillations / num_elements}
        if of_quantized or of_master:
            values["change_ratio"] = of_quantized / of_master if of_master else float("inf")
        return values | {"global_scale_changes": scale_changes / num_slots}

    def bytes_kept(self, shape: Sequence[int], num_rows: int) -> float:
        *experts, _, columns = shape
        num_sampled = (experts[0] if experts else 1) * -(-num_rows // self.rows) * columns
        return num_sampled * (4 + 2 * 0.5 + 1 / BLOCK_SIZE)
