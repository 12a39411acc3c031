"""The check that users get: silent where the training forward is the served one, and an error that names the module where it is not."""

import copy
import re

import pytest
import torch
from lightning import Trainer
from tiny_models import tiny_config
from torch import nn
from torch.utils.data import DataLoader

from nvfp4_train.callbacks.served_check import ServedCheck
from nvfp4_train.models.build import BuiltModel, build_model
from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.models.served_check import check_served
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig
from nvfp4_train.quant.policy import QuantConfig

IDS = torch.arange(1, 17).view(1, 16)


def build(family: str = "lfm2", compute_dtype: torch.dtype = torch.bfloat16, **options: bool) -> BuiltModel:
    torch.manual_seed(0)
    built = build_model(tiny_config(family, **options), QuantConfig(), torch.device("cpu"), compute_dtype=compute_dtype)
    with torch.no_grad():
        # Masters that are no bf16 values, norms and biases too.
        for parameter in built.model.parameters():
            parameter.mul_(1.001).add_(1e-4)
    return built


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "lfm2", "zamba2", "minimax", "gpt_oss"])
def test_a_model_that_computes_as_it_is_served_passes(family: str, compute_dtype: torch.dtype) -> None:
    built = build(family, compute_dtype)
    for _ in range(2):
        assert check_served(built.model, IDS, compute_dtype) > 10
        built.store.update()


def test_nothing_is_left_behind() -> None:
    built = build(gradient_checkpointing=True, compile=True)
    built.store.update()
    # Transformers sets hooks of its own in a first forward.
    compute_logits(built.model.eval(), IDS)
    built.model.train()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in built.model.modules()]
    before = {name: (id(p), p.clone()) for name, p in built.model.named_parameters()}
    compiled = [module._compiled_call_impl for module in built.model.modules()]
    assert any(compiled)
    check_served(built.model, IDS)
    assert built.model.training
    assert not torch.are_deterministic_algorithms_enabled()
    assert [module._compiled_call_impl for module in built.model.modules()] == compiled
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in built.model.modules()] == hooks
    for name, parameter in built.model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None


def shows_a_master(built: BuiltModel) -> None:
    """A unit that forgets one module, as a mechanism would that stops at the owner's forward."""
    layer = built.model.model.layers[0]
    layer.served_modules = tuple(served for served in layer.served_modules if served.module is not layer.conv.conv)


def has_another_buffer(built: BuiltModel) -> None:
    built.model.model.rotary_emb.inv_freq.mul_(1.01)


def computes_otherwise(built: BuiltModel) -> None:
    norm = built.model.model.layers[1].ffn_norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 1.5  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (shows_a_master, r"model\.layers\.0\.conv\.out_proj"),
        (has_another_buffer, r"model\.rotary_emb"),
        (computes_otherwise, r"model\.layers\.1\.ffn_norm"),
    ],
)
def test_the_first_module_that_differs_is_named(spoil, name: str) -> None:
    built = build()
    spoil(built)
    with pytest.raises(ValueError, match=rf"but {name} \(\w+\) is the first module .*; please report the model type lfm2"):
        check_served(built.model, IDS)


def test_a_module_that_does_not_repeat_itself_is_passed_over() -> None:
    built = build()
    norm: nn.Module = built.model.model.layers[0].operator_norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) + torch.rand(())  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=re.escape("model.layers.0.operator_norm gives another output each time")):
        check_served(built.model, IDS)


def with_quantized_inputs(family: str, compute_dtype: torch.dtype) -> BuiltModel:
    built = build(family, compute_dtype)
    for group in built.store.manifest.groups:
        # Small, so that values saturate: otherwise another power of two would make no difference.
        built.store.state.input_scale(group[0]).fill_(2.0**-13)
    built.store.update()
    built.inputs.enable()
    return built


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "lfm2", "zamba2", "minimax"])
def test_inputs_are_quantized_as_by_the_reference(family: str, compute_dtype: torch.dtype) -> None:
    built = with_quantized_inputs(family, compute_dtype)
    assert check_served(built.model, IDS, compute_dtype, built.inputs) > 10
    # Without them the plain class has other inputs.
    with pytest.raises(ValueError, match=r"is the first module with another output"):
        check_served(built.model, IDS, compute_dtype)
    with built.inputs.serving("w4a16"):
        assert check_served(built.model, IDS, compute_dtype, built.inputs) > 10


def test_an_input_that_is_quantized_by_another_groups_scale_is_found() -> None:
    built = with_quantized_inputs("llama", torch.bfloat16)
    other = copy.copy(built.inputs["model.layers.1.mlp.down_proj.weight"])
    other.scale = torch.tensor([2.0**-30])
    built.model.model.layers[1].mlp.down_proj.input_quantizer = other
    with pytest.raises(ValueError, match=r"but model\.layers\.1\.mlp\.down_proj \(NVFP4Linear\) is the first module"):
        check_served(built.model, IDS, torch.bfloat16, built.inputs)


def fit(spoiled: bool, **options: int) -> None:
    module = QATModule(model=tiny_config("lfm2"), quant=QuantConfig(), optim=OptimConfig())
    torch.manual_seed(0)
    module.configure_model()
    if spoiled:
        computes_otherwise(module)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[ServedCheck(**options)],
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"input_ids": IDS}], batch_size=None))


def test_a_run_is_checked_before_its_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    fit(spoiled=False)
    assert "the training forward is that of the plain Lfm2ForCausalLM" in capsys.readouterr().out
    with pytest.raises(ValueError, match="callbacks.served_check=null trains nevertheless"):
        fit(spoiled=True)
    with pytest.raises(ValueError, match="callbacks.served_check.tokens must be at least 2, got 1"):
        ServedCheck(tokens=1)
