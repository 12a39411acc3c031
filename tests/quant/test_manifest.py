"""What was quantized, as a checkpoint holds it."""

import json

import pytest
import torch

from nvfp4_train.kernels.scale_rules import ScaleRule
from nvfp4_train.quant.manifest import QuantManifest

GROUPS = (("q.weight", "k.weight"), ("o.weight",))


@pytest.mark.parametrize("activations", ["none", "nvfp4"])
@pytest.mark.parametrize("rule", ["max", "hessian"])
def test_a_manifest_comes_back_from_plain_data(rule: str, activations: str, tmp_path) -> None:
    manifest = QuantManifest(groups=GROUPS, rule=ScaleRule(global_scale="exact", block_scale=rule), activations=activations)
    torch.save(manifest.to_dict(), tmp_path / "manifest.pt")
    for saved in (torch.load(tmp_path / "manifest.pt", weights_only=True), json.loads(json.dumps(manifest.to_dict()))):
        assert QuantManifest.from_dict(saved) == manifest
    assert manifest.names == ["q.weight", "k.weight", "o.weight"]


def test_a_manifest_from_before_quantized_inputs_has_none() -> None:
    manifest = QuantManifest(groups=GROUPS, rule=ScaleRule())
    saved = manifest.to_dict()
    del saved["activations"]
    assert QuantManifest.from_dict(saved) == manifest
    assert manifest.activations == "none"


@pytest.mark.parametrize(
    "spoilt", [{"rule": {"block_scale": "median"}}, {"rule": {"blocks": 16}}, {"groups": None}, {"rule": None}], ids=str
)
def test_what_is_no_manifest_is_refused(spoilt: dict) -> None:
    saved = QuantManifest(groups=GROUPS, rule=ScaleRule()).to_dict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        QuantManifest.from_dict(saved | spoilt)
    for name in ("groups", "rule"):
        with pytest.raises(KeyError):
            QuantManifest.from_dict({key: value for key, value in saved.items() if key != name})
