"""The weight store of a model that is sharded by FSDP2: each rank quantizes its own rows, and weights travel packed.

FSDP2 asks a parameter's local tensor for two hooks. `fsdp_pre_all_gather` gives what this rank sends, `fsdp_post_all_gather` turns
what all ranks sent into the weight that the forward computes with. Both are set as plain attributes of the local tensor while
quantization is on. While it is off there are none, and FSDP2 gathers the masters rounded to bf16.

Codes and scales are 0.5625 byte a weight on the wire, against 2 of bf16. They are made once per optimizer step, whatever the number
of micro-batches, and the decoded weight lives as long as FSDP2 keeps it unsharded.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels.fp4_kernel import nvfp4_quantize
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.linear import SERVED_DTYPE
from nvfp4_train.quant.store import WeightStore

HOOKS = ("fsdp_pre_all_gather", "fsdp_post_all_gather")


class _ShardedWeight:
    """One quantized parameter: its shard, what this rank sends of it, and the hooks."""

    def __init__(self, name: str, parameter: Tensor, fsdp_param: Any, *, packed: bool) -> None:
        if not isinstance(parameter, DTensor) or not (
            parameter.placements[-1] == Shard(0) and all(p == Replicate() for p in parameter.placements[:-1])
        ):
            placements = getattr(parameter, "placements", "no placements")
            raise ValueError(
                f"{name}.weight must be sharded by rows (dimension 0) by fully_shard alone, got {placements}; a block of 16 "
                "inputs stays on one rank, so shard no quantized weight by columns or by tensor parallelism"
            )
        self._fsdp_param = fsdp_param
        self._shape = parameter.shape
        self._group = parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
        # With one shard nothing travels, and FSDP2 takes a single tensor from the hook.
        self.is_packed = packed and self._group.size() > 1
        self.sent: tuple[Tensor, ...] = ()
        self.s2 = torch.empty(0)
        self._hooked: Tensor | None = None

    def local_master(self) -> Tensor:
        """The rows of this rank, padded by zeros to the same number on every rank."""
        return self._fsdp_param._sharded_param_data.detach().view(self._fsdp_param.padded_sharded_param_size)

    def allocate(self) -> None:
        """Make room for what this rank sends."""
        master = self.local_master()
        if self.is_packed:
            rows, columns = master.shape
            self.sent = (
                master.new_empty((rows, columns // 2), dtype=torch.uint8),
                master.new_empty((rows, columns // BLOCK_SIZE), dtype=torch.float8_e4m3fn),
            )
        else:
            self.sent = (torch.empty_like(master, dtype=SERVED_DTYPE),)

    def gather(self) -> Tensor:
        """The whole compute weight, by a collective of its own."""
        received: list[Tensor] = []
        for tensor in self.sent:
            sent = tensor.view(torch.uint8)
            output = sent.new_empty((self._group.size() * sent.shape[0], *sent.shape[1:]))
            distributed.all_gather_into_tensor(output, sent, group=self._group)
            received.append(output.view(tensor.dtype)[: self._shape[0]])
        return self._decode(received) if self.is_packed else received[0]

    def follow_shard(self) -> bool:
        """Tell FSDP2 of a new local tensor, if it was replaced since the hooks were set; whether it was."""
        was_replaced = self._hooked is not None and self._local_tensor() is not self._hooked
        if was_replaced:
            self._fsdp_param.reset_sharded_param()
        return was_replaced

    def attach(self) -> None:
        local = self._local_tensor()
        if local is self._hooked and hasattr(local, HOOKS[0]):
            return
        for name, hook in zip(HOOKS, (self._pre_all_gather(), self._post_all_gather), strict=True):
            setattr(local, name, hook)
        self._hooked = local
        self._forget_buffers()

    def detach(self) -> None:
        local = self._local_tensor()
        if hasattr(local, HOOKS[0]):
            for name in HOOKS:
                delattr(local, name)
            self._forget_buffers()

    def _local_tensor(self) -> Tensor:
        return self._fsdp_param.sharded_param._local_tensor

    def _forget_buffers(self) -> None:
        """FSDP2 keeps the buffers of its first gather, which have other shapes with hooks than without."""
        self._fsdp_param.all_gather_outputs = []
        self._fsdp_param.__dict__.pop("_unsharded_param", None)
        self._fsdp_param._init_extensions()

    def _pre_all_gather(self) -> Callable:
        # Of one argument: the hook of five may not be packed where the rows of the ranks differ in number.
        def fsdp_pre_all_gather(mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], None]:
            return self.sent, None

        # FSDP2 inspects the signature at every gather; found here it costs nothing.
        fsdp_pre_all_gather.__signature__ = inspect.signature(fsdp_pre_all_gather)  # type: ignore[attr-defined]
        return fsdp_pre_all_gather

    def _post_all_gather(
        self, received: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        if not self.is_packed:
            # The gathered tensor is the unsharded parameter; FSDP2 owns its memory.
            return None if out is not None else (received[0], ())
        weight = self._decode([tensor[: self._shape[0]] for tensor in received])
        for tensor in received:
            # FSDP2 allocates these anew before the next gather; until then only the decoded weight is alive.
            tensor.untyped_storage().resize_(0)
        if out is None:
            return weight, (weight,)
        # Autograd has saved this very tensor for the backward, for which it is gathered again.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(weight)
        return None

    def _decode(self, received: Sequence[Tensor]) -> Tensor:
        codes, scales = received
        return torch.ops.nvfp4.dequantize(codes, scales, self.s2, SERVED_DTYPE)


class ShardedWeightStore(WeightStore):
    """The store of a model to which `fully_shard` has been applied. `gather` is `packed` or `bf16`, with the same bits."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Sequence[str]], *, power_of_two: bool, gather: str = "packed"
    ) -> None:
        super().__init__(model, groups, power_of_two=power_of_two)
        self._fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        fsdp_params = {
            id(fsdp_param.sharded_param): fsdp_param
            for module in self._fsdp_modules
            if (param_group := module._get_fsdp_state()._fsdp_param_group) is not None
            for fsdp_param in param_group.fsdp_params
        }
        self._weights: dict[str, _ShardedWeight] = {}
        """By owner."""
        for name, module, _ in self.items():
            fsdp_param = fsdp_params.get(id(module.weight))
            if fsdp_param is None:
                raise ValueError(f"{name}.weight must be managed by fully_shard, got {type(module.weight).__name__}")
            self._weights[name] = _ShardedWeight(name, module.weight, fsdp_param, packed=gather == "packed")

    def update(self) -> None:
        # A forward without a backward leaves parameters unsharded, and FSDP2 would not gather them anew.
        self._reshard()
        were_replaced = [weight.follow_shard() for weight in self._weights.values()]
        if any(were_replaced):
            self._quantizer = None
            self.is_enabled = False
        super().update()

    @torch.no_grad()
    def master(self, name: str) -> Tensor:
        self._reshard()
        master = self._modules[name].weight.detach()
        assert isinstance(master, DTensor)
        return master.full_tensor()

    @torch.no_grad()
    def compute_weight(self, name: str) -> Tensor:
        return self._weights[self._owners[name]].gather()

    @torch.no_grad()
    def local_packed(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes uint8 [rows, K / 2] and scales float8_e4m3fn [rows, K / 16] of this rank's rows of a module, of the last update."""
        weight = self._weights[self._owners[name]]
        master = self._modules[name].weight.detach()
        assert isinstance(master, DTensor)
        rows = master.to_local()
        if not weight.is_packed:
            return nvfp4_quantize(rows, weight.s2)
        codes, scales = weight.sent
        return codes[: len(rows)], scales[: len(rows)]

    def _make_quantizer(self) -> MultiTensorQuantizer:
        weights = [self._weights[name] for name, _, _ in self.items()]
        groups = [group for _, _, group in self.items()]
        for weight in weights:
            weight.allocate()
        names = ("packed", "scales") if weights[0].is_packed else ("decoded",)
        outputs = {name: [weight.sent[index] for weight in weights] for index, name in enumerate(names)}
        quantizer = self._quantizer_of([weight.local_master() for weight in weights], groups, **outputs)
        for weight, group in zip(weights, groups, strict=True):
            weight.s2 = quantizer.global_scales[group]
        return quantizer

    def _use(self, quantized: bool) -> None:
        self._reshard()
        self.is_enabled = quantized
        for weight in self._weights.values():
            if quantized:
                weight.attach()
            else:
                weight.detach()

    def _reshard(self) -> None:
        for module in self._fsdp_modules:
            module.reshard()
