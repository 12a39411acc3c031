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
        layout = HubLayout(config)
        check_tensors(weights, layout)
        super().__init__(layout, manifest, state)
        self._weights = weights
        self._global_scales = self._find_global_scales()
        for name in self:
            if not self.is_quantized(name):
                refuse_unless(bool(self.plain(name).isfinite().all()), name)

    def plain(self, name: str) -> Tensor:
        return to_served(name, self._weights[name].detach(), self.layout)

    def quantized(self, name: str) -> QuantizedTensor:
        s2 = self._global_scales[name].to(self._weights[name].device)
        pieces = (nvfp4_quantize(rows, s2, self.manifest.rule, steps) for rows, steps in self._pieces(name))
        codes, scales = zip(*pieces, strict=True)
        # Concatenated as bytes, because cat knows no float8 on CUDA in some versions.
        block_scales = torch.cat([part.view(torch.uint8) for part in scales]).view(scales[0].dtype)
        s2 = self._global_scales[name].reshape(1).clone()
        return QuantizedTensor(torch.cat(codes)[None], block_scales[None], s2, self.input_scale(name))

    def compute_weight(self, name: str) -> Tensor:
        s2, rule = self._global_scales[name].to(self._weights[name].device), self.manifest.rule
        return torch.cat([nvfp4_fake_quant(rows, s2, SERVED_DTYPE, rule, steps) for rows, steps in self._pieces(name)])

    def _pieces(self, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The rows of a quantized master, some at a time, with their steps where the rule has some."""
        weight = self._weights[name].detach()
        pieces = weight.split(rows_at_once(weight.shape[1]))
        if not self.manifest.rule.is_fitted:
            return ((rows, None) for rows in pieces)
        steps = self._from_state(name, "steps").to(weight.device)
        return zip(pieces, steps.split(len(pieces[0])), strict=True)

    def _find_global_scales(self) -> dict[str, Tensor]:
        """s2 of each quantized weight, one element on the CPU."""
        scales = {}
        for group in self.manifest.groups:
            amaxes = []
            for name in group:
                amaxes.append(nvfp4_block_amax(self._weights[name].detach()).amax().cpu())
                refuse_unless(bool(amaxes[-1].isfinite()), name)
            if amaxes:
                s2 = nvfp4_global_scale(torch.stack(amaxes).amax(), self.manifest.rule)
                scales.update(dict.fromkeys(group, s2))
        return scales


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
