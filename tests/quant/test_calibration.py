"""Statistics of inputs are what their definitions say, and bad input is one clear line."""

import re
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvfp4_train.quant.calibration import DAMPING, Calibration, calibrate
from nvfp4_train.quant.policy import QuantConfig, select

VOCABULARY, WIDTH = 32, 48


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32, bias=False)
        self.down_proj = nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class Experts(nn.Module):
    """Tokens of which expert e is asked have id % 4 == e."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out[ids % 4 == index] = expert(x[ids % 4 == index])
        return x + out


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, ids)
        return x


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def sequences(number: int = 4, length: int = 128, ids: Iterable[int] = range(VOCABULARY)) -> list[Tensor]:
    choice = torch.tensor(list(ids))
    generator = torch.Generator().manual_seed(0)
    return [choice[torch.randint(len(choice), (1, length), generator=generator)] for _ in range(number)]


def measure(model: nn.Module, batches: Iterable[Tensor | None]) -> Calibration:
    """Of sequences; None is one that does not count."""
    manifest = select(model, QuantConfig()).manifest
    counted = [
        ({"input_ids": torch.ones(1, 64, dtype=torch.int64) if ids is None else ids}, ids is not None) for ids in batches
    ]
    return calibrate(model, manifest, counted, lambda batch: model(batch["input_ids"]))


def test_statistics_are_those_of_the_inputs() -> None:
    model, batches = toy(), sequences()
    found = measure(model, [None, *batches, None])
    assert not found.notes
    assert len(found.statistics) == 2 * 4 * 2, "gate and up have one input"
    for expert in range(4):
        # What the first layer's experts receive.
        ids = torch.cat(batches, dim=1).flatten()
        x = model.embedding.weight[ids[ids % 4 == expert]].detach().double()
        statistics = found.statistics[f"layers.0.experts.{expert}.gate_proj.weight"]
        blocks = x.view(-1, WIDTH // 16, 16)
        second_moments = torch.einsum("tbi,tbj->bij", blocks, blocks) / len(x)
        damped = second_moments + DAMPING * x.square().mean() * torch.eye(16)
        torch.testing.assert_close(statistics.hessian, damped.float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(statistics.rms, x.square().mean(0).sqrt().float(), rtol=1e-6, atol=0)
        assert torch.equal(statistics.amax, x.abs().amax(0).float())
        assert statistics.num_tokens == len(x)
        assert statistics.hessian.shape == (WIDTH // 16, 16, 16)
        assert {t.dtype for t in (statistics.hessian, statistics.amax, statistics.rms)} == {torch.float32}


def test_long_inputs_are_taken_in_parts() -> None:
    """More tokens than have a float64 copy at once, of an input in bf16."""
    x = torch.randn(1, 1500, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = nn.Sequential(nn.Linear(32, 16)).bfloat16()
    manifest = select(model, QuantConfig()).manifest
    (statistics,) = calibrate(model, manifest, [({"input_ids": x[..., 0]}, True)], lambda batch: model(x)).statistics.values()
    blocks = x.double().view(-1, 2, 16)
    expected = torch.einsum("tbi,tbj->bij", blocks, blocks) / 1500
    off_diagonal = ~torch.eye(16, dtype=torch.bool).expand(2, 16, 16)
    torch.testing.assert_close(statistics.hessian[off_diagonal], expected.float()[off_diagonal], rtol=1e-5, atol=1e-7)
    assert statistics.num_tokens == 1500


def test_the_order_of_sequences_does_not_matter() -> None:
    model, batches = toy(), sequences(8)
    first = "layers.0.experts.0.gate_proj.weight"
    expected = measure(model, batches).statistics[first]
    found = measure(model, reversed(batches)).statistics[first]
    assert torch.equal(found.hessian, expected.hessian)
    assert torch.equal(found.rms, expected.rms)


def test_divided_statistics_are_those_of_divided_inputs() -> None:
    model, batches = toy(), sequences()
    name = "layers.0.experts.1.gate_proj.weight"
    statistics = measure(model, batches).statistics[name]
    s = torch.linspace(0.5, 4, WIDTH)
    with torch.no_grad():
        model.embedding.weight /= s
    expected = measure(model, batches).statistics[name]
    divided = statistics.divided_by(s)
    torch.testing.assert_close(divided.hessian, expected.hessian, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(divided.rms, expected.rms)
    torch.testing.assert_close(divided.amax, expected.amax)
    assert divided.num_tokens == expected.num_tokens


def test_the_model_is_left_as_it_was() -> None:
    model = toy()
    model.layers[1].eval()
    was_training = [module.training for module in model.modules()]
    seen: list[int] = []

    def watched() -> Iterable[tuple[dict[str, Tensor], bool]]:
        for ids in sequences(3):
            seen.append(model.training)
            yield {"input_ids": ids}, True

    calibrate(model, select(model, QuantConfig()).manifest, watched(), lambda batch: model(batch["input_ids"]))
    assert seen == [False] * 3
    assert [module.training for module in model.modules()] == was_training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_group_without_tokens_takes_the_statistics_of_its_like() -> None:
    """Pooled over all experts of its layer that saw some."""
    model = toy()
    found = measure(model, sequences(ids=[0, 4, 1, 5, 9, 2]))
    assert found.notes == [
        f"{layer}.experts.3.{leaf} saw no calibration token: it takes the statistics of {layer}.experts.0.{leaf} and 2 more"
        for layer in ("layers.0", "layers.1")
        for leaf in ("gate_proj", "down_proj")
    ]
    own = [found.statistics[f"layers.1.experts.{expert}.down_proj.weight"] for expert in range(4)]
    assert own[3].num_tokens == sum(statistics.num_tokens for statistics in own[:3]) == 4 * 128
    mean = sum(statistics.hessian.double() * statistics.num_tokens for statistics in own[:3]) / own[3].num_tokens
    torch.testing.assert_close(own[3].hessian, mean.float(), rtol=1e-5, atol=1e-8)
    assert torch.equal(own[3].amax, torch.stack([statistics.amax for statistics in own[:3]]).amax(0))


def test_dead_channels_are_named() -> None:
    model = toy()
    with torch.no_grad():
        model.embedding.weight[:, 16:33] = 0
    found = measure(model, sequences())
    assert found.notes == [
        f"layers.0.experts.{expert}.gate_proj has 17 dead input channels of 48: they were 0 in every calibration token"
        for expert in range(4)
    ]
    statistics = found.statistics["layers.0.experts.0.gate_proj.weight"]
    assert (statistics.rms == 0).sum() == 17
    # A block of dead inputs weighs all errors equally.
    identity = statistics.hessian[1] / statistics.hessian[1, 0, 0]
    assert torch.equal(identity, torch.eye(16))
    assert statistics.hessian[1, 0, 0] > 0


def kill_all(model: Toy) -> None:
    model.embedding.weight.zero_()


def break_one(model: Toy) -> None:
    model.layers[0].experts[2].gate_proj.weight[3, 4] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "batches", "message"),
    [
        (
            lambda model: None,
            lambda: sequences(1, 255),
            "calibration must see at least 256 tokens, got 255; raise quant.calibration.sequences or data.seq_len",
        ),
        (
            lambda model: None,
            lambda: [None] * 9,
            "calibration must see at least 256 tokens, got 0",
        ),
        (
            kill_all,
            sequences,
            "layers.0.experts.0.gate_proj must have an input to be calibrated, got 0 in all 48 channels",
        ),
        (
            break_one,
            sequences,
            "layers.0.experts.2.down_proj must have a finite input to be calibrated, got NaN, Inf or values above 1e18",
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    spoil: Callable[[Toy], None], batches: Callable[[], list[Tensor | None]], message: str
) -> None:
    model = toy()
    with torch.no_grad():
        spoil(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(model, batches())


def test_a_weight_that_nothing_reaches_is_refused() -> None:
    model = toy()
    model.unused = nn.Linear(64, 16)
    with pytest.raises(
        ValueError, match=r"but unused saw no token, nor has its layer another input of its size; raise quant\.calib"
    ):
        measure(model, sequences())


def test_modules_that_share_a_weight_are_all_measured() -> None:
    """One group, because they have one weight, but two inputs."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.second.weight = self.first.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.second(F.relu(self.first(self.embedding(ids))))

    torch.manual_seed(0)
    model, batches = Shared(), sequences()
    (statistics,) = measure(model, batches).statistics.values()
    x = model.embedding.weight[torch.cat(batches, dim=1).flatten()].detach()
    inputs = torch.cat((x, F.relu(model.first(x)).detach()))
    assert statistics.num_tokens == len(inputs) == 2 * 4 * 128
    torch.testing.assert_close(statistics.rms, inputs.square().mean(0).sqrt())
