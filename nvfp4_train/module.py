"""The LightningModule: a Hugging Face causal LM that trains with the weights that will be served."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nvfp4_train.checkpoints import check_same_weights, shapes
from nvfp4_train.finite import Diverged, bad_weights, describe, gradient_norms
from nvfp4_train.lightning_quirks import run_missing_validation
from nvfp4_train.losses.base import Batch, Loss, SequenceLoss, num_positions, num_positions_per_sequence
from nvfp4_train.losses.next_token import NextTokenLoss
from nvfp4_train.models.architecture import check_same_config
from nvfp4_train.models.build import ModelBuilder, build_model
from nvfp4_train.models.causal_lm import ModelConfig, choose_compute_dtype, compute_logits
from nvfp4_train.models.isolation import check_isolation
from nvfp4_train.models.not_built import NotBuilt
from nvfp4_train.models.prepare import prepare
from nvfp4_train.optim import OptimConfig, build_optimizer, take_options
from nvfp4_train.quant.inputs import InputQuantizers
from nvfp4_train.quant.policy import QuantConfig, Selection
from nvfp4_train.quant.state import QuantState
from nvfp4_train.quant.store import WeightStore
from nvfp4_train.sequence_metrics import SequenceCollector, SequenceMetrics, over_ranks
from nvfp4_train.strategy import FullyShardedStrategy

SHARDING_STRATEGIES = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)
"""Strategies of Lightning that shard. Under them every rank trains by itself if a module does not shard itself as they expect."""


class TrainClock:
    """Seconds spent on training: it stands still inside `paused`."""

    def __init__(self) -> None:
        self._paused_s = 0.0

    def now(self) -> float:
        """Training seconds since an arbitrary origin. Waits for the device, so that the work queued so far is counted."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return perf_counter() - self._paused_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the context, for evaluation and reports."""
        start = self.now()
        try:
            yield
        finally:
            self._paused_s += self.now() - start


class QATModule(L.LightningModule):
    """Batches are {"input_ids": int64 [B, T], ...}. `loss` is what training minimizes, by default the next token's cross-entropy.

    `train/loss` and the other losses of training are logged of the last micro-batch of a step on the first rank, so that no step waits
    for the others; those of validation are means over all ranks.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        quant: QuantConfig,
        optim: OptimConfig,
        loss: Loss | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`options` are those of the run, plain data that its checkpoints keep beside the weights."""
        super().__init__()
        self.model_config = model
        self.quant_config = quant
        self.optim_config = optim
        self.loss = loss or NextTokenLoss()
        self.seed = seed
        self.options = dict(options or {})
        self.model: PreTrainedModel | None = None
        self.selection: Selection | None = None
        self.store: WeightStore | None = None
        self.quant_state: QuantState | None = None
        self.inputs: InputQuantizers | None = None
        self.not_built: NotBuilt | None = None
        self.original_note: str | None = None
        self.compute_dtype = torch.bfloat16
        self.compute_dtype_reason = ""
        self.clock = TrainClock()
        self.has_started = False
        """Whether training has begun. Errors before that are the user's to correct."""
        self.trained_parameters: list[Tensor] = []
        """Those of the optimizer, in its order."""
        self.gradient_norms = torch.zeros(0)
        """Of the last step, before it was clipped, see `finite.gradient_norms`."""
        self.results: dict[str, float] = {}
        """The run's final numbers, by metric name."""
        self._keeps_history = False
        self.sequences: dict[str, SequenceMetrics] = {}
        """What the evaluations among them found, sequence by sequence, by `metrics.evaluated_state`."""

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision must be 32-true or bf16-mixed, got {precision}: masters are fp32, the model computes as "
                "model.compute_dtype says, and neither needs a loss scale"
            )
        dtype, reason = choose_compute_dtype(self.model_config.compute_dtype, self.trainer.strategy.root_device)
        if dtype is torch.float32 and precision == "bf16-mixed":
            raise ValueError(
                f"trainer.precision must be 32-true where the model computes in float32, got bf16-mixed; {reason}: set "
                "trainer.precision=32-true, or model.compute_dtype=bfloat16"
            )
        if self.model_config.attn_implementation == "flex_attention" and self.trainer.strategy.root_device.type == "cpu":
            raise ValueError(
                "model.attn_implementation=flex_attention computes no gradients on a CPU; set another, or trainer=gpu"
            )

    def on_train_start(self) -> None:
        # Every strategy has restored its checkpoint by now, and with it the options of the run that saved it.
        schedule: Any = self.lr_schedulers()
        for optimizer in self.trainer.optimizers:
            for line in take_options(self, optimizer, schedule, self.optim_config):
                self.print(line)
        self.has_started = True
        # After the callbacks', which make the quantized weights.
        run_missing_validation(self.trainer)

    def configure_model(self) -> None:
        # Lightning calls this again for every later fit, validate or test.
        if self.model is not None:
            return
        strategy = None if self._trainer is None else self._trainer.strategy
        if isinstance(strategy, SHARDING_STRATEGIES) and not isinstance(strategy, FullyShardedStrategy):
            raise ValueError(
                "trainer.strategy must be nvfp4_train.strategy.FullyShardedStrategy to shard a model (trainer=fsdp2 or hsdp), "
                f"got {type(strategy).__name__}"
            )
        device = self.device if strategy is None else strategy.root_device
        self.compute_dtype, self.compute_dtype_reason = choose_compute_dtype(self.model_config.compute_dtype, device)
        sharding: dict[str, Any] = {}
        if isinstance(strategy, FullyShardedStrategy):
            sharding = {"mesh": strategy.shard_mesh, "reshard_after_forward": strategy.reshard_after_forward}
        built = build_model(
            self.model_config,
            self.quant_config,
            device,
            compute_dtype=self.compute_dtype,
            frozen=self.optim_config.frozen,
            **sharding,
        )
        self.loss.prepare(
            ModelBuilder(
                student=built.model,
                config=self.model_config,
                device=device,
                compute_dtype=self.compute_dtype,
                mesh=sharding.get("mesh"),
            )
        )
        self.model, self.selection, self.store, self.inputs = built.model, built.selection, built.store, built.inputs
        self.not_built, self.original_note = built.not_built, built.note
        # As a module of this one it is in every checkpoint.
        self.quant_state = built.store.state
        if self._keeps_history:
            built.store.keep_history()
        # DDP would broadcast it in every forward; all ranks have the same.
        self._ddp_params_and_buffers_to_ignore = [f"quant_state.{name}" for name, _ in self.quant_state.named_buffers()]
        if strategy is not None and getattr(self.trainer.datamodule, "isolates_documents", False):  # type: ignore[attr-defined]
            check_isolation(self.model, device)
            if isinstance(teacher := getattr(self.loss, "teacher", None), torch.nn.Module):
                check_isolation(teacher, device, name="the teacher")

    def keep_history(self) -> None:
        """Let the store keep the history of codes, see `WeightStore.keep_history`. Callbacks call it in their setup."""
        self._keeps_history = True
        if self.store is not None:
            # Lightning sets up callbacks again for every later fit.
            self.store.keep_history()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V], in the dtype of the computation, of token ids [B, T]."""
        assert self.model is not None, "configure_model has not run"
        return compute_logits(self.model, input_ids)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # The seed depends on the position alone, so that a resumed run draws what an uninterrupted one draws.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(hash((self.seed, self.trainer.global_step, micro_batch, self.global_rank)) % 2**63)
        if isinstance(self.model, FSDPModule):
            # Gradients of the other micro-batches add up on each rank.
            is_last = micro_batch + 1 == self.trainer.accumulate_grad_batches or self.trainer.is_last_batch
            self.model.set_requires_gradient_sync(is_last)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, metrics = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"], prog_bar=True)  # type: ignore[union-attr]
        for name, value in metrics.items():
            self.log(f"train/{name}", value)
        return loss * batch["loss_scale"][0] if "loss_scale" in batch else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, metrics = self._loss(batch)
        # Lightning 2.6 averages the weights over ranks, and rounds where they are integers.
        weight: Any = float(num_positions(batch))
        for name, value in {"loss": loss, **metrics}.items():
            self.log(f"val/{name}", value, prog_bar=name == "loss", sync_dist=True, batch_size=weight)

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.model is not None, "configure_model has not run"
        return self.loss(self.model, batch)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The means of `measure`."""
        return self.measure(batches).means()

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> SequenceMetrics:
        """The loss, by the name `loss`, and its metrics of every sequence of the batches of all ranks, with the weights as they are.

        A rank has every world_size-th sequence of the held-out text. The clock stands still meanwhile. Raises ValueError if no position
        counts. A collective.
        """
        with self.clock.paused():
            was_training = self.training
            self.eval()
            collector = SequenceCollector()
            for batch in batches:
                positions = num_positions_per_sequence(batch)
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                with self.trainer.precision_plugin.forward_context():
                    parts = self._parts(batch)
                if len(next(iter(parts.values()))) < len(positions):
                    positions = positions.sum(0, keepdim=True)
                collector.add(positions, parts)
            self.train(was_training)
            return over_ranks({"": collector})[""]

    def _parts(self, batch: Batch) -> dict[str, Tensor]:
        """What each sequence of a batch adds to its means, [B]; [1] of a loss that knows the means alone."""
        assert self.model is not None, "configure_model has not run"
        if isinstance(self.loss, SequenceLoss):
            return self.loss.per_sequence(self.model, batch)
        loss, metrics = self._loss(batch)
        return {name: value.reshape(1) for name, value in {"loss": loss, **metrics}.items()}

    def prepare(self, batches: Iterable[tuple[Batch, bool]], progress: Callable[[Iterable], Iterable] = iter) -> list[str]:
        """Calibrate and equalize the model before it is first quantized, see `models.prepare`. Returns lines for the user."""
        assert self.model is not None and self.store is not None
        optimizers = [] if self._trainer is None else self.trainer.optimizers
        with self.clock.paused():
            return prepare(
                self.model,
                self.store,
                self.quant_config,
                batches,
                optimizer=optimizers[0] if optimizers else None,
                progress=progress,
            )

    @property
    def is_calibrated(self) -> bool:
        """Whether the inputs of quantized weights have scales, without which they cannot be quantized. Waits for the device."""
        assert self.inputs is not None
        return self.inputs.is_calibrated

    def update(self, *, refit: bool = False) -> None:
        """Let the forward compute with the quantized model of the current masters, see `WeightStore.update`.

        The first time it raises ValueError where inputs that are to be quantized, in training or as it is served, have no scale.
        """
        assert self.store is not None and self.inputs is not None
        if not self.store.is_enabled and self.quant_config.needs_input_scales:
            self.inputs.check_calibrated()
        self.store.update(refit=refit)

    @contextmanager
    def serving(self, name: str) -> Iterator[None]:
        """Compute inside the context with the quantized model as one of `quant.policy.SERVINGS` does."""
        assert self.inputs is not None
        with self.inputs.serving(name):
            yield

    def report(self, metrics: dict[str, float]) -> None:
        """Log metrics now, and keep them among the results."""
        self.results |= metrics
        self.log_metrics(metrics)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Hand metrics to every logger now; unlike `log`, at any moment of a run."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.model is not None, "configure_model has not run"
        optimizer, schedule = build_optimizer(self.model, self.optim_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning 2.6 refuses to clip for a fused optimizer under bf16-mixed, which has no scaler to undo.
        self.trained_parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm, self.gradient_norms = gradient_norms(self.trained_parameters)
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.trained_parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.trained_parameters, gradient_clip_val, norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is None:
            return
        assert self.model is not None
        path = Path(str(self.trainer.ckpt_path))
        # FullyShardedStrategy has loaded the weights itself.
        if "state_dict" in checkpoint:
            check_same_weights(path, shapes(checkpoint["state_dict"]), shapes(self.state_dict()))
        saved = checkpoint.get("hyper_parameters", {}).get("export", {})
        check_same_config(path, saved.get("config", {}), self.model.config.to_dict())
        if (there := saved.get("path", self.model_config.path)) != self.model_config.path:
            self.print(f"model.path was {there} in the run that saved {path}, is {self.model_config.path} here")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None and self.selection is not None
        # Lightning calls this before it writes, and on every rank.
        if bad := bad_weights(self.model):
            raise Diverged(f"step {self.trainer.global_step}: {describe('the weight', bad)}; no checkpoint of it is written")
        # Plain data only: checkpoints are read with weights_only.
        generation_config = getattr(self.model, "generation_config", None)
        checkpoint["hyper_parameters"] = {
            "options": self.options,
            "export": {
                "config": self.model.config.to_dict(),
                "generation_config": None if generation_config is None else generation_config.to_dict(),
                "manifest": self.selection.manifest.to_dict(),
                "path": self.model_config.path,
                "not_built": None if self.not_built is None else self.not_built.to_dict(),
            },
        }
