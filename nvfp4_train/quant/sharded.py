"""The weight store of a model that is sharded by FSDP2: each rank quantizes its own rows, and weights travel packed.

FSDP2 asks a parameter's local tensor for two hooks. `fsdp_pre_all_gather` gives what this rank sends, `fsdp_post_all_gather` turns
what all ranks sent into the weight that the forward computes with. Both are set as plain attributes of the local tensor while
quantization is on. While it is off there are none, and FSDP2 gathers the masters rounded to bf16.

Codes and scales are 0.5625 byte a weight on the wire, against 2 of bf16. They are made once per optimizer step, whatever the number
of micro-batches. What is gathered together, as a rule a decoder layer, travels as one tensor and is decoded by one launch into
one tensor, of which the weights are views; it lives as long as FSDP2 keeps the layer unsharded. So a gather costs the host less
than one of bf16, which handles every weight on its own.
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
from nvfp4_train.kernels.packed_shards import PackedShards
from nvfp4_train.quant.linear import SERVED_DTYPE
from nvfp4_train.quant.store import WeightStore

HOOKS = ("fsdp_pre_all_gather", "fsdp_post_all_gather")
decode_shards = torch.ops.nvfp4.decode_shards.default


class _ShardedWeight:
    """One quantized parameter: its rows on this rank, and what FSDP2 keeps of it."""

    def __init__(self, name: str, parameter: Tensor, fsdp_param: Any, slot: int) -> None:
        if not isinstance(parameter, DTensor) or not (
            parameter.placements[-1] == Shard(0) and all(p == Replicate() for p in parameter.placements[:-1])
        ):
            placements = getattr(parameter, "placements", "no placements")
            raise ValueError(
                f"{name}.weight must be sharded by rows (dimension 0) by fully_shard alone, got {placements}; a block of 16 "
                "inputs stays on one rank, so shard no quantized weight by columns or by tensor parallelism"
            )
        self.name = name
        self.slot = slot
        self.shape = parameter.shape
        self.ranks = parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
        self._fsdp_param = fsdp_param
        self._followed: Tensor | None = None

    def local_master(self) -> Tensor:
        """The rows of this rank, padded by zeros to the same number on every rank."""
        self._followed = self._local_tensor()
        return self._fsdp_param._sharded_param_data.detach().view(self._fsdp_param.padded_sharded_param_size)

    def is_replaced(self) -> bool:
        """Whether the parameter has another local tensor than `local_master` saw; FSDP2 is told of it."""
        if self._followed is None or self._local_tensor() is self._followed:
            return False
        self._fsdp_param.reset_sharded_param()
        return True

    def attach(self, hooks: Sequence[Callable]) -> None:
        local = self._local_tensor()
        for name, hook in zip(HOOKS, hooks, strict=True):
            setattr(local, name, hook)
        self._forget_buffers()

    def detach(self) -> None:
        local = self._local_tensor()
        if hasattr(local, HOOKS[0]):
            for name in HOOKS:
                delattr(local, name)
            self._forget_buffers()

    def set_unsharded(self, weight: Tensor) -> None:
        """Give FSDP2 the tensor that it computes with. From a hook it would take the start of the tensor's storage instead."""
        self._fsdp_param._unsharded_param = nn.Parameter(weight, requires_grad=self._fsdp_param.sharded_param.requires_grad)

    def all_gather(self, shard: Tensor) -> Tensor:
        """The rows of all ranks, by a collective of its own."""
        sent = shard.view(torch.uint8)
        received = sent.new_empty((self.ranks.size() * sent.shape[0], sent.shape[1]))
        distributed.all_gather_into_tensor(received, sent, group=self.ranks)
        return received.view(shard.dtype)[: self.shape[0]]

    def _local_tensor(self) -> Tensor:
        return self._fsdp_param.sharded_param._local_tensor

    def _forget_buffers(self) -> None:
        """FSDP2 keeps the buffers of its first gather, which have other shapes with hooks than without."""
        self._fsdp_param.all_gather_outputs = []
        self._fsdp_param.__dict__.pop("_unsharded_param", None)
        self._fsdp_param._init_extensions()


def _sends(*tensors: Tensor) -> Callable:
    """A hook that sends these tensors."""
    sent = tensors, None

    # Of one argument: the hook of five may not send tensors of another shape than the rows.
    def fsdp_pre_all_gather(mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], None]:
        return sent

    # FSDP2 inspects the signature at every gather; found here it costs nothing.
    fsdp_pre_all_gather.__signature__ = inspect.signature(fsdp_pre_all_gather)  # type: ignore[attr-defined]
    return fsdp_pre_all_gather


class _DecodedWeights:
    """Quantized weights that are gathered together, each of them as decoded rows in bf16."""

    def __init__(self, weights: list[_ShardedWeight]) -> None:
        self.weights = weights
        self.outputs: dict[str, list[Tensor]] = {}
        """What the quantizer writes, in the order of the weights."""

    def allocate(self) -> None:
        """Make room for what this rank sends."""
        self.outputs = {"decoded": [torch.empty_like(weight.local_master(), dtype=SERVED_DTYPE) for weight in self.weights]}

    def attach(self, s2: Tensor) -> None:
        for weight, rows in zip(self.weights, self.outputs["decoded"], strict=True):
            weight.attach((_sends(rows), self._fsdp_post_all_gather))

    def gather(self, index: int, s2: Tensor) -> Tensor:
        """The whole compute weight, by a collective of its own."""
        return self.weights[index].all_gather(self.outputs["decoded"][index])

    @staticmethod
    def _fsdp_post_all_gather(
        received: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        # The gathered tensor is the unsharded parameter; FSDP2 owns its memory.
        return None if out is not None else (received[0], ())


class _PackedWeights:
    """Quantized weights that are gathered together as one tensor of packed codes and scales.

    The first weight sends it for all. Its hook decodes all, and the decoded tensor counts as its own with FSDP2, which frees and
    allocates the tensor's storage when it reshards and gathers. The hooks of the others send and do nothing.
    """

    def __init__(self, weights: list[_ShardedWeight]) -> None:
        self.weights = weights
        self.outputs: dict[str, list[Tensor]] = {}
        """What the quantizer writes, in the order of the weights."""
        self._shards = PackedShards([weight.shape for weight in weights], weights[0].ranks.size())
        self._sent = torch.empty(0)
        self._table = torch.empty(0)

    def allocate(self) -> None:
        """Make room for what this rank sends."""
        device = self.weights[0].local_master().device
        self._sent = torch.zeros(self._shards.num_bytes, dtype=torch.uint8, device=device)
        self._table = self._shards.table([weight.slot for weight in self.weights]).to(device)
        self.outputs = {"packed": self._shards.codes(self._sent), "scales": self._shards.scales(self._sent)}

    def attach(self, s2: Tensor) -> None:
        first, *others = self.weights
        first.attach((_sends(self._sent), self._decoding_hook(s2)))
        hooks = _sends(), lambda *args, out: None
        for weight in others:
            weight.attach(hooks)

    def gather(self, index: int, s2: Tensor) -> Tensor:
        """The whole compute weight, by collectives of its own."""
        weight = self.weights[index]
        codes, scales = (weight.all_gather(self.outputs[name][index]) for name in ("packed", "scales"))
        return torch.ops.nvfp4.dequantize(codes, scales, s2[weight.slot], SERVED_DTYPE)

    def _decoding_hook(self, s2: Tensor) -> Callable:
        shards, table, others = self._shards, self._table, self.weights[1:]
        decoded = torch.empty(0)

        def fsdp_post_all_gather(
            received: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
        ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
            nonlocal decoded
            (gathered,) = received
            if out is None:
                decoded = torch.empty(shards.num_elements, dtype=SERVED_DTYPE, device=gathered.device)
            # Autograd has saved views of this very tensor for the backward, for which it is gathered again.
            with torch.autograd._unsafe_preserve_version_counter(decoded):
                decode_shards(gathered, table, s2, decoded)
            # FSDP2 allocates it anew before the next gather; until then only the decoded weights are alive.
            gathered.untyped_storage().resize_(0)
            if out is not None:
                return None
            views = shards.weights(decoded)
            for weight, view in zip(others, views[1:], strict=True):
                weight.set_unsharded(view)
            return views[0], (decoded,)

        return fsdp_post_all_gather


class ShardedWeightStore(WeightStore):
    """The store of a model to which `fully_shard` has been applied. `gather` is `packed` or `bf16`, with the same bits."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Sequence[str]], *, power_of_two: bool, gather: str = "packed"
    ) -> None:
        super().__init__(model, groups, power_of_two=power_of_two)
        self._fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._gathered: list[_DecodedWeights | _PackedWeights] = []
        """One for each parameter group of FSDP2 that has quantized weights, its weights in the order of FSDP2."""
        self._places: dict[str, tuple[_DecodedWeights | _PackedWeights, int]] = {}
        """Where a weight is, by owner."""
        unmet = {id(module.weight): (name, slot) for name, module, slot in self.items()}
        for fsdp_module in self._fsdp_modules:
            param_group = fsdp_module._get_fsdp_state()._fsdp_param_group
            weights = [
                _ShardedWeight(name, fsdp_param.sharded_param, fsdp_param, slot)
                for fsdp_param in (param_group.fsdp_params if param_group is not None else ())
                for name, slot in [unmet.pop(id(fsdp_param.sharded_param), (None, 0))]
                if name is not None
            ]
            if weights:
                # With one shard nothing travels, and FSDP2 takes a single tensor from the hook of each weight.
                is_packed = gather == "packed" and weights[0].ranks.size() > 1
                self._gathered.append((_PackedWeights if is_packed else _DecodedWeights)(weights))
                self._places |= {weight.name: (self._gathered[-1], index) for index, weight in enumerate(weights)}
        for name, _ in unmet.values():
            kind = type(self._modules[name].weight).__name__
            raise ValueError(f"{name}.weight must be managed by fully_shard, got {kind}")
        self._weights = [weight for gathered in self._gathered for weight in gathered.weights]

    @torch.inference_mode(False)
    def update(self) -> None:
        # A forward without a backward leaves parameters unsharded, and FSDP2 would not gather them anew.
        self._reshard()
        super().update()

    @torch.no_grad()
    def master(self, name: str) -> Tensor:
        self._reshard()
        master = self._modules[name].weight.detach()
        assert isinstance(master, DTensor)
        return master.full_tensor()

    @torch.no_grad()
    def compute_weight(self, name: str) -> Tensor:
        gathered, index = self._places[self._owners[name]]
        return gathered.gather(index, self.global_scale)

    @torch.no_grad()
    def local_packed(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes uint8 [rows, K / 2] and scales float8_e4m3fn [rows, K / 16] of this rank's rows of a module, of the last update."""
        gathered, index = self._places[self._owners[name]]
        master = self._modules[name].weight.detach()
        assert isinstance(master, DTensor)
        rows = master.to_local()
        if isinstance(gathered, _DecodedWeights):
            return nvfp4_quantize(rows, self.global_scale[gathered.weights[index].slot])
        codes, scales = (gathered.outputs[name][index] for name in ("packed", "scales"))
        return codes[: len(rows)], scales[: len(rows)]

    def _is_replaced(self) -> bool:
        # FSDP2 is told of every one, so this may not stop at the first.
        replaced = [weight for weight in self._weights if weight.is_replaced()]
        return bool(replaced)

    def _make_quantizer(self) -> MultiTensorQuantizer:
        outputs: dict[str, list[Tensor]] = {}
        for gathered in self._gathered:
            gathered.allocate()
            for name, tensors in gathered.outputs.items():
                outputs.setdefault(name, []).extend(tensors)
        masters = [weight.local_master() for weight in self._weights]
        return self._quantizer_of(masters, [weight.slot for weight in self._weights], **outputs)

    def _use(self, quantized: bool) -> None:
        self._reshard()
        self.is_enabled = quantized
        if quantized:
            for gathered in self._gathered:
                gathered.attach(self.global_scale)
        else:
            for weight in self._weights:
                weight.detach()

    def _reshard(self) -> None:
        for module in self._fsdp_modules:
            module.reshard()
