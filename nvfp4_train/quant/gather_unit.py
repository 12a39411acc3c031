"""What FSDP2 gathers together, as a rule a decoder layer, as one tensor that each rank sends."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from nvfp4_train.kernels.fp4_kernel import nvfp4_quantize
from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.quant.local_weight import rows_per_rank
from nvfp4_train.quant.packed_shards import PackedShards
from nvfp4_train.quant.store import empty_codes


class GatherUnit:
    """The parameters that FSDP2 gathers together, at least one of them quantized, as this rank sends and receives them.

    With `is_packed` quantized weights travel as codes and scales, otherwise as decoded rows. Unquantized parameters travel as rows in
    `dtype`, the dtype of the gathered parameters: rounded to bf16, or as float32 masters.
    """

    def __init__(
        self,
        module: FSDPModule,
        parameters: Mapping[str, DTensor],
        slots: Mapping[str, int],
        *,
        is_packed: bool,
        dtype: torch.dtype,
        rule: ScaleRule,
    ) -> None:
        """`parameters` are by name, in the order in which FSDP2 gathers them for `module`. `slots` has the quantized ones."""
        self.module = module
        self.is_packed = is_packed
        self.dtype = dtype
        self.rule = rule
        for name, parameter in parameters.items():
            _check_rows(name, parameter)
        self.in_order = parameters
        self.quantized = [name for name in parameters if name in slots]
        self.unquantized = [name for name in parameters if name not in slots]
        self.slots = [slots[name] for name in self.quantized]
        mesh = next(iter(parameters.values())).device_mesh
        self.ranks = mesh.get_group(mesh.ndim - 1)
        self.replica, self.num_replicas = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)
        """Which of the replicas this rank is, that hold the same shards."""
        shapes, others = ([parameters[name].shape for name in names] for names in (self.quantized, self.unquantized))
        # Without packing everything travels as rows.
        split = (shapes, others) if is_packed else ([], [*shapes, *others])
        self.shards = PackedShards(*split, self.ranks.size(), dtype)
        self.sent = self.table = self.s2 = torch.empty(0)
        self.whole = torch.empty(0)
        self._padded_unquantized: list[Tensor] = []
        self.outputs: dict[str, list[Tensor]] = {}
        """What the quantizer writes, in the order of the quantized parameters."""
        self.rounded: list[Tensor] = []
        """Destinations of the rows of the unquantized parameters, in their order."""

    def rows(self, name: str) -> Tensor:
        """This rank's rows of a master, in the memory that FSDP2 uses."""
        return self.in_order[name]._local_tensor.detach()

    def allocate(self, *, keeps_codes: bool = False) -> None:
        """Make room for what this rank sends, and for codes and scales beside it where those are kept and do not travel."""
        device = self.rows(self.quantized[0]).device
        self.sent = torch.zeros(self.shards.num_bytes, dtype=torch.uint8, device=device)
        self.table = self.shards.table(self.slots if self.is_packed else []).to(device)
        views = self.shards.rows(self.sent)
        if self.is_packed:
            self.outputs = {
                "packed": self._own(self.shards.codes(self.sent)),
                "scales": self._own(self.shards.scales(self.sent)),
            }
        else:
            self.outputs = {"decoded": self._own(views)}
            if keeps_codes:
                packed, scales = zip(*(empty_codes(self.rows(name)) for name in self.quantized), strict=True)
                self.outputs |= {"packed": list(packed), "scales": list(scales)}
            views = views[len(self.quantized) :]
        self.rounded = [view[: len(self.rows(name))] for view, name in zip(views, self.unquantized, strict=True)]

    def _own(self, padded: list[Tensor]) -> list[Tensor]:
        """The rows of quantized parameters without padding."""
        return [view[: len(self.rows(name))] for view, name in zip(padded, self.quantized, strict=False)]

    def new_whole(self) -> list[Tensor]:
        """Allocate the tensor of whole parameters, uninitialized. Returns views of it in FSDP2's order."""
        self.whole = torch.empty(self.shards.num_elements, dtype=self.dtype, device=self.sent.device)
        self._padded_unquantized = self.shards.padded_unquantized(self.whole)
        views = dict(zip([*self.quantized, *self.unquantized], self.shards.whole_tensors(self.whole), strict=True))
        return [views[name] for name in self.in_order]

    def decode(self, received: Tensor, whole: Tensor) -> None:
        """Fill the whole parameters from what all ranks sent. `whole` is the tensor that `new_whole` allocated."""
        self.shards.unpack(received, self.table, self.s2, whole, self._padded_unquantized)

    def compute_weight(self, name: str) -> Tensor:
        """A whole quantized weight, by a collective of its own."""
        received = self.sent.new_empty(self.sent.numel() * self.ranks.size())
        distributed.all_gather_into_tensor(received, self.sent, group=self.ranks)
        whole = torch.empty(self.shards.num_elements, dtype=self.dtype, device=received.device)
        self.shards.unpack(received, self.table, self.s2, whole, self.shards.padded_unquantized(whole))
        return self.shards.whole_tensors(whole)[self.quantized.index(name)].clone()

    def local_packed(self, name: str, steps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes uint8 [rows, .., K / 2] and scales float8_e4m3fn [rows, .., K / 16] of this rank's rows, without padding.

        `steps` are those of the rows under a fitted rule.
        """
        index = self.quantized.index(name)
        if "packed" in self.outputs:
            return self.outputs["packed"][index], self.outputs["scales"][index]
        rows, slot = self.rows(name), self.slots[index]
        if rows.dim() == 2:
            return nvfp4_quantize(rows, self.s2[slot], self.rule, steps)
        first = slot + self.first_row(name)
        codes, scales = empty_codes(rows)
        for expert, matrix in enumerate(rows):
            own = nvfp4_quantize(matrix, self.s2[first + expert], self.rule, None if steps is None else steps[expert])
            codes[expert], scales[expert] = own
        return codes, scales

    def first_row(self, name: str) -> int:
        """Index of this rank's first row of a parameter, that of an expert for [E, N, K]."""
        num_rows = self.in_order[name].shape[0]
        return min(self.ranks.rank() * rows_per_rank(num_rows, self.ranks.size()), num_rows)


def _check_rows(name: str, parameter: Any) -> None:
    placements = parameter.placements
    if placements[-1] != Shard(0) or any(placement != Replicate() for placement in placements[:-1]):
        raise ValueError(
            f"{name} must be sharded by rows (dimension 0) by fully_shard alone, got {placements}; a block of 16 "
            "inputs stays on one rank, so shard no weight by columns or by tensor parallelism"
        )
    if not parameter.is_floating_point():
        raise ValueError(f"{name} must be of a float dtype to be gathered beside quantized weights, got {parameter.dtype}")
