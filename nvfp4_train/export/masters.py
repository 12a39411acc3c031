"""Served weights from masters, those of a checkpoint or of a state dict: checked against the config, scaled and quantized."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nvfp4_train.checkpoints import SavedTensors
from nvfp4_train.export.formats.base import QuantizedTensor
from nvfp4_train.export.served import ServedWeights, refuse_unless, to_served
from nvfp4_train.kernels.fp4_kernel import nvfp4_block_amax, nvfp4_fake_quant, nvfp4_global_scale, nvfp4_quantize
from nvfp4_train.models.layout import HubLayout, shown
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.served import SERVED_DTYPE

MASTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS_AT_ONCE = 1 << 20
"""Elements of a piece. Intermediates take 20 bytes an element on the CPU; pieces keep them small next to a large matrix."""


class FromMasters(ServedWeights):
    """Served weights quantized from masters by `state_dict` name, on any device. Tied copies may be left out.

    Raises ValueError where weights, manifest, config and state do not fit together, or a weight is NaN or Inf.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        manifest: QuantManifest,
        config: PretrainedConfig,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(HubLayout(config), manifest, state)
        check_tensors(weights, self.layout)
        self._weights = weights
        self._global_scales = self._find_global_scales()
        for name in self:
            if not self.is_quantized(name):
                refuse_unless(bool(self.plain(name).isfinite().all()), name)

    def plain(self, name: str) -> Tensor:
        return to_served(name, self._weights[name].detach(), self.layout)

    def quantized(self, name: str) -> QuantizedTensor:
        pieces = (nvfp4_quantize(rows, s2, self.manifest.rule, steps) for rows, s2, steps in self._pieces(name))
        codes, scales = zip(*pieces, strict=True)
        # Concatenated as bytes, because cat knows no float8 on CUDA in some versions.
        block_scales = torch.cat([part.view(torch.uint8) for part in scales]).view(scales[0].dtype)
        num_slots = self._global_scales[name].numel()
        return QuantizedTensor(
            torch.cat(codes).view(num_slots, -1, codes[0].shape[-1]),
            block_scales.view(num_slots, -1, block_scales.shape[-1]),
            self._global_scales[name].clone(),
            self.input_scale(name),
        )

    def compute_weight(self, name: str) -> Tensor:
        rule = self.manifest.rule
        decoded = [nvfp4_fake_quant(rows, s2, SERVED_DTYPE, rule, steps) for rows, s2, steps in self._pieces(name)]
        return torch.cat(decoded).view(self.layout.tensors[name].shape)

    def _pieces(self, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The rows of a quantized master, some of one slot at a time, with s2, and their steps where the rule has some."""
        weight = _slots(self._weights[name].detach())
        steps = _slots(self._from_state(name, "steps").to(weight.device)) if self.manifest.rule.is_fitted else None
        num_rows = rows_at_once(weight.shape[-1])
        for slot, s2 in enumerate(self._global_scales[name].to(weight.device)):
            for start in range(0, weight.shape[1], num_rows):
                part = slot, slice(start, start + num_rows)
                yield weight[part], s2, None if steps is None else steps[part]

    def _find_global_scales(self) -> dict[str, Tensor]:
        """s2 of each quantized weight, float32 [S] on the CPU."""
        scales = {}
        for group in self.manifest.groups:
            amaxes = []
            for name in group:
                slots = _slots(self._weights[name].detach())
                amaxes.append(torch.stack([nvfp4_block_amax(matrix).amax() for matrix in slots]).cpu())
                refuse_unless(bool(amaxes[-1].isfinite().all()), name)
            if amaxes:
                of_group = torch.stack(amaxes).amax(0)
                s2 = torch.stack([nvfp4_global_scale(amax, self.manifest.rule).reshape(()) for amax in of_group])
                scales.update(dict.fromkeys(group, s2))
        return scales


def _slots(tensor: Tensor) -> Tensor:
    """A tensor of a weight as [S, N, ...]: one slot of a matrix, one of every expert."""
    return tensor if tensor.dim() == 3 else tensor[None]


def check_tensors(weights: Mapping[str, Tensor], layout: HubLayout) -> None:
    """Check tensors against a config by name, shape and dtype. Raises ValueError.

    Tensors of a checkpoint on disk are read when they are asked for. Here that happens only where two of them are tied.
    """
    if missing := layout.tensors.keys() - weights.keys():
        raise ValueError(f"weights must hold every tensor of {layout.architecture}, missing: {shown(missing)}")
    if unknown := weights.keys() - layout.tensors.keys() - layout.aliases.keys():
        raise ValueError(f"weights must hold tensors of {layout.architecture} only, got unknown names: {shown(unknown)}")
    for name, tensor in layout.tensors.items():
        described = weights.meta(name) if isinstance(weights, SavedTensors) else weights[name]
        if described.shape != tensor.shape:
            raise ValueError(f"{name} must have the shape {tuple(tensor.shape)} of the config, got {tuple(described.shape)}")
        if name not in layout.buffers and described.dtype not in MASTER_DTYPES:
            raise ValueError(f"{name} must be a float master weight, got {described.dtype}")
    for name, source in layout.aliases.items():
        if name in weights and not _is_same(weights[name], weights[source]):
            raise ValueError(
                f"{name} and {source} are tied in the config but differ; set tie_word_embeddings=False to keep both"
            )


def _is_same(alias: Tensor, source: Tensor) -> bool:
    # Tied tensors are normally one storage. A copy with other values would be lost. Both have to be alive while addresses are
    # compared, because a tensor read from disk may get the address of the last one.
    return alias.data_ptr() == source.data_ptr() or alias.equal(source)


def rows_at_once(num_columns: int) -> int:
    """How many rows of a matrix are quantized or decoded at a time, so that intermediate results stay small beside it."""
    return max(1, ELEMENTS_AT_ONCE // num_columns)
