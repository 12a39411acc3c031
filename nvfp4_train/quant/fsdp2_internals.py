"""Everything of FSDP2 that PyTorch does not document, seen in PyTorch 2.11 to 2.13. `sharded` goes without it in other versions.

FSDP2 gathers and unpacks every parameter on its own, which takes the host longer than a small layer computes. So while
quantization is on, the objects in which FSDP2 keeps what it gathers together are of a class of ours, `PackedParamGroup`: one tensor
is sent as it lies ready between the steps, and decoded into one tensor, of which the unsharded parameters are views. While
quantization is off they are FSDP2's own, and gather the masters.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Work
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import alloc_storage, free_storage
from torch.distributed.fsdp._fully_shard._fsdp_param_group import AllGatherState, FSDPParamGroup


class Gathered(Protocol):
    """What a `PackedParamGroup` asks for."""

    @property
    def sent(self) -> Tensor:
        """What this rank sends."""

    def unpack(self, received: Tensor) -> None:
        """Fill the unsharded parameters from what all ranks sent."""


class PackedParamGroup(FSDPParamGroup):
    """What FSDP2 gathers together, while some of it is quantized: one collective, one decoding.

    Overrides FSDP2's two halves of a gather. Streams and events are those of the originals, and buffers live equally long.
    """

    gathered: Gathered

    def unshard(self, async_op: bool = False) -> None:
        is_under_way = self._all_gather_result is not None
        is_not_needed = self._training_state == TrainingState.PRE_BACKWARD and not self.unshard_in_backward
        if is_under_way or self.is_unsharded or is_not_needed:
            return
        _, stream = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)
        with self.device_handle.stream(stream):
            received, work = gather(self, self.gathered.sent, async_op)
            self._all_gather_result = AllGatherResult(received, stream.record_event(), work, [], [], [])

    def wait_for_unshard(self) -> None:
        gathered = self._all_gather_result
        if gathered is None:
            return
        is_forward = self._training_state == TrainingState.FORWARD
        if is_forward and (previous := self.comm_ctx.all_gather_state) is not None:
            # The layer before has decoded what it received, so that memory is free.
            self._wait_all_gather_streams_on_event(previous.event)
            self.comm_ctx.all_gather_state = None
        _wait_for(self, gathered)
        self.gathered.unpack(gathered.all_gather_output)
        self._to_unsharded()
        decoded = self.device_handle.Event()
        decoded.record()
        if is_forward and gathered.all_gather_work is None:
            # The next layer's gather need not wait for this decoding, so it must not take this memory.
            self.comm_ctx.all_gather_state = AllGatherState(gathered, decoded)
        else:
            self._wait_all_gather_streams_on_event(decoded)
        self._all_gather_result = None


def param_group(module: FSDPModule) -> FSDPParamGroup | None:
    """The parameters that FSDP2 gathers for a module; None where others gather all of them."""
    return module._get_fsdp_state()._fsdp_param_group


def gather(group: FSDPParamGroup, sent: Tensor, async_op: bool = False) -> tuple[Tensor, Work | None]:
    """What all ranks send, and the collective to wait for if there is one."""
    ranks: ProcessGroup = group._all_gather_process_group
    if ranks.size() == 1:
        return sent, None
    comm = group._all_gather_comm
    received = comm.allocate((sent.numel() * ranks.size(),), dtype=sent.dtype, device=sent.device)
    return received, comm(output_tensor=received, input_tensor=sent, group=ranks, async_op=async_op)


def attach(group: FSDPParamGroup, gathered: Gathered, whole: Tensor, views: Sequence[Tensor]) -> None:
    """Let FSDP2 gather through `gathered`, into views of `whole`, one per parameter in its order; frees the memory of `whole`."""
    memory = [whole]
    for fsdp_param, view in zip(group.fsdp_params, views, strict=True):
        # FSDP2 frees and counts all of the memory as that of the first parameter.
        fsdp_param.all_gather_outputs = memory
        fsdp_param._unsharded_param = nn.Parameter(view, requires_grad=fsdp_param.sharded_param.requires_grad)
        memory = []
    # The group is sharded now, so the unsharded memory must be free. `unpack` allocates it again.
    free_storage(whole)
    group.__class__ = PackedParamGroup  # type: ignore[assignment]
    group.gathered = gathered  # type: ignore[attr-defined]


def detach(group: FSDPParamGroup) -> None:
    """Give the group back to FSDP2, if it is not its own."""
    if isinstance(group, PackedParamGroup):
        group.__class__ = FSDPParamGroup  # type: ignore[assignment]
        del group.gathered
        for fsdp_param in group.fsdp_params:
            fsdp_param.all_gather_outputs = []
            fsdp_param.__dict__.pop("_unsharded_param", None)


def drop_gather(group: FSDPParamGroup) -> None:
    """Forget what has been gathered and not yet been unpacked: it is of an earlier update, or of another class of group."""
    if (gathered := group._all_gather_result) is not None:
        _wait_for(group, gathered)
        group._all_gather_result = None


def _wait_for(group: FSDPParamGroup, gathered: AllGatherResult) -> None:
    """Let the stream that computes wait for a gather."""
    if gathered.all_gather_event is not None:
        group.device_handle.current_stream().wait_event(gathered.all_gather_event)
    if isinstance(gathered.all_gather_work, Work):
        gathered.all_gather_work.wait()


def write_unsharded(whole: Tensor, write: Callable[[Tensor], None]) -> None:
    """Run `write` on freed memory that is allocated anew. Autograd has saved views of it, for which the values are gathered again."""
    alloc_storage(whole)
    with torch.autograd._unsafe_preserve_version_counter(whole):
        write(whole)


def follow_replaced(group: FSDPParamGroup) -> None:
    """Let FSDP2 look at local tensors that a load with `assign` or a move to another device has replaced."""
    for fsdp_param in group.fsdp_params:
        fsdp_param.reset_sharded_param()
