import copy
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

import nvfp4_train
from nvfp4_train.quant.policy import QuantConfig
from nvfp4_train.quant.served import modules_of_unit, served_units, show_served, units_of

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_model(family, dtype, **EXPERTS if family in ("mixtral", "qwen3_moe") else {})


def test_parameters_are_shared_and_keep_their_names() -> None:
    model = tiny("qwen2")
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    model(input_ids=torch.arange(8).view(1, 8))
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_served_bf16_model(family: str) -> None:
    """The reference is the Hugging Face model in bf16 holding the compute weights: difference 0.0, quantized and not."""
    model = tiny(family).eval()
    served = tiny(family, torch.bfloat16).eval()
    served.load_state_dict(model.state_dict())
    ids = torch.randint(0, 64, (2, 20))
    store = nvfp4_train.quantize(model, QuantConfig(enabled=False), compute_dtype=torch.bfloat16)
    assert torch.equal(model(input_ids=ids).logits, served(input_ids=ids).logits)

    store.update()
    for name in store.names:
        served.get_parameter(name).data.copy_(store.compute_weight(name))
    assert torch.equal(model(input_ids=ids).logits, served(input_ids=ids).logits)


def test_a_computation_in_float32_has_the_same_served_values() -> None:
    model = tiny("llama").eval()
    served = copy.deepcopy(model)
    store = nvfp4_train.quantize(model)
    with torch.no_grad():
        for name, parameter in served.named_parameters():
            parameter.copy_(store.compute_weight(name) if name in store.names else parameter.bfloat16())
    ids = torch.randint(0, 64, (2, 20))
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, served(input_ids=ids).logits)


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
def test_gradient_goes_straight_through_to_the_master(compute_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4))
    store = nvfp4_train.quantize(model, compute_dtype=compute_dtype)
    x = torch.randn(3, 16).to(compute_dtype)
    out = model(x)
    weight, bias = store.compute_weight("0.weight"), model[0].bias.bfloat16().to(compute_dtype)
    assert torch.equal(out, F.linear(x, weight, bias))
    grad = torch.randn(3, 4).to(compute_dtype)
    out.backward(grad)
    assert model[0].weight.grad.dtype == torch.float32
    assert torch.equal(model[0].weight.grad, (grad.T @ x).float())
    assert torch.equal(model[0].bias.grad, grad.sum(0).float())


def test_any_module_with_linears_in_one_call() -> None:
    """The example of the README: an optimizer step, an update, and the forward has the new weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16))
    store = nvfp4_train.quantize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.randn(4, 32)
    before = model(x)
    before.square().mean().backward()
    optimizer.step()
    assert torch.equal(model[3].weight.grad.isfinite(), torch.ones(16, 64, dtype=torch.bool))
    store.update()
    assert not torch.equal(model(x), before)
    assert store.manifest.names == ["0.weight", "3.weight"]


def test_a_body_and_a_head_that_are_called_by_themselves_show_served_values() -> None:
    """A loss may compute the logits in pieces."""
    model = tiny("gemma2")
    store = nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    ids = torch.randint(0, 64, (1, 12))
    whole = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(hidden, whole.hidden_states[-1])
    logits = model.lm_head(hidden)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in store.names)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"])
def test_other_transformers_classes(kind: str) -> None:
    config = transformers.AutoConfig.for_model(
        "bert" if "Masked" in kind else "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, kind).from_config(config).eval()
    served = copy.deepcopy(model)
    store = nvfp4_train.quantize(model)
    with torch.no_grad():
        for name, parameter in served.named_parameters():
            parameter.copy_(store.compute_weight(name) if name in store.names else parameter.bfloat16())
    ids = torch.randint(1, 64, (1, 12))
    assert len(store.names) >= 12
    assert torch.equal(model(input_ids=ids)[0], served(input_ids=ids)[0])


def test_buffers_are_served_too() -> None:
    """A falcon_h1 of fp32 computes some of them in fp32, its readers in bf16."""
    model = tiny_model("falcon_h1").eval()
    served = tiny_model("falcon_h1", torch.bfloat16).eval()
    served.load_state_dict(model.state_dict())
    store = nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    for name in store.names:
        served.get_parameter(name).data.copy_(store.compute_weight(name))
    ids = torch.randint(0, 64, (1, 12))
    assert torch.equal(model(input_ids=ids).logits, served(input_ids=ids).logits)


def test_a_linear_alone_is_quantized() -> None:
    model = nn.Linear(16, 4)
    store = nvfp4_train.quantize(model)
    assert store.names == ["weight"]
    x = torch.randn(2, 16)
    assert torch.equal(model(x), F.linear(x, store.compute_weight("weight"), model.bias.bfloat16().float()))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.LayerNorm(4), {}, "must have an nn.Linear, got LayerNorm"),
        (nn.Identity(), {}, "must have an nn.Linear, got Identity"),
        (nn.Linear(16, 4).half(), {}, r"weight must be float32 or bfloat16, got torch.float16; see model.float\(\)"),
        (nn.Linear(16, 4), {"compute_dtype": torch.float16}, "compute_dtype must be torch.bfloat16 or torch.float32"),
    ],
)
def test_what_cannot_be_quantized_is_refused(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nvfp4_train.quantize(model, **options)


def test_a_second_store_of_one_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    nvfp4_train.quantize(model)
    with pytest.raises(ValueError, match="must not have been quantized before"):
        nvfp4_train.quantize(model)


def compiled_and_eager(enabled: bool) -> list[Tensor]:
    model = tiny("llama")
    nvfp4_train.quantize(model, QuantConfig(enabled=enabled), compute_dtype=torch.bfloat16)
    layer = model.model.layers[0]
    hidden = model.model.embed_tokens(torch.randint(0, 64, (2, 16)))
    position = model.model.rotary_emb(hidden, torch.arange(16).unsqueeze(0))
    compiled = torch.compile(copy.copy(layer), backend="aot_eager", fullgraph=True)
    found = []
    for forward in (layer, compiled):
        out = forward(hidden, position_embeddings=position)
        found += [out, *torch.autograd.grad(out.sum(), [layer.mlp.down_proj.weight, layer.input_layernorm.weight])]
    return found


@pytest.mark.parametrize("enabled", [False, True])
def test_compiled_forward_has_no_graph_break_and_equals_eager(enabled: bool) -> None:
    found = compiled_and_eager(enabled)
    for eager, compiled in zip(found[:3], found[3:], strict=True):
        assert torch.equal(eager, compiled)


def test_one_compilation_serves_all_layers() -> None:
    model = tiny_model("llama", num_hidden_layers=10)
    nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    ids = torch.randint(0, 64, (1, 16))
    eager = model(input_ids=ids, use_cache=False).logits
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(1)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, eager)
    assert len(graphs) == 1


def test_gradient_checkpointing_computes_with_the_same_weights() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
        ids = torch.arange(32).reshape(2, 16)
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


class Mixer(nn.Module):
    """Reads the parameters of its children, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 16)
        self.inner = nn.Linear(16, 16)
        self.error: BaseException | None = None
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.seen = [self.inner.weight, self.inner.bias, self.table.weight, *self.parameters()]
        x = self.table(ids) @ self.inner.weight + self.table.weight[:1]
        if self.error is not None:
            raise self.error
        return self.inner(x)


def test_whoever_reads_a_parameter_sees_it_as_it_is_served() -> None:
    torch.manual_seed(0)
    model = Mixer()
    store = nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    model(torch.arange(4)).sum().backward()
    served = {"inner.weight": store.compute_weight("inner.weight")}
    expected = [served.get(name, p.detach().bfloat16()) for name, p in model.named_parameters()]
    order = ["table.weight", "inner.weight", "inner.bias"]
    assert [name for name, _ in model.named_parameters()] == order
    seen = dict(zip(["inner.weight", "inner.bias", "table.weight"], model.seen[:3], strict=True))
    for name, value, again in zip(order, expected, model.seen[3:], strict=True):
        assert torch.equal(seen[name], value)
        assert torch.equal(again, value)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_exception_in_a_forward_leaves_the_masters_in_place(error: BaseException) -> None:
    model = Mixer()
    nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    before = dict(model.named_parameters())
    model.error = error
    with pytest.raises(type(error)):
        model(torch.arange(4))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_an_embedding_rounds_the_rows_that_it_looks_up() -> None:
    """Its gradients add up in fp32: a row that is looked up 1000 times gets 1000 times the gradient, not what bf16 makes of it."""
    model = nn.Sequential(nn.Embedding(2, 16), nn.Linear(16, 16, bias=False))
    nvfp4_train.quantize(model, compute_dtype=torch.bfloat16)
    out = model[0](torch.zeros(1001, dtype=torch.long))
    assert torch.equal(out[0], model[0].weight[0].bfloat16())
    out.sum().backward()
    assert torch.equal(model[0].weight.grad[0], torch.full((16,), 1001.0))


def test_units_are_layers_and_what_recomputes_and_the_root() -> None:
    model = tiny_model("zamba2")
    units = served_units(model)
    show_served(model, units)
    assert {type(unit).__name__ for unit in units} >= {"Zamba2MambaDecoderLayer", "Zamba2HybridLayer"}
    shown = [module for _, unit in units_of(model) for module in modules_of_unit(unit)]
    owners = [module for module in model.modules() if any(p is not None for p in module._parameters.values())]
    assert len(shown) == len(set(shown)) == len(owners)


def test_kernels_need_no_transformers() -> None:
    code = "import sys, nvfp4_train.kernels.fp4_kernel; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
