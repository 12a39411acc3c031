"""The passes of `multi_tensor` in plain PyTorch, one weight after the other: the path that CPU tensors take."""

import torch
from torch import Tensor

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.chunks import Slots, Weights, num_slots_of
from nvfp4_train.kernels.scale_rules import ScaleRule


class ReferencePasses:
    """The passes of a step, in their order. `multi_tensor_kernels.TritonPasses` has the same methods."""

    def __init__(self, weights: Weights, slots: Slots, rule: ScaleRule) -> None:
        self.weights = weights
        self.slots = slots
        self.rule = rule

    def measure(self, refit: bool = False) -> None:
        """Raise `measured` to the amax of the masters. refit: `choose_steps` comes before `quantize`."""
        for master, slot in zip(self.weights.masters, self.weights.first_slots, strict=True):
            if master.numel():
                amax = reference.block_amax(master).reshape(num_slots_of(master), -1).amax(1)
                measured = self._of_master(self.slots.measured, master, slot)
                # A NaN may come with a sign bit.
                measured.copy_(torch.maximum(measured, amax.view(torch.int32) & 0x7FFFFFFF))

    def update_scales(self) -> None:
        """Make `measured` the global amax, derive the global scales, and set `measured` to 0."""
        slots = self.slots
        slots.global_amax.copy_(slots.measured.view(torch.float32))
        slots.global_scales.copy_(reference.global_scale(slots.global_amax, self.rule))
        slots.measured.zero_()

    def choose_steps(self) -> None:
        """Choose the steps of a fitted rule anew, under the global scales."""
        weights = self.weights
        of_masters = zip(weights.masters, weights.first_slots, weights.steps, weights.hessians, strict=True)
        for master, first_slot, steps, hessian in of_masters:
            if master.numel() == 0:
                continue
            scales = self._of_master(self.slots.global_scales, master, first_slot)
            # One slot, or one for each expert.
            rows_of, steps_of = (tensor.view(len(scales), -1, tensor.shape[-1]) for tensor in (master, steps))
            hessian_of = hessian.expand(len(scales), *hessian.shape[-3:])
            for slot, s2 in enumerate(scales):
                steps_of[slot].copy_(reference.choose_steps(rows_of[slot], s2, hessian_of[slot], self.rule))

    def quantize(self, refit: bool = False) -> None:
        """Write the outputs under the global scales and steps."""
        weights = self.weights
        for index, (master, slot) in enumerate(zip(weights.masters, weights.first_slots, strict=True)):
            if master.numel() == 0:
                continue
            s2 = self._of_master(self.slots.global_scales, master, slot).reshape(-1, *[1] * (master.dim() - 1))
            steps = weights.steps[index] if weights.steps else None
            if weights.decoded:
                decoded = weights.decoded[index]
                decoded.copy_(reference.fake_quant(master, s2, decoded.dtype, self.rule, steps))
            if weights.packed:
                packed, scales = reference.quantize(master, s2, self.rule, steps)
                weights.packed[index].copy_(packed)
                weights.scales[index].copy_(scales)

    @staticmethod
    def _of_master(values: Tensor, master: Tensor, first_slot: int) -> Tensor:
        return values[first_slot : first_slot + num_slots_of(master)]
