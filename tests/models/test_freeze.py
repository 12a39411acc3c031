"""Parameters that are not trained."""

from collections.abc import Sequence

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn

from nvfp4_train.models.build import build_model, freeze
from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.optim import OptimConfig, build_optimizer, parameter_groups
from nvfp4_train.quant.policy import QuantConfig


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def test_patterns_are_of_whole_names_of_parameters() -> None:
    model = tiny_model("llama")
    freeze(model, ["*embed_tokens*", "lm_head*", "model.layers.0.mlp.*", "model.layers.?.input_layernorm.weight"])
    assert frozen_names(model) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)),
    }


def test_a_parameter_is_frozen_by_any_of_its_names() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    freeze(model, ["lm_head*"])
    assert frozen_names(model) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_without_patterns_everything_trains() -> None:
    model = tiny_model("llama")
    freeze(model, [])
    assert not frozen_names(model)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["lm_head*", "embed_tokens*"],
            r"optim\.frozen: pattern 'embed_tokens\*' matches no parameter; names look like model\.",
        ),
        (["*"], r"optim\.frozen must leave a parameter to train, got \['\*'\], which match all"),
        (["model.*", "lm_head.weight"], r"optim\.frozen must leave a parameter to train"),
    ],
)
def test_patterns_that_match_nothing_or_all_are_refused(patterns: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(tiny_model("llama"), patterns)


def test_a_string_is_no_list_of_patterns() -> None:
    with pytest.raises(ValueError, match=r"optim\.frozen must be a list of patterns, got the string 'lm_head\*'"):
        OptimConfig(frozen="lm_head*")


def test_what_is_frozen_has_no_gradient_and_is_not_in_the_optimizer() -> None:
    frozen = ["*embed_tokens*", "*layernorm*"]
    built = build_model(tiny_config("llama"), QuantConfig(), torch.device("cpu"), compute_dtype=torch.float32, frozen=frozen)
    built.store.update()
    compute_logits(built.model, torch.randint(3, 64, (1, 12))).logsumexp(-1).mean().backward()
    without = {name for name, parameter in built.model.named_parameters() if parameter.grad is None}
    assert without == frozen_names(built.model)
    assert len(without) == 5
    optimizer, _ = build_optimizer(built.model, OptimConfig(frozen=frozen, weight_decay=0.1), 3)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in built.model.parameters() if parameter.requires_grad}


def test_a_group_of_the_optimizer_that_would_be_empty_is_left_out() -> None:
    model = tiny_model("llama")
    freeze(model, ["*norm*", "*embed_tokens*"])
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.1
