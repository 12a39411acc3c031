"""The weight store of a model that is sharded by FSDP2: each rank quantizes its own rows, and weights travel packed.

Codes and scales are 0.5625 byte a weight on the wire, against 2 of bf16. They are made once per optimizer step, whatever the number
of micro-batches. What FSDP2 gathers together, as a rule a decoder layer, travels as one tensor that lies ready between the steps,
and is decoded by one launch into one tensor, of which the parameters are views; it lives as long as FSDP2 keeps the layer unsharded.

FSDP2 does the same for every parameter on its own, which takes the host longer than a small layer computes. So while quantization
is on, the objects in which FSDP2 keeps what it gathers together are of a class of ours, `_ServedParamGroup`. While it is off, they
are FSDP2's own, and gather the masters rounded to bf16.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Work
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, alloc_storage, free_storage
from torch.distributed.fsdp._fully_shard._fsdp_param_group import AllGatherState, FSDPParamGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from nvfp4_train.kernels.fp4_kernel import nvfp4_quantize
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.kernels.packed_shards import PackedShards
from nvfp4_train.quant.linear import SERVED_DTYPE
from nvfp4_train.quant.store import WeightStore

_local_tensor = attrgetter("sharded_param._local_tensor")
"""Of an `FSDPParam`: the tensor that a load with `assign` or a move to another device replaces."""


class _ServedParamGroup(FSDPParamGroup):
    """What FSDP2 gathers together, while some of it is quantized: one collective, one decoding.

    `unshard` and `wait_for_unshard` are FSDP2's two halves of a gather. Streams, events and what is kept alive until when are the
    same as there.
    """

    served: "_ServedParameters"

    def unshard(self, async_op: bool = False) -> None:
        is_under_way = self._all_gather_result is not None
        is_not_needed = self._training_state == TrainingState.PRE_BACKWARD and not self.unshard_in_backward
        if is_under_way or self.is_unsharded or is_not_needed:
            return
        _, stream = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)
        with self.device_handle.stream(stream):
            received, work = self.served.gather(async_op)
            self._all_gather_result = AllGatherResult(received, stream.record_event(), work, [], [], [])

    def wait_for_unshard(self) -> None:
        gathered = self._all_gather_result
        if gathered is None:
            return
        is_forward = self._training_state == TrainingState.FORWARD
        if is_forward and (previous := self.comm_ctx.all_gather_state) is not None:
            # What the layer before received is free once it is decoded.
            self._wait_all_gather_streams_on_event(previous.event)
            self.comm_ctx.all_gather_state = None
        _wait_for(self, gathered)
        self.served.unpack(gathered.all_gather_output)
        self._to_unsharded()
        decoded = self.device_handle.Event()
        decoded.record()
        if is_forward and gathered.all_gather_work is None:
            # The next layer's gather need not wait for this decoding, so it must not take this memory.
            self.comm_ctx.all_gather_state = AllGatherState(gathered, decoded)
        else:
            self._wait_all_gather_streams_on_event(decoded)
        self._all_gather_result = None


def _wait_for(group: FSDPParamGroup, gathered: AllGatherResult) -> None:
    """Let the stream that computes wait for a gather."""
    if gathered.all_gather_event is not None:
        group.device_handle.current_stream().wait_event(gathered.all_gather_event)
    if isinstance(gathered.all_gather_work, Work):
        gathered.all_gather_work.wait()


class _ShardedParameter:
    """One parameter of FSDP2: its rows on this rank."""

    def __init__(self, name: str, fsdp_param: FSDPParam) -> None:
        parameter = fsdp_param.sharded_param
        placements = parameter.placements  # type: ignore[attr-defined]
        if placements[-1] != Shard(0) or any(placement != Replicate() for placement in placements[:-1]):
            raise ValueError(
                f"{name} must be sharded by rows (dimension 0) by fully_shard alone, got {placements}; a block of 16 "
                "inputs stays on one rank, so shard no weight by columns or by tensor parallelism"
            )
        if not parameter.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype to be gathered beside quantized weights, got {parameter.dtype}")
        self.fsdp_param = fsdp_param
        self.shape = parameter.shape

    def local_master(self) -> Tensor:
        """The rows of this rank, padded by zeros to the same number on every rank."""
        return self.fsdp_param._sharded_param_data.detach().view(self.fsdp_param.padded_sharded_param_size)

    @property
    def rows(self) -> Tensor:
        """The rows of this rank, without padding."""
        return _local_tensor(self.fsdp_param).detach()

    def set_unsharded(self, whole: Tensor | None, memory: list[Tensor]) -> None:
        """Give FSDP2 the tensor to compute with, or let it make one; it frees and counts `memory` as this parameter's."""
        self.fsdp_param.all_gather_outputs = memory
        if whole is None:
            self.fsdp_param.__dict__.pop("_unsharded_param", None)
        else:
            requires_grad = self.fsdp_param.sharded_param.requires_grad
            self.fsdp_param._unsharded_param = nn.Parameter(whole, requires_grad=requires_grad)


class _ServedParameters:
    """The parameters of one group of FSDP2, of which at least one is quantized, as this rank sends and receives them.

    With `is_packed` quantized weights travel as codes and scales, otherwise as decoded rows. All else travels as rows in bf16.
    """

    def __init__(self, group: FSDPParamGroup, names: Mapping[int, str], slots: Mapping[int, int], *, is_packed: bool) -> None:
        """Names of the parameters, and slots of the quantized ones, are by id."""
        if (group.mp_policy.param_dtype, group.mp_policy.reduce_dtype) != (SERVED_DTYPE, torch.float32):
            name = names[id(group.fsdp_params[0].sharded_param)]
            raise ValueError(
                f"{name} must have a MixedPrecisionPolicy with param_dtype={SERVED_DTYPE} and reduce_dtype={torch.float32}, "
                f"got {group.mp_policy}"
            )
        if isinstance(group, _ServedParamGroup):
            # Of an earlier store.
            group.served.detach()
        self._group = group
        parameters = [_ShardedParameter(names[id(p.sharded_param)], p) for p in group.fsdp_params]
        self.quantized = [p for p in parameters if id(p.fsdp_param.sharded_param) in slots]
        self.others = [p for p in parameters if id(p.fsdp_param.sharded_param) not in slots]
        self.parameters = [*self.quantized, *self.others]
        self.slots = [slots[id(p.fsdp_param.sharded_param)] for p in self.quantized]
        self.is_packed = is_packed
        shapes, others = ([p.shape for p in these] for these in (self.quantized, self.others))
        num_ranks = self._ranks.size()
        self._shards = PackedShards(shapes, others, num_ranks) if is_packed else PackedShards([], [*shapes, *others], num_ranks)
        self._sent = self._table = self._whole = self._s2 = torch.empty(0)
        self._padded_others: list[Tensor] = []
        self.outputs: dict[str, list[Tensor]] = {}
        """What the quantizer writes, in the order of the quantized parameters."""
        self.rounded: list[Tensor] = []
        """What the rows of the others are rounded to, in their order."""

    @property
    def _ranks(self) -> ProcessGroup:
        return self._group._all_gather_process_group

    def allocate(self) -> None:
        """Make room for what this rank sends."""
        device = self._group.device
        self._sent = torch.zeros(self._shards.num_bytes, dtype=torch.uint8, device=device)
        rows = self._shards.rows(self._sent)
        self._table = self._shards.table(self.slots if self.is_packed else []).to(device)
        if self.is_packed:
            self.outputs = {"packed": self._shards.codes(self._sent), "scales": self._shards.scales(self._sent)}
            self.rounded = rows
        else:
            self.outputs = {"decoded": rows[: len(self.quantized)]}
            self.rounded = rows[len(self.quantized) :]

    # The forwards of a training may follow the context of an evaluation in which this is called.
    @torch.inference_mode(False)
    def attach(self, s2: Tensor) -> None:
        """Let FSDP2 gather this, under the global scales s2 of the store's last update."""
        self._s2 = s2
        self._whole = torch.empty(self._shards.num_elements, dtype=SERVED_DTYPE, device=self._sent.device)
        self._padded_others = self._shards.padded_others(self._whole)
        memory = [self._whole]
        for parameter, whole in zip(self.parameters, self._shards.wholes(self._whole), strict=True):
            parameter.set_unsharded(whole, memory)
            memory = []
        # FSDP2 is in its sharded state, in which there is none.
        free_storage(self._whole)
        self._group.__class__ = _ServedParamGroup
        self._group.served = self  # type: ignore[attr-defined]

    def detach(self) -> None:
        if isinstance(self._group, _ServedParamGroup):
            self._group.__class__ = FSDPParamGroup  # type: ignore[assignment]
            del self._group.served
            for parameter in self.parameters:
                parameter.set_unsharded(None, [])

    def drop_gather(self) -> None:
        """Forget what has been gathered and not yet been unpacked: it is of an earlier update, or of another class of group."""
        if (gathered := self._group._all_gather_result) is not None:
            _wait_for(self._group, gathered)
            self._group._all_gather_result = None

    def gather(self, async_op: bool = False) -> tuple[Tensor, Work | None]:
        """What all ranks send, and the collective to wait for if there is one."""
        if self._ranks.size() == 1:
            return self._sent, None
        comm = self._group._all_gather_comm
        received = comm.allocate((self._sent.numel() * self._ranks.size(),), dtype=self._sent.dtype, device=self._sent.device)
        return received, comm(output_tensor=received, input_tensor=self._sent, group=self._ranks, async_op=async_op)

    def unpack(self, received: Tensor) -> None:
        """Fill the parameters that the forward and backward compute with."""
        alloc_storage(self._whole)
        # Autograd has saved views of this very tensor for the backward, for which it is gathered again.
        with torch.autograd._unsafe_preserve_version_counter(self._whole):
            self._shards.unpack(received, self._table, self._s2, self._whole, self._padded_others)

    def compute_weight(self, index: int) -> Tensor:
        """A whole quantized weight, by a collective of its own."""
        received, _ = self.gather()
        whole = torch.empty(self._shards.num_elements, dtype=SERVED_DTYPE, device=received.device)
        self._shards.unpack(received, self._table, self._s2, whole, self._shards.padded_others(whole))
        return self._shards.wholes(whole)[index].clone()

    def local_packed(self, index: int) -> tuple[Tensor, Tensor]:
        """Codes uint8 [rows, K / 2] and scales float8_e4m3fn [rows, K / 16] of this rank's rows, without padding."""
        rows = self.quantized[index].rows
        if not self.is_packed:
            return nvfp4_quantize(rows, self._s2[self.slots[index]])
        return self.outputs["packed"][index][: len(rows)], self.outputs["scales"][index][: len(rows)]


class ShardedWeightStore(WeightStore):
    """The store of a model to which `fully_shard` has been applied. `gather` is `packed` or `bf16`, with the same bits.

    Parameters that are not quantized but gathered together with quantized ones are rounded to bf16 by `update` as well.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Sequence[str]], *, power_of_two: bool, gather: str = "packed"
    ) -> None:
        self._fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._served: list[_ServedParameters] = []
        """One for each parameter group of FSDP2 that has quantized weights."""
        # The parameters of an unsharded module are others than those that FSDP2 keeps.
        self._reshard()
        super().__init__(model, groups, power_of_two=power_of_two)
        self._places: dict[str, tuple[_ServedParameters, int]] = {}
        """Where a weight is, by owner."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        unmet = {id(module.weight): (name, slot) for name, module, slot in self.items()}
        slots = {parameter: slot for parameter, (_, slot) in unmet.items()}
        for fsdp_module in self._fsdp_modules:
            group = fsdp_module._get_fsdp_state()._fsdp_param_group
            if group is None or not any(id(p.sharded_param) in slots for p in group.fsdp_params):
                continue
            served = _ServedParameters(group, names, slots, is_packed=gather == "packed")
            self._served.append(served)
            for index, parameter in enumerate(served.quantized):
                name, _ = unmet.pop(id(parameter.fsdp_param.sharded_param))
                self._places[name] = served, index
        for name, _ in unmet.values():
            kind = type(self._modules[name].weight).__name__
            raise ValueError(f"{name}.weight must be managed by fully_shard, got {kind}")
        self._fsdp_params = [p.fsdp_param for served in self._served for p in served.parameters]
        self._local_tensors: list[Tensor] = []
        """Those that the quantizer was made of."""
        self._rounded: list[Tensor] = []
        self._other_masters: list[Tensor] = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        # A forward without a backward leaves parameters unsharded, and FSDP2 would not gather them anew.
        self._reshard()
        super().update()
        if self._rounded:
            torch._foreach_copy_(self._rounded, self._other_masters)

    @torch.no_grad()
    def master(self, name: str) -> Tensor:
        self._reshard()
        master = self._modules[name].weight.detach()
        assert isinstance(master, DTensor)
        return master.full_tensor()

    @torch.no_grad()
    def compute_weight(self, name: str) -> Tensor:
        served, index = self._places[self._owners[name.removesuffix(".weight")]]
        return served.compute_weight(index)

    @torch.no_grad()
    def local_packed(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes uint8 [rows, K / 2] and scales float8_e4m3fn [rows, K / 16] of this rank's rows of a module, of the last update."""
        served, index = self._places[self._owners[name.removesuffix(".weight")]]
        return served.local_packed(index)

    def _is_replaced(self) -> bool:
        if self._quantizer is None or all(map(is_, map(_local_tensor, self._fsdp_params), self._local_tensors)):
            return False
        for fsdp_param in self._fsdp_params:
            fsdp_param.reset_sharded_param()
        return True

    def _make_quantizer(self) -> MultiTensorQuantizer:
        outputs: dict[str, list[Tensor]] = {}
        for served in self._served:
            served.allocate()
            for name, tensors in served.outputs.items():
                outputs.setdefault(name, []).extend(tensors)
        self._local_tensors = list(map(_local_tensor, self._fsdp_params))
        self._rounded = [rows for served in self._served for rows in served.rounded]
        self._other_masters = [parameter.local_master() for served in self._served for parameter in served.others]
        masters = [parameter.local_master() for served in self._served for parameter in served.quantized]
        return self._quantizer_of(masters, [slot for served in self._served for slot in served.slots], **outputs)

    def _use(self, quantized: bool) -> None:
        self._reshard()
        self.is_enabled = quantized
        for served in self._served:
            if quantized:
                served.attach(self.global_scale)
            else:
                served.detach()

    def _reshard(self) -> None:
        for module in self._fsdp_modules:
            module.reshard()
        for served in self._served:
            served.drop_gather()
