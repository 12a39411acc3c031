"""What an export writes: every tensor of a model as it is served, asked for one at a time.

There are three sources: master weights (`masters`), the store of a replicated model (`replicated`), and the ranks of a sharded one
(`gathered`).
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nvfp4_train.export.formats.base import QuantizedTensor
from nvfp4_train.kernels.fp4_kernel import is_input_scale
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.experts import owner_of
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import Quantizable, sibling_set, unfit


class ServedWeights(Mapping[str, Tensor]):
    """The tensors of a model by `state_dict` name, without tied copies, each with the value that a reader has to compute with.

    `state` is the `state_dict` of the store's `QuantState`; only fitted rules and quantized inputs need it. Raises ValueError where no
    reader could read the quantized weights of the manifest as such, or state does not hold what the manifest needs.
    """

    def __init__(self, layout: HubLayout, manifest: QuantManifest, state: Mapping[str, Tensor] | None = None) -> None:
        check_manifest(manifest, layout)
        self.layout = layout.with_quantized(manifest.names)
        self.manifest = manifest
        self._state = state or {}
        self._quantized = frozenset(manifest.names)
        self._input_scales = self._find_input_scales() if manifest.activations == "nvfp4" else {}

    def is_quantized(self, name: str) -> bool:
        return name in self._quantized

    def input_scale(self, name: str) -> Tensor | None:
        """1 / g of the input of a quantized weight, float32 [1] on the CPU, in memory of its own; None where inputs are as they are.

        Experts of a layer share it.
        """
        return torch.tensor([self._input_scales[name]]) if name in self._input_scales else None

    @abstractmethod
    def plain(self, name: str) -> Tensor:
        """An unquantized tensor in the dtype that is served."""

    @abstractmethod
    def quantized(self, name: str) -> QuantizedTensor:
        """A quantized weight as it is written. Its tensors share no memory with other weights: safetensors would refuse that."""

    @abstractmethod
    def compute_weight(self, name: str) -> Tensor:
        """A quantized weight [N, K], or [E, N, K] of experts, in bf16, as the forward computes with it: what the written one must
        decode to.
        """

    def _from_state(self, name: str, leaf: str) -> Tensor:
        if (key := f"{name}.{leaf}") not in self._state:
            raise ValueError(f"state must hold {key}, which the manifest needs; calibrate before the export")
        return self._state[key]

    def _find_input_scales(self) -> dict[str, float]:
        scales: dict[str, float] = {}
        for group in self.manifest.groups:
            value = self._from_state(group[0], "input_scale").item()
            if not is_input_scale(value):
                raise ValueError(
                    f"the input scale of {', '.join(group)} must be a power of two to serve it in W4A4, got {value}; calibrate before "
                    "the export, or export with quant.serve=w4a16"
                )
            scales.update(dict.fromkeys(group, value))
        return scales

    def __getitem__(self, name: str) -> Tensor:
        return self.compute_weight(name) if self.is_quantized(name) else self.plain(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.tensors)

    def __len__(self) -> int:
        return len(self.layout.tensors)


def to_served(name: str, tensor: Tensor, layout: HubLayout) -> Tensor:
    """An unquantized tensor in the dtype that is served."""
    return tensor.to(layout.served_dtype(name))


def check_manifest(manifest: QuantManifest, layout: HubLayout) -> None:
    """Raise ValueError where a weight could not be read as quantized. What `policy.select` has selected with a layout passes."""
    found, reasons = Quantizable.of(layout.model), unfit(layout.model, layout)
    group_of: dict[str, int] = {}
    for index, group in enumerate(manifest.groups):
        for name in group:
            owner = owner_of(name)
            is_weight = owner in found.linears and name != owner
            if not is_weight and name not in found.experts:
                raise ValueError(f"manifest: {name} is no weight of an nn.Linear and none of experts of {layout.architecture}")
            if owner in group_of:
                raise ValueError(f"manifest: {name} is listed twice; a weight is in exactly one group")
            if owner in reasons:
                raise ValueError(f"manifest: {name} cannot be served in NVFP4: {reasons[owner]}")
            group_of[owner] = index
    if not group_of:
        raise ValueError("manifest must name at least one weight to quantize, got none")
    for module, index in group_of.items():
        if module in found.experts:
            if (partner := found.experts[module].partner) not in group_of:
                raise ValueError(f"manifest: {module} is quantized but {partner} is not; serving engines take both or none")
            continue
        for sibling in sibling_set(module):
            if sibling in found.linears and group_of.get(sibling) != index:
                state = "in another group" if sibling in group_of else "not quantized"
                raise ValueError(
                    f"manifest: {module} is quantized but its sibling {sibling} is {state}; serving engines fuse siblings and keep "
                    "one global scale, so put them in one group"
                )


def refuse_unless(is_finite: bool, name: str) -> None:
    """Raise ValueError with the name of a weight."""
    if not is_finite:
        raise ValueError(f"{name} holds NaN or Inf (in the dtype that is served), which is never written; nothing was exported")
