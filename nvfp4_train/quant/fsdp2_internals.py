"""The undocumented parts of FSDP2 that we use, seen in PyTorch 2.11 to 2.13. In other versions `sharded` works without this file.

FSDP2 gathers and unpacks every parameter on its own, which takes the host longer than a small layer computes. So while
quantization is on, FSDP2's parameter groups are of our class `PackedParamGroup`. A group sends one tensor, which lies ready between
the steps, and decodes it into one tensor; the unsharded parameters are views of that. While quantization is off the groups are of
FSDP2's own class, and gather the masters.
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
    """What a `PackedParamGroup` sends, and how it unpacks what it receives."""

    @property
    def sent(self) -> Tensor:
        """What this rank sends."""

    def unpack(self, received: Tensor) -> None:
        """Fill the unsharded parameters from what all ranks sent."""


class PackedParamGroup(FSDPParamGroup):
    """A parameter group of FSDP2, while some of its parameters are quantized. A gather is one collective and one decoding.

    Overrides the two halves of a gather. Same streams and events as the originals, and buffers live equally long.
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
            # Once the previous layer has decoded the bytes that it received, their memory is free.
            self._wait_all_gather_streams_on_event(previous.event)
            self.comm_ctx.all_gather_state = None
        _wait_for(self, gathered)
        self.gathered.unpack(gathered.all_gather_output)
        self._to_unsharded()
        decoded = self.device_handle.Event()
        decoded.record()
        if is_forward and gathered.all_gather_work is None:
            # The next layer's gather does not wait for this decoding, so the received bytes must stay alive.
            self.comm_ctx.all_gather_state = AllGatherState(gathered, decoded)
        else:
            self._wait_all_gather_streams_on_event(decoded)
        self._all_gather_result = None


def param_group(module: FSDPModule) -> FSDPParamGroup | None:
    """FSDP2's parameter group of a module; None where the groups of other modules gather all its parameters."""
    return module._get_fsdp_state()._fsdp_param_group


def gather(group: FSDPParamGroup, sent: Tensor, async_op: bool = False) -> tuple[Tensor, Work | None]:
    """Returns what all ranks send, and the collective to wait for if there is one."""
    ranks: ProcessGroup = group._all_gather_process_group
    if ranks.size() == 1:
        return sent, None
    comm = group._all_gather_comm
    received = comm.allocate((sent.numel() * ranks.size(),), dtype=sent.dtype, device=sent.device)
    return received, comm(output_tensor=received, input_tensor=sent, group=ranks, async_op=async_op)


def attach(group: FSDPParamGroup, gathered: Gathered, whole: Tensor, views: Sequence[Tensor]) -> None:
    """Let FSDP2 gather through `gathered`, into `views` of `whole`, one per parameter in its order. Frees the memory of `whole`."""
    memory = [whole]
    for fsdp_param, view in zip(group.fsdp_params, views, strict=True):
        # The first parameter owns all of the memory, so that FSDP2 frees and counts it once.
        fsdp_param.all_gather_outputs = memory
        fsdp_param._unsharded_param = nn.Parameter(view, requires_grad=fsdp_param.sharded_param.requires_grad)
        memory = []
    # The group is sharded now, so the unsharded memory must be free. `unpack` allocates it again.
    free_storage(whole)
    group.__class__ = PackedParamGroup  # type: ignore[assignment]
    group.gathered = gathered  # type: ignore[attr-defined]


def detach(group: FSDPParamGroup) -> None:
    """Give a `PackedParamGroup` back FSDP2's own class; other groups stay as they are."""
    if isinstance(group, PackedParamGroup):
        group.__class__ = FSDPParamGroup  # type: ignore[assignment]
        del group.gathered
        for fsdp_param in group.fsdp_params:
            fsdp_param.all_gather_outputs = []
            fsdp_param.__dict__.pop("_unsharded_param", None)


def drop_gather(group: FSDPParamGroup) -> None:
    """Drop a gather that has not been unpacked: it is of an earlier update, or of the other class of group."""
    if (gathered := group._all_gather_result) is not None:
        _wait_for(group, gathered)
        group._all_gather_result = None


def _wait_for(group: FSDPParamGroup, gathered: AllGatherResult) -> None:
    """Let the current stream wait for a gather."""
    if gathered.all_gather_event is not None:
        group.device_handle.current_stream().wait_event(gathered.all_gather_event)
    if isinstance(gathered.all_gather_work, Work):
        gathered.all_gather_work.wait()


def write_unsharded(whole: Tensor, write: Callable[[Tensor], None]) -> None:
    """Allocate the freed memory of `whole` again and run `write` on it.

    Autograd has saved views of `whole`, for which the same values are gathered again, so the version counter stays.
    """
    alloc_storage(whole)
    with torch.autograd._unsafe_preserve_version_counter(whole):
        write(whole)


def follow_replaced(group: FSDPParamGroup) -> None:
    """Let FSDP2 use the new local tensors after a load with `assign` or a move to another device."""
    for fsdp_param in group.fsdp_params:
        fsdp_param.reset_sharded_param()
