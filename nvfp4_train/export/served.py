"""What an export writes: every tensor of a model as it is served, asked for one at a time.

There are three sources: master weights (`masters`), the store of a replicated model (`replicated`), and the ranks of a sharded one
(`gathered`).
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor

from nvfp4_train.export.formats.base import QuantizedTensor
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import linears_of, sibling_set, unfit


class ServedWeights(Mapping[str, Tensor]):
    """The tensors of a model by `state_dict` name, without tied copies, each with the value that a reader has to compute with.

    Raises ValueError where no reader could read the quantized weights of the manifest as such.
    """

    def __init__(self, layout: HubLayout, manifest: QuantManifest) -> None:
        check_manifest(manifest, layout)
        self.layout = layout
        self.manifest = manifest
        self._quantized = frozenset(manifest.names)

    def is_quantized(self, name: str) -> bool:
        return name in self._quantized

    @abstractmethod
    def plain(self, name: str) -> Tensor:
        """An unquantized tensor in the dtype that is served."""

    @abstractmethod
    def quantized(self, name: str) -> QuantizedTensor:
        """A quantized weight as it is written. Its tensors share no memory with other weights: safetensors would refuse that."""

    @abstractmethod
    def compute_weight(self, name: str) -> Tensor:
        """A quantized weight [N, K] in bf16, as the forward computes with it: what the written one must decode to."""

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
    linears, reasons = linears_of(layout.model), unfit(layout.model, layout)
    group_of: dict[str, int] = {}
    for index, group in enumerate(manifest.groups):
        for name in group:
            module = name.removesuffix(".weight")
            if module not in linears or name == module:
                raise ValueError(f"manifest: {name} is no weight of an nn.Linear of {layout.architecture}")
            if module in group_of:
                raise ValueError(f"manifest: {name} is listed twice; a weight is in exactly one group")
            if module in reasons:
                raise ValueError(f"manifest: {name} cannot be served in NVFP4: {reasons[module]}")
            group_of[module] = index
    if not group_of:
        raise ValueError("manifest must name at least one weight to quantize, got none")
    for module, index in group_of.items():
        for sibling in sibling_set(module):
            if sibling in linears and group_of.get(sibling) != index:
                state = "in another group" if sibling in group_of else "not quantized"
                raise ValueError(
                    f"manifest: {module} is quantized but its sibling {sibling} is {state}; serving engines fuse siblings and keep "
                    "one global scale, so put them in one group"
                )


def refuse_unless(is_finite: bool, name: str) -> None:
    """Raise ValueError with the name of a weight."""
    if not is_finite:
        raise ValueError(f"{name} holds NaN or Inf (in the dtype that is served), which is never written; nothing was exported")
