"""Depth and kind of a parameter, from its name."""

import pytest

from nvfp4_train.quant.layer_names import layer_place


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "self_attn.q_proj")),
        ("model.language_model.layers.12.mlp.experts.gate_up_proj", (12, "mlp.experts.gate_up_proj")),
        ("model.layers.0.feed_forward.experts.7.w1.weight", (0, "feed_forward.experts.*.w1")),
        ("transformer.h.5.attn.c_attn", (5, "attn.c_attn")),
        ("lm_head.weight", (None, "lm_head")),
    ],
)
def test_a_name_tells_depth_and_kind(name: str, place: tuple[int | None, str]) -> None:
    assert layer_place(name) == place
