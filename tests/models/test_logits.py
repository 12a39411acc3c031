from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.models.logits import LogitMap, find_logit_map, hidden_states

IDS = torch.arange(24).view(2, 12)
MINICPM3: dict[str, Any] = {
    "dim_model_base": 16, "head_dim": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, LogitMap()),
        ("phi", {}, LogitMap()),
        ("gemma2", {}, LogitMap(1.0, 30.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitMap()),
        ("cohere", {}, LogitMap(0.0625)),
        ("granite", {"logits_scaling": 3.0}, LogitMap(1 / 3)),
        ("falcon_h1", {"lm_head_multiplier": 0.0195}, LogitMap(0.0195)),
        ("minicpm3", MINICPM3, None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_map_is_found_that_gives_the_models_logits(
    family: str, fields: dict[str, Any], expected: LogitMap | None, dtype: torch.dtype
) -> None:
    """Also where the logits of random weights are so small that no cap shows in them."""
    model = tiny_model(family, dtype, **fields)
    found = find_logit_map(model, IDS)
    assert model.training, "the mode is restored"
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert found.scale == pytest.approx(expected.scale, rel=1e-6)
    assert found.cap == expected.cap
    model.eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
        logits = compute_logits(model, IDS).float()
        mapped = found(model.lm_head(hidden_states(model, IDS)).float())
    assert logits.abs().max() > 2
    torch.testing.assert_close(mapped, logits, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-5)


def test_the_slope_is_that_of_the_map() -> None:
    x = torch.linspace(-9, 9, 40, dtype=torch.float64, requires_grad=True)
    for found in (LogitMap(), LogitMap(0.5), LogitMap(2.0, 4.0)):
        z = found(x)
        (slope,) = torch.autograd.grad(z.sum(), x)
        torch.testing.assert_close(torch.as_tensor(found.slope(z.detach()), dtype=torch.float64).expand(40), slope)


def test_logits_that_are_more_than_a_product_have_no_map() -> None:
    class Sharper(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).square()

    model = tiny_model("llama")
    model.lm_head.__class__ = Sharper
    assert find_logit_map(model, IDS) is None
    model = tiny_model("llama")
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.square()))
    assert find_logit_map(model, IDS) is None
