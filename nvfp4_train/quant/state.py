"""What the quantizer remembers beside the masters: what calibration measured, and what a fitted rule chose."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.calibration import InputStatistics
from nvfp4_train.quant.manifest import QuantManifest


class QuantState(nn.Module):
    """Buffers of a manifest's groups and parameters, under the names of the parameters; no buffer is ever trained.

    They are in every checkpoint, those with a row for each row of a weight sharded as the weight is, the others whole on every rank.
    A group goes by the name of its first parameter:

        GROUP.input_scale   float32 [1]               1 / g of the group's input, a power of two; 0 until it is calibrated
        GROUP.hessian       float32 [K/16, 16, 16]    mean of x_b x_b' over its input's blocks x_b (fitted rules)
        NAME.steps          int8 [.., N, K/16]        each block's choice, in steps of E4M3 from the max rule's scale (fitted rules)
        NAME.history        uint8 [.., N, K]          last code and what it did before, see `kernels.code_history` (`add_history`)
    """

    def __init__(self, parameters: Mapping[str, Tensor], manifest: QuantManifest) -> None:
        """`parameters` has every quantized parameter by each of its names. Buffers are made on the devices of the parameters."""
        super().__init__()
        self._first_names = {name: group[0] for group in manifest.groups for name in group}
        self.is_fitted = manifest.rule.is_fitted
        for group in manifest.groups:
            parameter = parameters[group[0]]
            num_blocks, device = parameter.shape[-1] // BLOCK_SIZE, parameter.device
            self._add(group[0], "input_scale", torch.zeros(1, device=device))
            if self.is_fitted:
                self._add(group[0], "hessian", torch.zeros(num_blocks, BLOCK_SIZE, BLOCK_SIZE, device=device))
        for name, parameter in parameters.items() if self.is_fitted else ():
            self._add(name, "steps", _zeros_beside(parameter, parameter.shape[-1] // BLOCK_SIZE, torch.int8))

    def add_history(self, parameters: Mapping[str, Tensor]) -> None:
        """Remember the codes of parameters, by name. Nothing happens to those whose codes are remembered already."""
        present = dict(self.named_buffers())
        for name, parameter in parameters.items():
            if f"{name}.history" not in present:
                self._add(name, "history", _zeros_beside(parameter, parameter.shape[-1], torch.uint8))

    @torch.no_grad()
    def fill(self, statistics: Mapping[str, InputStatistics], *, headroom: float) -> None:
        """Take over what calibration measured, by group. An input may grow to `headroom` times its largest value."""
        for group, measured in statistics.items():
            # 1 / g is the smallest power of two under which headroom * amax stays within 6 * 448.
            self.input_scale(group).copy_(reference.global_scale(headroom * measured.amax.amax()))
            if self.is_fitted:
                self.hessian(group).copy_(measured.hessian)

    def input_scale(self, name: str) -> Tensor:
        """float32 [1], of the group that a parameter is in."""
        return self._get(self._first_names[name], "input_scale")

    def hessian(self, name: str) -> Tensor:
        """float32 [K/16, 16, 16], of the group that a parameter is in."""
        return self._get(self._first_names[name], "hessian")

    def steps(self, name: str) -> Tensor:
        """int8 [.., N, K/16] of a parameter; a DTensor where the parameter is one."""
        return self._get(name, "steps")

    def history(self, name: str) -> Tensor:
        """uint8 [.., N, K] of a parameter; a DTensor where the parameter is one."""
        return self._get(name, "history")

    def _add(self, name: str, leaf: str, tensor: Tensor) -> None:
        # A name has dots, which the name of a buffer may not have: modules lead to it.
        node: nn.Module = self
        for part in name.split("."):
            if part not in node._modules:
                node._modules[part] = nn.Module()
            node = node.get_submodule(part)
        node.register_buffer(leaf, tensor)

    def _get(self, name: str, leaf: str) -> Tensor:
        tensor = self.get_submodule(name)._buffers[leaf]
        assert tensor is not None
        return tensor


def _zeros_beside(parameter: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros [.., N, width] that lie, and are sharded, as a parameter [.., N, K] is."""
    shape = (*parameter.shape[:-1], width)
    if isinstance(parameter, DTensor):
        return sharded_zeros(*shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)
