"""The weight store: refreshes the weights that the forward computes with, once per optimizer step.

This is the store of a replicated model (one device, or DDP); `sharded` has that of FSDP2, with the same interface.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer, slots_of_groups
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.quant.linear import SERVED_DTYPE, NVFP4Linear
from nvfp4_train.quant.manifest import QuantManifest


class WeightStore:
    """Compute weights of all `NVFP4Linear` modules of a model.

    `groups` are names of modules that share one global amax. Modules that share one parameter share one compute weight.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[str]], *, power_of_two: bool) -> None:
        self.groups = [list(group) for group in groups]
        self.power_of_two = power_of_two
        self.is_enabled = False
        """Whether the forward computes with quantized weights."""
        self._modules: dict[str, NVFP4Linear] = {}
        for name in (name for group in self.groups for name in group):
            module = model.get_submodule(name)
            if not isinstance(module, NVFP4Linear):
                raise TypeError(f"{name} must be an NVFP4Linear, got {type(module).__name__}")
            self._modules[name] = module
        self._owners = self._find_owners()
        """The first module that has the parameter of a module."""
        self._parameters_of_modules = [module._parameters for module in self._modules.values()]
        self._masters: list[Tensor] = []
        """The parameters that the quantizer was made of, in the order of the modules."""
        self._compute_weights: dict[str, Tensor] = {}
        """By owner."""
        self._quantizer: MultiTensorQuantizer | None = None
        self.global_amax = torch.empty(0)
        """float32 [groups], of the last update."""
        self.global_scale = torch.empty(0)
        """s2, float32 [groups], of the last update."""

    @property
    def manifest(self) -> QuantManifest:
        groups = tuple(tuple(f"{module}.weight" for module in group) for group in self.groups)
        return QuantManifest(groups=groups, rule=ScaleRule(global_scale="pow2" if self.power_of_two else "exact"))

    def slot(self, name: str) -> int:
        """Index of a quantized parameter in `global_scale`."""
        return next(index for index, group in enumerate(self.groups) if name.removesuffix(".weight") in group)

    def items(self) -> Iterator[tuple[str, NVFP4Linear, int]]:
        """Module name, module and group index of every quantized weight, a shared one once."""
        for index, group in enumerate(self.groups):
            for name in group:
                if self._owners[name] == name:
                    yield name, self._modules[name], index

    def modules(self) -> Iterator[tuple[str, NVFP4Linear]]:
        """Name and module of every quantized linear."""
        yield from self._modules.items()

    # Called from an evaluation under inference_mode, too; a later backward could not use tensors that were made there.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Quantize every master into what the forward computes with, and switch the forward to it.

        A handful of launches and one all_reduce(MAX) for the whole model; nothing waits for the device.
        """
        if self._is_replaced():
            self._use(False)
            self._quantizer = None
        if self._quantizer is None:
            self._quantizer = self._make_quantizer()
            self.global_amax, self.global_scale = self._quantizer.global_amax, self._quantizer.global_scales
        self._quantizer.step()
        if not self.is_enabled:
            self._use(True)

    def check_finite(self) -> None:
        """Raise ValueError, naming the weights, if the last update met a NaN or Inf. Waits for the device."""
        bad = [", ".join(group) for group, ok in zip(self.groups, self.global_amax.isfinite().tolist(), strict=True) if not ok]
        if bad:
            raise ValueError(
                f"weights must be finite to be quantized, got NaN or Inf in {'; '.join(bad)}; see optim.lr and trainer"
            )

    @contextmanager
    def masters_only(self) -> Iterator[None]:
        """Compute with the unquantized weights inside the context."""
        was_enabled = self.is_enabled
        self._use(False)
        try:
            yield
        finally:
            if was_enabled:
                self._use(True)

    def master(self, name: str) -> Tensor:
        """The whole master [N, K] of a module. Call it on every rank: it is a collective where masters are sharded."""
        return self._modules[name].weight.detach()

    def compute_weight(self, name: str) -> Tensor:
        """The whole weight [N, K] in bf16, as the forward computes with it since the last update. Call it on every rank."""
        return self._compute_weights[self._owners[name.removesuffix(".weight")]]

    def _find_owners(self) -> dict[str, str]:
        first: dict[int, str] = {}
        return {name: first.setdefault(id(module.weight), name) for name, module in self._modules.items()}

    def _is_replaced(self) -> bool:
        """Whether a master is another than the quantizer was made of, after a load with `assign`, or all are on another device."""
        if self._quantizer is None:
            return False
        # In every step, so nothing of it is Python code for each master.
        masters = map(itemgetter("weight"), self._parameters_of_modules)
        return (
            not all(map(is_, masters, self._masters))
            or self._quantizer.weights.masters[0].device != self._quantizer.global_amax.device
        )

    def _make_quantizer(self) -> MultiTensorQuantizer:
        for name, module in self._modules.items():
            if isinstance(module.weight, DTensor):
                raise ValueError(
                    f"{name}.weight must be whole on every rank, or sharded by fully_shard alone, got {module.weight.placements}; "
                    "tensor parallelism is not supported"
                )
        self._owners = self._find_owners()
        self._masters = [module.weight for module in self._modules.values()]
        weights = list(self.items())
        self._compute_weights = {
            name: torch.empty_like(module.weight, dtype=SERVED_DTYPE, requires_grad=False) for name, module, _ in weights
        }
        masters = [module.weight for _, module, _ in weights]
        return self._quantizer_of(masters, [group for _, _, group in weights], decoded=list(self._compute_weights.values()))

    def _quantizer_of(self, masters: list[Tensor], groups: list[int], **outputs: Any) -> MultiTensorQuantizer:
        """2-D masters: the slots of the quantizer are the groups of the store."""
        # Over all ranks: shards of one tensor need it, and replicas of one cannot drift apart.
        world = distributed.group.WORLD if distributed.is_available() and distributed.is_initialized() else None
        first_slots, num_slots = slots_of_groups(masters, groups)
        return MultiTensorQuantizer(
            masters,
            first_slots,
            num_slots,
            **outputs,
            power_of_two=self.power_of_two,
            process_groups=[] if world is None else [world],
        )

    def _use(self, quantized: bool) -> None:
        self.is_enabled = quantized
        for name, module in self._modules.items():
            module.compute_weight = self._compute_weights[self._owners[name]] if quantized else None
