"""The weight store: fills the compute weights of a replicated model (one device, or DDP) once per optimizer step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels.reference import global_scale
from nvfp4_train.quant.linear import SERVED_DTYPE, NVFP4Linear


class WeightStore:
    """Compute weights of all `NVFP4Linear` modules of a model.

    `groups` are names of modules that share one global amax. Modules that share one parameter share one compute weight.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[str]], *, power_of_two: bool) -> None:
        self.groups = [list(group) for group in groups]
        self.power_of_two = power_of_two
        self._modules: dict[str, NVFP4Linear] = {}
        for name in (name for group in self.groups for name in group):
            module = model.get_submodule(name)
            if not isinstance(module, NVFP4Linear):
                raise TypeError(f"{name} must be an NVFP4Linear, got {type(module).__name__}")
            self._modules[name] = module
        self._compute_weights: dict[int, Tensor] = {}
        """By the id of the master."""
        self.global_amax = torch.empty(0)
        """float32 [groups], of the last update."""
        self.global_scale = torch.empty(0)
        """s2, float32 [groups], of the last update."""

    @property
    def is_enabled(self) -> bool:
        return bool(self._compute_weights)

    def items(self) -> Iterator[tuple[str, NVFP4Linear, int]]:
        """Module name, module and group index of every quantized weight, a shared one once."""
        seen: set[int] = set()
        for index, group in enumerate(self.groups):
            for name in group:
                module = self._modules[name]
                if id(module.weight) not in seen:
                    seen.add(id(module.weight))
                    yield name, module, index

    def modules(self) -> Iterator[tuple[str, NVFP4Linear]]:
        """Name and module of every quantized linear."""
        yield from self._modules.items()

    @torch.no_grad()
    def update(self) -> None:
        """Quantize every master into its compute weight, and switch the forward to these.

        The amax of all groups is reduced over all ranks by one all_reduce(MAX); nothing waits for the device.
        """
        weights = list(self.items())
        amax = torch.stack([module.weight.detach().abs().amax().float() for _, module, _ in weights])
        index = torch.tensor([group for _, _, group in weights], device=amax.device)
        group_amax = torch.zeros(len(self.groups), device=amax.device).scatter_reduce_(0, index, amax, "amax")
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(group_amax, distributed.ReduceOp.MAX)
        self.global_amax = group_amax
        self.global_scale = global_scale(group_amax, self.power_of_two)
        for _, module, group in weights:
            master = module.weight
            if id(master) not in self._compute_weights:
                self._compute_weights[id(master)] = torch.empty_like(master, dtype=SERVED_DTYPE)
            decoded = torch.ops.nvfp4.fake_quant(master, self.global_scale[group], SERVED_DTYPE)
            self._compute_weights[id(master)].copy_(decoded)
        self._use(self._compute_weights)

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
        self._use({})
        try:
            yield
        finally:
            if was_enabled:
                self._use(self._compute_weights)

    def _use(self, compute_weights: dict[int, Tensor]) -> None:
        for module in self._modules.values():
            module.compute_weight = compute_weights.get(id(module.weight))
