"""The weight store: refreshes the weights that the forward computes with, once per optimizer step.

This is the store of a replicated model (one device, or DDP). `sharded` has the one for FSDP2, with the same interface. A quantized
weight has the name of its parameter. It occupies one slot, or one per expert for a 3-D parameter [E, N, K]. Members of a group share
their slots, and so their amax and global scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from nvfp4_train.kernels import ops as _ops  # noqa: F401  (registers torch.ops.nvfp4)
from nvfp4_train.kernels.chunks import num_slots_of, slots_of_groups
from nvfp4_train.kernels.multi_tensor import MultiTensorQuantizer
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.quant.inputs import InputQuantizers
from nvfp4_train.quant.local_weight import LocalWeight, own_rows
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import SERVED_DTYPE, Shown
from nvfp4_train.quant.state import QuantState
from nvfp4_train.ranks import rank_and_world_size


class WeightStore(ABC):
    """Compute weights of the quantized parameters of a model.

    Parameters that modules share are quantized once, and share one compute weight.
    """

    def __init__(self, model: nn.Module, manifest: QuantManifest, *, compute_dtype: torch.dtype) -> None:
        self.manifest = manifest
        self.compute_dtype = compute_dtype
        self.is_enabled = False
        """Whether the forward computes with quantized weights."""
        self._holders = {
            name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in manifest.names
        }
        """The module that has a parameter, and the parameter's name there."""
        self._owners = self._find_owners()
        """The first name of every parameter, by each of its names."""
        self._slots = self._find_slots()
        self._with_siblings = {
            name for group in manifest.groups if len({self._owners[name] for name in group}) > 1 for name in group
        }
        """Parameters that share their slots with other ones."""
        self._quantizer: MultiTensorQuantizer | None = None
        self.global_amax = torch.empty(0)
        """float32 [slots], of the last update."""
        self.global_scale = torch.empty(0)
        """s2, float32 [slots], of the last update."""
        self.state = QuantState({name: self._parameter(name) for name in manifest.names}, manifest)
        """What the quantizer remembers beside the masters. A checkpoint of the model has to hold it as well."""
        self.inputs: InputQuantizers | None = None
        """What the first update enables, and `masters_only` disables, where the forward is to compute with quantized inputs."""
        self._is_first = True
        self._keeps_codes = False
        """Whether the codes of all rows that this rank holds are at hand, see `keep_history`."""

    @property
    def names(self) -> list[str]:
        """Every quantized parameter once, by its first name."""
        return [name for name, owner in self._owners.items() if name == owner]

    def slots(self, name: str) -> slice:
        """Where the amax and the global scales of a weight lie."""
        return self._slots[name]

    # Evaluations call this under inference_mode, too. A later backward could not use tensors that were made there.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, *, refit: bool | None = None) -> None:
        """Quantize every master into what the forward computes with, and switch the forward to it.

        `refit` lets a fitted rule choose anew; else every block keeps its choice. By default the first update does. A handful of
        launches and one all_reduce(MAX) for the whole model; nothing waits for the device.
        """
        if self._quantizer is not None and self._is_replaced():
            self._use(False)
            self._quantizer = None
        if self._quantizer is None:
            self.state.to(self._parameter(self.names[0]).device)
            self._quantizer = self._make_quantizer()
            self.global_amax, self.global_scale = self._quantizer.global_amax, self._quantizer.global_scales
        refit = self._is_first if refit is None else refit
        self._quantizer.step(reduce=_max_over_ranks, refit=refit and self.state.is_fitted)
        if not self.is_enabled:
            self._use(True)
        if self._is_first and self.inputs is not None:
            self.inputs.enable()
        self._is_first = False

    def keep_history(self) -> None:
        """Make room in the state for the history of every weight's codes, and keep the codes themselves from the next update on.

        Checkpoints hold the history from then on; call it before one is loaded.
        """
        self.state.add_history({name: self._parameter(name) for name in self.names})
        if not self._keeps_codes and self._quantizer is not None:
            self._use(False)
            self._quantizer = None
        self._keeps_codes = True

    def check_finite(self) -> None:
        """Raise ValueError, naming the weights, if the last update met a NaN or Inf. Waits for the device."""
        is_finite = self.global_amax.isfinite().cpu()
        bad = [", ".join(group) for group in self.manifest.groups if not is_finite[self._slots[group[0]]].all()]
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
            with nullcontext() if self.inputs is None else self.inputs.serving("w4a16"):
                yield
        finally:
            if was_enabled:
                self._use(True)

    def master(self, name: str) -> Tensor:
        """The whole master [N, K] or [E, N, K]. Call it on every rank: it is a collective where masters are sharded."""
        return self._parameter(name).detach()

    @abstractmethod
    def compute_weight(self, name: str) -> Tensor:
        """The whole weight, shaped like the master, as the forward computes with it since the last update. Call it on every rank."""

    @abstractmethod
    def local_weights(self) -> Iterator[LocalWeight]:
        """The rows of every quantized weight that this rank alone owns, as the last update left them. No collective."""

    @abstractmethod
    def held_weights(self) -> Iterator[LocalWeight]:
        """All rows of every quantized weight that this rank holds, as the last update left them, after `keep_history`.

        Replicas hold the same rows. The masters are those that the optimizer changes, and may be written to.
        """

    def _local_weight(
        self,
        name: str,
        rows: Tensor,
        packed: Sequence[Tensor] | None = None,
        steps: Tensor | None = None,
        *,
        first_row: int,
        first_expert: int | None = None,
    ) -> LocalWeight:
        """Rows of one slot [n, K], or of several experts [S, n, K], with the codes and scales that the store has of them.

        Where it has none, `steps` are those of the rows under a fitted rule. `first_row` is the index of the first row in its matrix,
        `first_expert` the first of a rank that has some.
        """
        whole = self._slots[name]
        first = whole.start if first_expert is None else whole.start + first_expert
        slots = whole if first_expert is None else slice(first, first + len(rows))
        s2 = self.global_scale[slots]
        codes, scales = self._quantize(rows, s2, steps) if packed is None else packed
        if rows.dim() == 2:
            rows, codes, scales = rows.unsqueeze(0), codes.unsqueeze(0), scales.unsqueeze(0)
        return LocalWeight(
            name=name,
            slots=range(slots.start, slots.stop),
            master=rows,
            codes=codes,
            block_scales=scales,
            # Of every slot of the whole weight, whatever rows this rank has.
            global_amax=self.global_amax[whole],
            global_scale=s2,
            first_row=first_row,
            has_siblings=name in self._with_siblings,
        )

    def _quantize(self, rows: Tensor, s2: Tensor, steps: Tensor | None) -> Sequence[Tensor]:
        """Codes and scales of rows that the store has none of, for `_local_weight`."""
        # The operator itself accepts NaN, so that a report shows one before the run stops because of it.
        quantize, rule = torch.ops.nvfp4.quantize, self.manifest.rule.block_scale
        if rows.dim() == 2:
            return quantize(rows, s2, rule, steps)
        if not len(rows):
            return empty_codes(rows)
        of_slot = [None] * len(rows) if steps is None else steps
        of_slots = [quantize(part, scale, rule, own) for part, scale, own in zip(rows, s2, of_slot, strict=True)]
        codes, scales = (torch.stack([part.view(torch.uint8) for part in parts]) for parts in zip(*of_slots, strict=True))
        return codes, scales.view(torch.float8_e4m3fn)

    def _parameter(self, name: str) -> Tensor:
        module, leaf = self._holders[name]
        parameter = module._parameters[leaf]
        assert parameter is not None
        return parameter

    def _find_owners(self) -> dict[str, str]:
        first: dict[int, str] = {}
        return {name: first.setdefault(id(self._parameter(name)), name) for name in self._holders}

    def _find_slots(self) -> dict[str, slice]:
        group_of = {name: index for index, group in enumerate(self.manifest.groups) for name in group}
        parameters = [self._parameter(name) for name in group_of]
        first_slots, self.num_slots = slots_of_groups(parameters, list(group_of.values()))
        return {
            name: slice(first, first + num_slots_of(parameter))
            for name, first, parameter in zip(group_of, first_slots, parameters, strict=True)
        }

    @abstractmethod
    def _is_replaced(self) -> bool:
        """Whether masters were replaced since the quantizer was made, by a load with `assign` or a move to another device."""

    @abstractmethod
    def _make_quantizer(self) -> MultiTensorQuantizer:
        """A quantizer of this rank's masters into new memory."""

    def _quantizer_of(
        self, masters: list[Tensor], names: list[str], first_slots: list[int], **outputs: Any
    ) -> MultiTensorQuantizer:
        if self.state.is_fitted:
            outputs["steps"] = [self._local_steps(name) for name in names]
            outputs["hessians"] = [self.state.hessian(name) for name in names]
        return MultiTensorQuantizer(masters, first_slots, self.num_slots, rule=self.manifest.rule, **outputs)

    def _local_steps(self, name: str) -> Tensor:
        """This rank's rows of the steps of a weight, in the memory of the state."""
        return _local(self.state.steps(name))

    def local_history(self, name: str) -> Tensor:
        """The history of the rows that this rank holds of a weight, uint8 [.., n, K], in the memory of the state."""
        return _local(self.state.history(name))

    @abstractmethod
    def _use(self, quantized: bool) -> None:
        """Let the forward compute with quantized weights or with masters."""


class ReplicatedWeightStore(WeightStore):
    """The store of a model that every rank holds whole. `shown` are the places that show its parameters, see `served`."""

    def __init__(
        self,
        model: nn.Module,
        manifest: QuantManifest,
        shown: Mapping[str, Sequence[Shown]],
        *,
        compute_dtype: torch.dtype = SERVED_DTYPE,
    ) -> None:
        super().__init__(model, manifest, compute_dtype=compute_dtype)
        self._shown = {name: shown[name] for name in manifest.names}
        self._masters: dict[str, Tensor] = {}
        """The parameters that the quantizer was made of."""
        self._compute_weights: dict[str, Tensor] = {}
        """Compute weight by the first name of its parameter."""
        self._codes: dict[str, tuple[Tensor, Tensor]] = {}
        """Codes and block scales beside it, where they are kept."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, *, refit: bool | None = None) -> None:
        super().update(refit=refit)
        if self.compute_dtype is not SERVED_DTYPE and not self.manifest.rule.is_pow2:
            # Readers round what they decode to bf16; under a power-of-two scale it is bf16 already.
            for weight in self._compute_weights.values():
                weight.copy_(weight.to(SERVED_DTYPE))

    def compute_weight(self, name: str) -> Tensor:
        return self._compute_weights[self._owners[name]]

    @contextmanager
    def quantized_only(self, names: Collection[str]) -> Iterator[None]:
        """Compute inside the context with the quantized values of these parameters, and as in `masters_only` with all others.

        Inputs are quantized of the same parameters alone, where the forward computes with quantized inputs at all. Do not update
        inside. Raises ValueError for a name that is not quantized, and before the first update.
        """
        if unknown := [name for name in names if name not in self._owners]:
            raise ValueError(f"names must be those of quantized parameters, got {unknown[0]}")
        if not self._compute_weights:
            raise ValueError("weights must have been quantized before some of them are shown: call update first")
        was_enabled, owners = self.is_enabled, {self._owners[name] for name in names}
        self._show([name for name, owner in self._owners.items() if owner in owners])
        try:
            is_w4a4 = self.inputs is not None and self.inputs.is_enabled
            with self.inputs.quantizing(names) if is_w4a4 else nullcontext():  # type: ignore[union-attr]
                yield
        finally:
            self._use(was_enabled)

    def local_weights(self) -> Iterator[LocalWeight]:
        # All ranks hold all masters, so each owns a part of their rows.
        rank, num_ranks = rank_and_world_size()
        for name in self.names:
            rows = self.master(name)
            num_rows = rows.shape[-2]
            own = own_rows(num_rows, rank, num_ranks)
            steps = self.state.steps(name)[..., own, :] if self.state.is_fitted else None
            if num_ranks > 1:
                rows = rows[..., own, :]
            yield self._local_weight(name, rows, steps=steps, first_row=min(own.start, num_rows))

    @torch.no_grad()
    def held_weights(self) -> Iterator[LocalWeight]:
        for name in self.names:
            yield self._local_weight(name, self.master(name), self._codes[name], first_row=0)

    def _is_replaced(self) -> bool:
        assert self._quantizer is not None
        return any(self._parameter(name) is not master for name, master in self._masters.items()) or (
            next(iter(self._masters.values())).device != self._quantizer.global_amax.device
        )

    def _make_quantizer(self) -> MultiTensorQuantizer:
        self._masters = {name: self._parameter(name) for name in self._holders}
        for name, master in self._masters.items():
            if isinstance(master, DTensor):
                raise ValueError(
                    f"{name} must be whole on every rank, or sharded by fully_shard alone, got {master.placements}; "
                    "tensor parallelism is not supported"
                )
        self._owners = self._find_owners()
        masters = {name: self._masters[name] for name in self.names}
        self._compute_weights = {
            name: torch.empty_like(master, dtype=self.compute_dtype, requires_grad=False) for name, master in masters.items()
        }
        outputs = {"decoded": list(self._compute_weights.values())}
        if self._keeps_codes:
            self._codes = {name: empty_codes(master) for name, master in masters.items()}
            packed, scales = zip(*self._codes.values(), strict=True)
            outputs |= {"packed": list(packed), "scales": list(scales)}
        first_slots = [self._slots[name].start for name in masters]
        return self._quantizer_of(list(masters.values()), list(masters), first_slots, **outputs)

    def _use(self, quantized: bool) -> None:
        self.is_enabled = quantized
        self._show(self._shown if quantized else ())

    def _show(self, names: Collection[str]) -> None:
        """Let the forward compute with the quantized values of these parameters, by all of their names, and all other masters."""
        for name, places in self._shown.items():
            for place in places:
                place.compute_weight = self._compute_weights[self._owners[name]] if name in names else None


def empty_codes(master: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the codes uint8 [.., N, K / 2] and block scales float8_e4m3fn [.., N, K / 16] of a master [.., N, K]."""
    *rows, width = master.shape
    return (
        torch.empty(*rows, width // 2, dtype=torch.uint8, device=master.device),
        torch.empty(*rows, width // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=master.device),
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _max_over_ranks(measured: Tensor) -> None:
    """Take the maximum over all ranks, in one collective. Shards of a tensor need it, and it keeps replicas from drifting apart."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(measured, distributed.ReduceOp.MAX)
