"""The weight store of a model that is sharded by FSDP2: each rank quantizes its own rows, and weights travel packed.

Codes and scales take 0.5625 byte a weight on the wire; bf16 takes 2. They are made once per optimizer step, whatever the number of
micro-batches. A gather unit is what FSDP2 gathers together, as a rule a decoder layer. It travels as one tensor, which lies ready
between the steps, and one launch decodes it into one tensor.

There are two ways to hand FSDP2 that tensor. `fsdp2_internals` replaces FSDP2's own handling of a gather, in the versions of PyTorch
that it knows. In other versions the documented `set_custom_all_gather` decodes into the buffer from which FSDP2 copies parameters.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.gather_unit import GatherUnit
from nvfp4_train.quant.local_weight import LocalWeight, own_rows, rows_per_rank
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import SERVED_DTYPE
from nvfp4_train.quant.store import WeightStore

KNOWN_TORCH = ((2, 11), (2, 14))
"""Versions of PyTorch whose internals `fsdp2_internals` knows: from the first on, below the second."""


def knows_internals() -> bool:
    """Whether this version of PyTorch is one that `fsdp2_internals` knows."""
    major, minor = torch.__version__.split(".")[:2]
    return KNOWN_TORCH[0] <= (int(major), int(minor)) < KNOWN_TORCH[1]


class _ThroughInternals:
    """Hands a gather unit to FSDP2 by `fsdp2_internals`."""

    def __init__(self, unit: GatherUnit, name: str) -> None:
        from nvfp4_train.quant import fsdp2_internals

        self._internals = fsdp2_internals
        group = fsdp2_internals.param_group(unit.module)
        assert group is not None
        policy = group.mp_policy
        if ((policy.param_dtype or torch.float32), policy.reduce_dtype) != (unit.dtype, torch.float32):
            raise ValueError(
                f"{name} must have a MixedPrecisionPolicy with param_dtype={unit.dtype} and reduce_dtype={torch.float32}, got {policy}"
            )
        # An earlier store may have attached the group.
        fsdp2_internals.detach(group)
        self._group = group
        self._unit = unit

    @property
    def sent(self) -> Tensor:
        return self._unit.sent

    def unpack(self, received: Tensor) -> None:
        self._internals.write_unsharded(self._unit.whole, lambda whole: self._unit.decode(received, whole))

    # Evaluations call this under inference_mode, and training forwards may follow.
    @torch.inference_mode(False)
    def attach(self) -> None:
        views = self._unit.new_whole()
        self._internals.attach(self._group, self, self._unit.whole, views)

    def detach(self) -> None:
        self._internals.detach(self._group)

    def drop_gather(self) -> None:
        self._internals.drop_gather(self._group)

    def follow_replaced(self) -> None:
        self._internals.follow_replaced(self._group)


class _ThroughCustomAllGather:
    """Hands a gather unit to FSDP2 as its all-gather. FSDP2 copies masters in and parameters out, as it does without quantization."""

    def __init__(self, unit: GatherUnit, name: str) -> None:
        if unit.ranks.size() == 1:
            raise ValueError(
                f"{name} must be sharded over at least 2 ranks with PyTorch {torch.__version__}, whose FSDP2 gathers nothing on one; "
                "choose trainer=gpu, or PyTorch 2.11 to 2.13"
            )
        self._unit = unit
        self._is_attached = self._is_checked = False
        self._table = torch.empty(0)
        self._place_of: dict[str, int] = {}
        """First element of every parameter in one rank's part of FSDP2's buffer."""
        self._num_elements = 0
        """Elements of that part."""
        for key, parameter in unit.in_order.items():
            self._place_of[key] = self._num_elements
            self._num_elements += rows_per_rank(parameter.shape[0], unit.ranks.size()) * parameter[:1].numel()
        # Kernels write whole blocks, in 16 bytes at once.
        self._is_aligned = not any(place % BLOCK_SIZE for place in (*self._place_of.values(), self._num_elements))
        unit.module.set_custom_all_gather(self)  # type: ignore[arg-type]

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        if not self._is_attached:
            return distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        unit = self._unit
        if not self._is_checked:
            self._check_order(input_tensor)
        received = unit.sent.new_empty(unit.sent.numel() * unit.ranks.size())
        distributed.all_gather_into_tensor(received, unit.sent, group=group)
        if self._is_aligned:
            unit.shards.unpack(received, self._table, unit.s2, output_tensor, self._unquantized_in(output_tensor))
        else:
            self._unpack_and_copy(received, output_tensor)
        return None

    def _unpack_and_copy(self, received: Tensor, output: Tensor) -> None:
        """By way of whole tensors of our own, which are aligned as kernels need it."""
        unit, num_ranks = self._unit, self._unit.ranks.size()
        whole = torch.empty(unit.shards.num_elements, dtype=unit.dtype, device=received.device)
        unit.shards.unpack(received, unit.table, unit.s2, whole, unit.shards.padded_unquantized(whole))
        by_rank = output.view(num_ranks, self._num_elements)
        for name, tensor in zip([*unit.quantized, *unit.unquantized], unit.shards.whole_tensors(whole), strict=True):
            place, num_rows = self._place_of[name], rows_per_rank(tensor.shape[0], num_ranks)
            for rank, rows in enumerate(tensor.split(num_rows)):
                by_rank[rank, place : place + rows.numel()] = rows.flatten()

    def _check_order(self, sent: Tensor) -> None:
        """Raise RuntimeError unless FSDP2 sends parameters in the order in which they are written. `sent` is what it would send."""
        for name, place in self._place_of.items():
            rows = self._unit.rows(name).to(sent.dtype).flatten()
            if sent.numel() != self._num_elements or not sent[place : place + rows.numel()].equal(rows):
                raise RuntimeError(
                    f"PyTorch {torch.__version__} gathers {name} at another place than 2.13 does; quantized training under FSDP2 needs "
                    "PyTorch 2.11 to 2.13"
                )
        self._is_checked = True

    def _unquantized_in(self, output: Tensor) -> list[Tensor]:
        """Views [ranks, elements of a rank] of FSDP2's buffer, one for each parameter that travels as rows."""
        unit, by_rank = self._unit, output.view(-1, self._num_elements)
        names = unit.unquantized if unit.is_packed else [*unit.quantized, *unit.unquantized]
        places = zip(map(self._place_of.__getitem__, names), unit.shards.rows(unit.sent), strict=True)
        return [by_rank[:, place : place + rows.numel()] for place, rows in places]

    def attach(self) -> None:
        unit = self._unit

        def place(index: int, rank: int) -> int:
            return rank * self._num_elements + self._place_of[unit.quantized[index]]

        self._table = unit.shards.table(unit.slots if unit.is_packed else [], place).to(unit.sent.device)
        self._is_attached = True

    def detach(self) -> None:
        self._is_attached = False

    def drop_gather(self) -> None:
        """Does nothing. No gather is pending, unless `unshard(async_op=True)` was called: it has the weights of the update before."""

    def follow_replaced(self) -> None:
        """Does nothing. FSDP2 looks at local tensors itself before its first forward."""


class ShardedWeightStore(WeightStore):
    """The store of a model to which `fully_shard` has been applied. `gather` is `packed` or `bf16`; both give the same bits.

    `update` also refreshes the unquantized parameters that are gathered together with quantized ones.
    `gathered_in_fp32` are the modules whose parameters FSDP2 gathers in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        manifest: QuantManifest,
        *,
        gather: str = "packed",
        gathered_in_fp32: Collection[nn.Module] = (),
        compute_dtype: torch.dtype = SERVED_DTYPE,
    ) -> None:
        self._fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._ways: list[_ThroughInternals | _ThroughCustomAllGather] = []
        # An unsharded module has other parameter objects than the sharded ones that FSDP2 keeps.
        self._reshard()
        super().__init__(model, manifest, compute_dtype=compute_dtype)
        self._units: list[GatherUnit] = []
        self._unit_of: dict[str, GatherUnit] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        first_slots = {name: self.slots(name).start for name in self.names}
        together: dict[int, list[Any]] = {}
        for module in self._fsdp_modules:
            together.setdefault(id(fully_shard.state(module)), []).append(module)  # type: ignore[attr-defined]
        groups = [(modules[0], {names[id(p)]: p for p in _gathered_for(modules)}) for modules in together.values()]
        groups = [(module, parameters) for module, parameters in groups if parameters.keys() & first_slots.keys()]
        # Decoded rows must have one dtype in the whole model, which a unit in fp32 rules out.
        is_packed = gather == "packed" or any(module in gathered_in_fp32 for module, _ in groups)
        for module, parameters in groups:
            dtype = torch.float32 if module in gathered_in_fp32 else SERVED_DTYPE
            unit = GatherUnit(module, parameters, first_slots, is_packed=is_packed, dtype=dtype, rule=manifest.rule)
            self._units.append(unit)
            self._ways.append(
                (_ThroughInternals if knows_internals() else _ThroughCustomAllGather)(unit, next(iter(parameters)))
            )
            self._unit_of |= dict.fromkeys(unit.quantized, unit)
        for name in self.names:
            if name not in self._unit_of:
                raise ValueError(f"{name} must be managed by fully_shard, got {type(self._parameter(name)).__name__}")
        self._local_tensors: list[Tensor] = []
        """The local tensors that the quantizer was made of."""
        self._rounded: list[Tensor] = []
        self._unquantized_rows: list[Tensor] = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, *, refit: bool | None = None) -> None:
        # A forward without a backward leaves parameters unsharded, and FSDP2 would not gather them anew.
        self._reshard()
        super().update(refit=refit)
        if self._rounded:
            torch._foreach_copy_(self._rounded, self._unquantized_rows)

    @torch.no_grad()
    def master(self, name: str) -> Tensor:
        self._reshard()
        master = super().master(name)
        assert isinstance(master, DTensor)
        return master.full_tensor()

    @torch.no_grad()
    def compute_weight(self, name: str) -> Tensor:
        owner = self._owners[name]
        return self._unit_of[owner].compute_weight(owner).to(SERVED_DTYPE).to(self.compute_dtype)

    @torch.no_grad()
    def local_packed(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes uint8 [rows, .., K / 2] and scales float8_e4m3fn [rows, .., K / 16] of this rank's rows, of the last update."""
        owner = self._owners[name]
        return self._unit_of[owner].local_packed(owner, self._local_steps(owner) if self.state.is_fitted else None)

    def local_weights(self) -> Iterator[LocalWeight]:
        for name in self.names:
            unit = self._unit_of[name]
            rows = unit.rows(name)
            # Each replica owns a part of the rows of its shards; of experts some rows of every matrix.
            part = own_rows(rows.shape[-2], unit.replica, unit.num_replicas)
            own = (..., part, slice(None))
            packed = [tensor[own] for tensor in self.local_packed(name)] if unit.is_packed else None
            steps = self._local_steps(name)[own] if self.state.is_fitted else None
            # A shard of [E, N, K] has whole experts.
            first_expert = unit.first_row(name) if rows.dim() == 3 else None
            first_row = min(part.start, rows.shape[-2]) + (unit.first_row(name) if rows.dim() == 2 else 0)
            yield self._local_weight(name, rows[own], packed, steps, first_row=first_row, first_expert=first_expert)

    @torch.no_grad()
    def held_weights(self) -> Iterator[LocalWeight]:
        for name in self.names:
            unit = self._unit_of[name]
            rows = unit.rows(name)
            first_expert = unit.first_row(name) if rows.dim() == 3 else None
            first_row = unit.first_row(name) if rows.dim() == 2 else 0
            yield self._local_weight(name, rows, self.local_packed(name), first_row=first_row, first_expert=first_expert)

    def _current_local_tensors(self) -> list[Tensor]:
        return [parameter._local_tensor for unit in self._units for parameter in unit.in_order.values()]

    def _is_replaced(self) -> bool:
        if all(now is then for now, then in zip(self._current_local_tensors(), self._local_tensors, strict=True)):
            return False
        for way in self._ways:
            way.follow_replaced()
        return True

    def _make_quantizer(self) -> MultiTensorQuantizer:
        outputs: dict[str, list[Tensor]] = {}
        for unit in self._units:
            unit.allocate(keeps_codes=self._keeps_codes)
            for name, tensors in unit.outputs.items():
                outputs.setdefault(name, []).extend(tensors)
        self._local_tensors = self._current_local_tensors()
        self._rounded = [rows for unit in self._units for rows in unit.rounded]
        self._unquantized_rows = [unit.rows(name) for unit in self._units for name in unit.unquantized]
        names = [name for unit in self._units for name in unit.quantized]
        masters = [unit.rows(name) for unit in self._units for name in unit.quantized]
        first_slots = [
            self.slots(name).start + (unit.first_row(name) if unit.in_order[name].dim() == 3 else 0)
            for unit in self._units
            for name in unit.quantized
        ]
        return self._quantizer_of(masters, names, first_slots, **outputs)

    def _use(self, quantized: bool) -> None:
        self._reshard()
        self.is_enabled = quantized
        for unit, way in zip(self._units, self._ways, strict=True):
            if quantized:
                unit.s2 = self.global_scale
                way.attach()
            else:
                way.detach()

    def _reshard(self) -> None:
        for module in self._fsdp_modules:
            module.reshard()
        for way in self._ways:
            way.drop_gather()


def _gathered_for(modules: Sequence[nn.Module]) -> list[DTensor]:
    """The parameters that FSDP2 gathers for `modules`, in its order: all inside them, except those of nested FSDP modules."""
    found: dict[int, Any] = {}
    visited: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        visited.add(module)
        for child in module.children():
            if child not in visited and not isinstance(child, FSDPModule):
                visit(child)
        for parameter in module._parameters.values():
            if isinstance(parameter, DTensor):
                found.setdefault(id(parameter), parameter)

    for module in modules:
        visit(module)
    return list(found.values())
