"""Served weights of a sharded model. Their rows come from the ranks that hold them, packed or in bf16, when the writer asks.

The first rank writes. It broadcasts the number of the tensor that it wants next, and each rank of its replica sends its rows: a
quantized weight as the codes and scales that the store made for the forward, anything else in bf16. No master travels, and only
the first rank holds a whole tensor. The ranks of other replicas have nothing to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nvfp4_train.errors import RunError
from nvfp4_train.export.formats.base import QuantizedTensor
from nvfp4_train.export.masters import check_tensors, rows_at_once
from nvfp4_train.export.served import ServedWeights, refuse_unless, to_served
from nvfp4_train.kernels.fp4_kernel import fp4_dequantize
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.sharding import local_rows
from nvfp4_train.quant.local_weight import rows_per_rank
from nvfp4_train.quant.served import SERVED_DTYPE
from nvfp4_train.quant.sharded import ShardedWeightStore

FAILED_ON_FIRST_RANK = "the export failed on the first rank, whose error says why"


class FailedOnFirstRank(RunError, RuntimeError):
    """An export that this rank helped with has failed on the rank that writes."""


_DONE, _FAILED = -1, -2
"""Requests that end the exchange, where others are the number of a tensor."""


GATHERED_AT_ONCE = 1 << 26
"""Bytes that a rank sends in one gather. Gloo gathers into its own memory first; of a whole tensor that would be a second copy."""


class FromRanks(ServedWeights):
    """Weights of a model to which `fully_shard` has been applied, as the last update of its store left them.

    Make it on every rank. It is read on the writer alone, in the context of `answered`. Raises ValueError, on every rank, as
    `FromMasters` does.
    """

    def __init__(self, model: PreTrainedModel, store: ShardedWeightStore) -> None:
        super().__init__(HubLayout(model.config), store.manifest, store.state.state_dict())
        self._shards = {name: tensor for name, tensor in sharded_state(model).items() if name not in self.layout.aliases}
        check_tensors(self._shards, self.layout)
        store.check_finite()
        self._store = store
        self._global_scale = store.global_scale.cpu()
        self._names = list(self)
        mesh = next(tensor for tensor in self._shards.values() if isinstance(tensor, DTensor)).device_mesh
        self._group = mesh.get_group(mesh.ndim - 1)
        self._has_part = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
        self._device = local_rows(self._shards[self._names[0]])[0].device
        self._is_gathering = False
        self._check_finite()

    @contextmanager
    def answered(self) -> Iterator[bool]:
        """Yield whether this rank is the writer. The writer's body runs while the other ranks answer it; theirs runs after that.

        Raises FailedOnFirstRank on the other ranks where the writer's body failed. Where it failed within a gather (out of memory),
        they wait in that gather. The launcher ends them when the writer has ended with its error.
        """
        if not self._has_part:
            yield False
        elif self._group.rank() > 0:
            while (number := self._request(_DONE)) >= 0:
                self._gather(self._names[number])
            if number == _FAILED:
                raise FailedOnFirstRank(FAILED_ON_FIRST_RANK)
            yield False
        else:
            outcome = _FAILED
            try:
                yield True
                outcome = _DONE
            finally:
                # Within a gather the other ranks hear no request. Waiting for them would hide the error.
                if not self._is_gathering:
                    self._request(outcome)

    def plain(self, name: str) -> Tensor:
        (tensor,) = self._ask(name)
        return tensor

    def quantized(self, name: str) -> QuantizedTensor:
        s2 = self._global_scale[self._store.slots(name)].clone()
        codes, block_scales = (part.view(len(s2), -1, part.shape[-1]) for part in self._ask(name))
        return QuantizedTensor(codes, block_scales, s2, self.input_scale(name))

    def compute_weight(self, name: str) -> Tensor:
        codes, block_scales, scales, _ = self.quantized(name)
        num_rows = rows_at_once(2 * codes.shape[-1])
        decoded = [
            fp4_dequantize(own_codes, own_scales, s2, dtype=SERVED_DTYPE)
            for of_slot, scales_of_slot, s2 in zip(codes, block_scales, scales.to(codes.device), strict=True)
            for own_codes, own_scales in zip(of_slot.split(num_rows), scales_of_slot.split(num_rows), strict=True)
        ]
        return torch.cat(decoded).view(self.layout.tensors[name].shape)

    def _ask(self, name: str) -> tuple[Tensor, ...]:
        self._request(self._names.index(name))
        self._is_gathering = True
        gathered = self._gather(name)
        self._is_gathering = False
        return gathered

    def _request(self, number: int) -> int:
        """The number that the first rank passes; the numbers of other ranks are ignored."""
        request = torch.tensor(number, device=self._device)
        distributed.broadcast(request, distributed.get_global_rank(self._group, 0), group=self._group)
        return int(request)

    @torch.no_grad()
    def _gather(self, name: str) -> tuple[Tensor, ...]:
        """A whole tensor on the first rank, nothing on the others."""
        weight = self._shards[name]
        if not isinstance(weight, DTensor):
            return (to_served(name, weight, self.layout),)
        parts = self._store.local_packed(name) if self.is_quantized(name) else (self._served_rows(name),)
        gathered = (gather_rows(part, weight.shape[0], self._group) for part in parts)
        return tuple(tensor for tensor in gathered if tensor is not None)

    def _served_rows(self, name: str) -> Tensor:
        return to_served(name, local_rows(self._shards[name])[0], self.layout)

    def _check_finite(self) -> None:
        """Check every tensor that the store does not check, in one collective."""
        names = [name for name in self._names if not self.is_quantized(name)]
        is_finite = torch.stack([self._served_rows(name).isfinite().all() for name in names]).int()
        distributed.all_reduce(is_finite, distributed.ReduceOp.MIN, group=self._group)
        for name, ok in zip(names, is_finite.tolist(), strict=True):
            refuse_unless(bool(ok), name)


def sharded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with sharded parameters. Reshards first: a forward without a backward leaves parameters whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.state_dict()


def gather_rows(rows: Tensor, num_rows: int, group: distributed.ProcessGroup) -> Tensor | None:
    """Gather every rank's rows of a tensor: all `num_rows` of them on the first rank of a group, None on the other ranks."""
    # Ranks send equally many bytes, of any dtype; those with fewer rows pad them.
    sent = rows.contiguous()
    if len(rows) < (most := rows_per_rank(num_rows, group.size())):
        sent = rows.new_zeros((most, *rows.shape[1:]))
        sent[: len(rows)] = rows
    flat = sent.view(-1).view(torch.uint8)
    is_first = group.rank() == 0
    received = flat.new_empty((group.size(), len(flat))) if is_first else None
    for start in range(0, len(flat), GATHERED_AT_ONCE):
        piece = slice(start, start + GATHERED_AT_ONCE)
        destinations = None if received is None else [part[piece] for part in received]
        distributed.gather(flat[piece], destinations, dst=distributed.get_global_rank(group, 0), group=group)
    return None if received is None else received.view(-1).view(rows.dtype).view(-1, *rows.shape[1:])[:num_rows]
