"""What was quantized and how, as plain data: from the policy to the store, the checkpoint and the export."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nvfp4_train.kernels.scale_rules import ScaleRule


@dataclass(frozen=True, kw_only=True)
class QuantManifest:
    """The quantized weights of a model, by parameter name."""

    groups: tuple[tuple[str, ...], ...]
    """Parameters that share one global scale. Every quantized parameter is in exactly one group."""
    rule: ScaleRule
    activations: str = "none"
    """`nvfp4` where the exported model quantizes the inputs of these weights (W4A4), `none` where it does not (W4A16)."""

    @property
    def names(self) -> list[str]:
        """All quantized parameters, group after group."""
        return [name for group in self.groups for name in group]

    def to_dict(self) -> dict[str, Any]:
        """The manifest as lists, strings and numbers alone, because checkpoints are read with weights_only."""
        return {
            "groups": [list(group) for group in self.groups],
            "rule": asdict(self.rule),
            "activations": self.activations,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "QuantManifest":
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError where `saved` is no manifest."""
        return cls(
            groups=tuple(tuple(group) for group in saved["groups"]),
            rule=ScaleRule(**saved["rule"]),
            # An older checkpoint knows weights only.
            activations=saved.get("activations", "none"),
        )
