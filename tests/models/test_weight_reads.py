import pytest
from tiny_models import tiny_config

from nvfp4_train.models.causal_lm import load_config
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.weight_reads import read_past_forward
from nvfp4_train.quant.policy import QuantConfig, select


@pytest.mark.parametrize(("family", "leaf"), [("llama", None), ("zamba2", None), ("mamba2", "out_proj")])
def test_linears_whose_weight_is_read_past_their_forward_are_found(family: str, leaf: str | None) -> None:
    layout = HubLayout(load_config(tiny_config(family)))
    names = [name.removesuffix(".weight") for name in select(layout.model, QuantConfig(), layout).manifest.names]
    assert {name.rpartition(".")[2] for name in read_past_forward(layout.model, names)} == ({leaf} if leaf else set())
