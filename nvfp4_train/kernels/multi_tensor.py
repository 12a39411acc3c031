"""NVFP4 quantization of all weights of a model at once, with one global scale per slot.

A step measures every master, takes the maximum per slot, lets the caller take it over ranks too, derives s2, and quantizes every
master: into decoded weights, into packed codes and scales, or into both. On CUDA it is three launches, waits for nothing, and
allocates nothing after the first step.

With a power-of-two s2 the masters are read once there: they are measured and quantized under the last s2 in one pass, and only
slots whose s2 moved are quantized again, which the device decides. The result is that of two passes, bit for bit.

Under a fitted rule each block keeps its step from one step to the next, until a step with `refit` chooses all of them anew: one more
launch, between the new s2 and the codes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nvfp4_train.kernels import ops
from nvfp4_train.kernels.chunks import Slots, Weights, num_slots_of
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule


class MultiTensorQuantizer:
    """Quantizes many masters by `step()`; see the module's docstring.

    Give `first_slots` and `num_slots` as `chunks.slots_of_groups` returns them; with experts sharded over ranks, the slots of the
    local ones. `decoded`, `packed` and `scales` are the outputs, `steps` and `hessians` the state of a fitted rule, which requires
    them; see `chunks.Weights`. The memory of a tensor may move between steps, and the dtype of all masters may change; shapes and
    strides may not. Raises ValueError where tensors, slots or the rule do not fit together.
    """

    _make_passes = staticmethod(ops.passes)

    def __init__(
        self,
        masters: Sequence[Tensor],
        first_slots: Sequence[int],
        num_slots: int,
        *,
        decoded: Sequence[Tensor] = (),
        packed: Sequence[Tensor] = (),
        scales: Sequence[Tensor] = (),
        steps: Sequence[Tensor] = (),
        hessians: Sequence[Tensor] = (),
        rule: ScaleRule = MAX_RULE,
    ) -> None:
        if not masters:
            raise ValueError("masters must not be empty, got no tensor")
        if len(first_slots) != len(masters):
            raise ValueError(f"first_slots must have one slot per master, {len(masters)}, got {len(first_slots)}")
        self.weights = Weights(
            masters=list(masters),
            first_slots=list(first_slots),
            decoded=list(decoded),
            packed=list(packed),
            scales=list(scales),
            steps=list(steps),
            hessians=list(hessians),
        )
        if rule.is_fitted != bool(steps):
            needed = "steps and hessians are required" if rule.is_fitted else "steps and hessians are for fitted rules alone"
            raise ValueError(f"{needed}, got {len(steps)} tensors of steps under rule {rule.block_scale!r}")
        for master, slot in zip(masters, first_slots, strict=True):
            last = slot + num_slots_of(master)
            if slot < 0 or last > num_slots:
                raise ValueError(f"slots of a master must lie within num_slots={num_slots}, got {slot} to {last - 1}")
        self.rule = rule
        self.slots = Slots.make(num_slots, self.weights.device)
        # The passes get all that they need, and not this object: no reference cycle keeps the memory of one that is gone.
        self._passes = self._make_passes(self.weights, self.slots, rule)

    @property
    def global_amax(self) -> Tensor:
        """float32 [num_slots], of the last step."""
        return self.slots.global_amax

    @property
    def global_scales(self) -> Tensor:
        """s2, float32 [num_slots], of the last step."""
        return self.slots.global_scales

    @torch.no_grad()
    def step(self, reduce: Callable[[Tensor], object] | None = None, refit: bool = False) -> None:
        """Quantize every master into its outputs and update `global_amax` and `global_scales`.

        `reduce` is called with `slots.measured` once the local masters are measured. Where masters are sharded or replicated over
        ranks it has to replace it, in place, by its maximum over them: an all_reduce(MAX).

        `refit` chooses the steps of a fitted rule anew, in place. Raises ValueError under another rule.

        NaN and Inf end up in `global_amax` and `global_scales`. The codes of such a slot mean nothing then, and a NaN may have
        either sign bit: these bits differ between CPU and CUDA.
        """
        if refit and not self.rule.is_fitted:
            raise ValueError(f"refit is for fitted rules alone, got rule {self.rule.block_scale!r}")
        with torch.cuda.device_of(self.slots.measured):
            self._passes.measure(refit)
            if reduce is not None:
                reduce(self.slots.measured)
            self._passes.update_scales()
            if refit:
                self._passes.choose_steps()
            self._passes.quantize(refit)
