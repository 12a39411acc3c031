import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.losses.next_token import next_token_loss
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.module import QATModule, TrainClock
from nvfp4_train.optim import OptimConfig
from nvfp4_train.quant.policy import CalibrationConfig, QuantConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make(cls: type[QATModule] = QATModule, /, **options: object) -> QATModule:
    model = ModelConfig(
        config=LLAMA | dict(options.pop("config", {})),
        compile=bool(options.pop("compile", False)),
        compute_dtype=str(options.pop("compute_dtype", "auto")),
    )
    torch.manual_seed(0)
    # The random tokens below are too few to calibrate with.
    quant = QuantConfig(calibration=CalibrationConfig(sequences=0), equalize=None, **options)
    module = cls(model=model, quant=quant, optim=OptimConfig(lr=1e-2))
    module.configure_model()
    return module


class Tokens(L.LightningDataModule):
    """Fixed random tokens; the validation batches have unequal sizes."""

    def __init__(self, num_batches: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.batches = [{"input_ids": torch.randint(0, 64, (2, 12), generator=generator)} for _ in range(num_batches)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batches[0], {"input_ids": self.batches[1]["input_ids"][:1]}], batch_size=None)


class UnmarkedTokens(Tokens):
    """No held-out token is to be predicted."""

    def val_dataloader(self) -> DataLoader:
        batches = [{**batch, "loss_mask": torch.zeros_like(batch["input_ids"], dtype=torch.bool)} for batch in self.batches]
        return DataLoader(batches, batch_size=None)


def fit(module: QATModule, data: Tokens | None = None, **options: object) -> L.Trainer:
    defaults: dict = {
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "callbacks": [Requantize()],
    }
    trainer = L.Trainer(**(defaults | options))
    trainer.fit(module, data or Tokens())
    return trainer


def test_held_out_masks_without_positions_are_refused_before_the_first_step() -> None:
    module = make(start_step=2)
    with pytest.raises(ValueError, match="held-out sequences must have a position that counts"):
        fit(module, data=UnmarkedTokens())
    assert not module.has_started


def test_evaluation_weights_every_sequence_alike() -> None:
    module = make()
    module._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    first, second, third = torch.randint(0, 64, (3, 12))
    together = module.evaluate([{"input_ids": torch.stack([first, second, third])}])
    apart = module.evaluate([{"input_ids": torch.stack([first, second])}, {"input_ids": third[None]}])
    assert apart.keys() == {"loss"}
    assert apart["loss"] == pytest.approx(together["loss"], rel=1e-3)
    assert module.training, "the mode is restored"


def test_evaluation_weights_every_position_that_counts_alike() -> None:
    module = make()
    module._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ids, mask = torch.randint(0, 64, (3, 12)), torch.rand(3, 12) < 0.4
    mask[0, 1:] = False
    together = module.evaluate([{"input_ids": ids, "loss_mask": mask}])
    apart = module.evaluate([{"input_ids": ids[i : i + 1], "loss_mask": mask[i : i + 1]} for i in range(3)])
    assert apart["loss"] == pytest.approx(together["loss"], rel=1e-3)
    with pytest.raises(ValueError, match="held-out sequences must have a position that counts, got none"):
        module.evaluate([{"input_ids": ids[:1], "loss_mask": mask[:1]}])


def test_sequences_are_measured_one_by_one() -> None:
    module = make()
    module._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ids, mask = torch.randint(0, 64, (3, 12)), torch.rand(3, 12) < 0.4
    mask[0, 1:] = False
    found = module.measure([{"input_ids": ids, "loss_mask": mask}])
    assert found.positions.tolist() == mask[:, 1:].sum(1).tolist()
    for row in (1, 2):
        alone = module.evaluate([{"input_ids": ids[row : row + 1], "loss_mask": mask[row : row + 1]}])
        assert found.values["loss"][row] == pytest.approx(alone["loss"], rel=1e-3)


def test_of_a_loss_that_knows_means_alone_batches_are_measured() -> None:
    module = make()
    module._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    own, ids = module.loss, torch.randint(0, 64, (3, 12))
    batches = [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]
    expected = module.evaluate(batches)
    module.loss = lambda model, batch: own(model, batch)
    found = module.measure(batches)
    assert found.positions.tolist() == [24, 12]
    assert found.means() == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_works_with_the_fused_optimizer_in_every_precision(precision: str) -> None:
    module = make(compute_dtype="bfloat16")
    norms = []
    module.on_before_zero_grad = lambda optimizer: norms.append(  # type: ignore[method-assign]
        math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))
    )
    trainer = fit(module, gradient_clip_val=1e-3, precision=precision)
    assert trainer.callback_metrics["train/grad_norm"] > 1e-3, "what is logged is the norm before clipping"
    assert norms[-1] == pytest.approx(1e-3, rel=1e-3)


def test_masters_train_while_the_forward_is_quantized() -> None:
    module = make(start_step=2)
    before = {name: p.clone() for name, p in module.named_parameters()}
    fit(module)
    assert module.store.is_enabled
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert {"val/loss_ptq", "val/loss_master_at_switch", "val/loss_quantized", "val/loss_master"} <= module.results.keys()


@pytest.mark.parametrize(("start_step", "expected"), [(0, [True] * 4), (2, [False, False, True, True]), (4, [False] * 4)])
def test_quantization_starts_at_its_step(start_step: int, expected: list[bool]) -> None:
    module = make(start_step=start_step)
    seen = []
    training_step = module.training_step
    module.training_step = lambda *args: (seen.append(module.store.is_enabled), training_step(*args))[1]  # type: ignore[method-assign]
    fit(module)
    assert seen == expected


class Evaluated(QATModule):
    """Tests and predicts, too."""

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return next_token_loss(self(batch["input_ids"]), batch["input_ids"])


class SaveEarlier(L.Callback):
    """Saves a checkpoint after the first step, with the quantized loss of then."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: QATModule, *args: object) -> None:  # type: ignore[override]
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path)
            self.loss = pl_module.evaluate(Tokens().val_dataloader())["loss"]


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_evaluation_of_a_checkpoint_computes_with_its_quantized_weights(how: str, tmp_path: Path) -> None:
    module = make(Evaluated)
    earlier = SaveEarlier(tmp_path / "earlier.ckpt")
    trainer = fit(module, callbacks=[Requantize(), earlier], limit_val_batches=1.0)
    loader = Tokens().val_dataloader()

    def evaluate(**options: object) -> float:
        found = getattr(trainer, how)(module, loader, weights_only=True, **options)
        if how != "predict":
            return found[0]["val/loss"]
        # The first batch has two sequences, the second has one.
        return (2 * found[0].item() + found[1].item()) / 3

    assert evaluate() == pytest.approx(module.results["val/loss_quantized"], rel=1e-6)
    assert evaluate(ckpt_path=earlier.path) == pytest.approx(earlier.loss, rel=1e-6)
    assert earlier.loss != pytest.approx(module.results["val/loss_quantized"], rel=1e-3)


def test_evaluation_in_a_run_does_not_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    updates = []
    monkeypatch.setattr(module.store, "update", lambda refit, update=module.store.update: (updates.append(1), update()))
    fit(module, limit_val_batches=1.0, val_check_interval=1, num_sanity_val_steps=1)
    assert len(updates) == 5, "at the start, and after each of four steps"


def test_a_run_trains_on_with_weights_that_an_evaluation_quantized() -> None:
    """Lightning evaluates under inference_mode, whose tensors no backward may save."""
    module = make()
    trainer = fit(module, limit_val_batches=1.0)
    state = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    module.model.load_state_dict(state, assign=True)
    before = trainer.validate(module, Tokens().val_dataloader())[0]["val/loss"]
    assert before == pytest.approx(module.results["val/loss_quantized"], rel=1e-6)
    fit(module)


def test_without_quantization_both_pairs_of_losses_are_taken_at_the_end() -> None:
    module = make(enabled=False)
    fit(module)
    assert module.results["val/loss_ptq"] == module.results["val/loss_quantized"]
    assert module.results["val/loss_master_at_switch"] == module.results["val/loss_master"]


def test_dropout_depends_on_the_place_in_the_run_alone() -> None:
    """Else a resumed run would draw other masks than an uninterrupted one."""
    draws = []
    for noise in (0, 5):
        module = make()
        module._trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=3, global_rank=0)
        torch.rand(noise)
        for batch_idx in (6, 7):
            module.on_train_batch_start({}, batch_idx)
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_clock_stands_still_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 12.0, 13.0])
    monkeypatch.setattr("nvfp4_train.module.perf_counter", lambda: next(times))
    clock = TrainClock()
    start = clock.now()
    with clock.paused():
        pass
    assert clock.now() - start == 2.0


def test_compiling_keeps_the_names_of_the_checkpoint() -> None:
    assert make(compile=True).state_dict().keys() == make().state_dict().keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_training_step_is_one_graph_per_state_of_the_switch() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = make(compile=True).cuda()
    ids = torch.randint(0, 64, (2, 16), device="cuda")
    module(ids).float().sum().backward()
    module.store.update()
    module(ids).float().sum().backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_strategy_that_shards_in_a_way_of_its_own_is_refused() -> None:
    module = QATModule(model=ModelConfig(config=LLAMA), quant=QuantConfig(), optim=OptimConfig())
    module._trainer = SimpleNamespace(strategy=ModelParallelStrategy())  # type: ignore[assignment]
    with pytest.raises(ValueError, match="must be nvfp4_train.strategy.FullyShardedStrategy .* got ModelParallelStrategy"):
        module.configure_model()
