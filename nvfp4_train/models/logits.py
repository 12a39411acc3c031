"""How a causal LM makes logits of the hidden states of its body, so that a loss can make them a few rows at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from nvfp4_train.models.causal_lm import call_on_tokens, compute_logits
from nvfp4_train.quant.undisturbed import undisturbed

PROBE_TOKENS = 4
SMALLEST, LARGEST = -8.0, 16.0
"""Powers of two of the magnitudes in the probe: tanh(x / cap) is linear to float32 at one end, and 1 at the other."""


@dataclass(frozen=True)
class LogitMap:
    """What becomes of a product x of the hidden state and the output embedding: z = scale x, or cap tanh(scale x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits z."""
        z = x if self.scale == 1 else x * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def slope(self, z: Tensor) -> "Tensor | float":
        """dz / dx at the logits z."""
        return self.scale if self.cap is None else self.scale * (1 - (z / self.cap).square())


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """What the body of a transformers model gives its output embedding, [B, T, H], of tokens as `compute_logits` takes them."""
    return call_on_tokens(model.base_model, input_ids, position_ids).last_hidden_state  # type: ignore


@torch.no_grad()
def find_logit_map(model: nn.Module, input_ids: Tensor) -> LogitMap | None:
    """The map of a model, found by one forward of a few tokens of input_ids, int64 [B, T]; under FSDP2 on every rank.

    The output embedding's output is replaced by a probe, and the logits say what became of it. None where logits are made in
    another way: the body's output goes through more than the output embedding, or that is more than a product with its weight.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    head, body = model.get_output_embeddings(), model.base_model
    if head is None or body is model:
        return None
    seen: dict[str, Any] = {"is product": False}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = getattr(output, "last_hidden_state", None)

    def replace(module: Any, args: Any, output: Tensor) -> Tensor:
        hidden = seen["hidden"]
        seen["is product"] = hidden is not None and hidden.equal(args[0]) and _is_product(module, args[0], output)
        seen["probe"] = _probe(output)
        return seen["probe"]

    with undisturbed(model):
        handles = [body.register_forward_hook(keep), head.register_forward_hook(replace)]
        try:
            logits = compute_logits(model, input_ids[:1, :PROBE_TOKENS])
        finally:
            for handle in handles:
                handle.remove()
    return _fit(seen["probe"], logits.float()) if seen["is product"] else None


def _is_product(head: Any, hidden: Tensor, output: Tensor) -> bool:
    if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.dtype != hidden.dtype:
        return False
    expected = F.linear(hidden, head.weight, getattr(head, "bias", None))
    return torch.allclose(output.float(), expected.float(), rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def _probe(output: Tensor) -> Tensor:
    """Values of both signs and of all magnitudes in the shape of the output, float32 so that the model's own rounding is small."""
    powers = torch.linspace(SMALLEST, LARGEST, output.numel() // 2, device=output.device).exp2()
    values = torch.cat((powers, -powers, powers[: output.numel() % 2]))
    return values.view(output.shape)


def _fit(x: Tensor, z: Tensor) -> LogitMap | None:
    if z.shape != x.shape:
        return None
    x, z = x.flatten(), z.flatten()
    scale = (z[0] / x[0]).item()
    largest = x.argmax()
    # A cap holds the largest value far below its product with the scale.
    is_capped = z[largest] < 0.5 * scale * x[largest]
    scale = round(scale) if abs(scale - round(scale)) < 1e-5 else scale
    found = LogitMap(scale=float(scale), cap=z[largest].item() if is_capped else None)
    return found if scale > 0 and torch.allclose(found(x), z, rtol=1e-4) else None
