"""Short runs of a small Llama on fixed tokens, the same global batch whatever the number of ranks."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from whole import whole_tensors

from nvfp4_train.callbacks.requantize import Requantize
from nvfp4_train.kernels.fp4_kernel import nvfp4_quantize
from nvfp4_train.lightning_quirks import rewind_to_last_step
from nvfp4_train.models.causal_lm import ModelConfig
from nvfp4_train.module import QATModule
from nvfp4_train.optim import OptimConfig
from nvfp4_train.quant.policy import QuantConfig
from nvfp4_train.quant.sharded import ShardedWeightStore
from nvfp4_train.quant.store import WeightStore
from nvfp4_train.strategy import AnyCheckpointIO, FullyShardedStrategy, ReplicatedStrategy

# Rows of 16, 32, 48 and 64: three ranks cannot share most of them evenly.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
for message in (
    ".*does not have many workers",
    ".*LeafSpec",
    ".*broadcast_buffers",
    ".*not resumable",
    ".*all_gather_into_tensor",
):
    warnings.filterwarnings("ignore", message=message)


class Stream(IterableDataset):
    """Has no length, as the stream of a real run: Lightning ends an accumulation window where it sees the data end."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


class Tokens(L.LightningDataModule):
    """Sequence i of a stream is micro-batch i // world_size of rank i % world_size."""

    def __init__(self, num_sequences: int) -> None:
        super().__init__()
        self.sequences = torch.randint(0, 64, (num_sequences, 1, 12), generator=torch.Generator().manual_seed(0))
        # As many as one, two, three and four ranks share evenly, and enough to calibrate with.
        self.calibration = torch.randint(0, 64, (24, 1, 12), generator=torch.Generator().manual_seed(1))

    def calibration_batches(self, num_sequences: int) -> list[tuple[dict[str, Tensor], bool]]:
        return [(batch, True) for batch in self._batches(self.calibration[:num_sequences])]

    def _batches(self, sequences: Tensor) -> list[dict[str, Tensor]]:
        return [{"input_ids": ids} for ids in sequences[distributed.get_rank() :: distributed.get_world_size()]]

    def train_dataloader(self) -> DataLoader:
        rewind_to_last_step(self.trainer)
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches * distributed.get_world_size()
        return DataLoader(Stream(self._batches(self.sequences[done:])), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._batches(self.sequences[:12]), batch_size=None)


class Snapshots(L.Callback):
    """What the run holds when training starts, when it ends, and how it got there."""

    def __init__(self) -> None:
        self.taken: dict[str, Any] = {"losses": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken["start"] = snapshot(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.taken["losses"].append(outputs["loss"].item())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken["end"] = snapshot(pl_module)


class StopAndSave(L.Callback):
    """Saves a checkpoint after an optimizer step, and ends the run."""

    def __init__(self, step: int, path: str) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class SaveFirst(L.Callback):
    """Saves a checkpoint before the first step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def snapshot(module: Any) -> dict[str, Any]:
    store = module.store
    weights = {name: store.compute_weight(name).cpu().clone() for name in store.manifest.names} if store.is_enabled else {}
    masters = {name: tensor.cpu().clone() for name, tensor in whole_tensors(module.model)}
    packed = {name: whole_packed(store, name, masters[name]) for name in store.names} if store.is_enabled else {}
    return {
        "masters": masters,
        "compute_weights": weights,
        "codes": {name: codes for name, (codes, _) in packed.items()},
        "block_scales": {name: scales for name, (_, scales) in packed.items()},
        "slots": {name: store.slots(name).start for name in packed},
        "global_scale": store.global_scale.cpu().clone(),
        "global_amax": store.global_amax.cpu().clone(),
    }


def whole_packed(store: WeightStore, name: str, whole: Tensor) -> list[Tensor]:
    """Codes and E4M3 block scales of a quantized weight, both uint8: as its ranks send them, or of the whole master."""
    if not isinstance(store, ShardedWeightStore):
        s2 = store.global_scale[store.slots(name)].cpu()
        return [part.view(torch.uint8) for part in nvfp4_quantize(whole, s2, store.manifest.rule)]
    master = store._parameter(name)
    assert isinstance(master, DTensor)
    parts = []
    for rows in store.local_packed(name):
        shape = torch.Size((master.shape[0], rows.shape[1]))
        sharded = DTensor.from_local(
            rows.view(torch.uint8), master.device_mesh, master.placements, shape=shape, stride=(shape[1], 1)
        )
        # On one rank this is the memory that the next update writes.
        parts.append(sharded.full_tensor().cpu().clone())
    return parts


def strategy(name: str, **options: Any) -> Any:
    if name == "fsdp2":
        return FullyShardedStrategy(**options)
    if name == "ddp":
        return ReplicatedStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    return "auto"


def make_module(model: dict[str, Any] | None = None, **quant: Any) -> QATModule:
    model = dict(model or {})
    checkpointing = model.pop("gradient_checkpointing", False)
    path = model.pop("path", None)
    compute_dtype = model.pop("compute_dtype", "bfloat16")
    torch.manual_seed(0)
    return QATModule(
        model=ModelConfig(path=path, config=LLAMA | model, gradient_checkpointing=checkpointing, compute_dtype=compute_dtype),
        quant=QuantConfig(**quant),
        optim=OptimConfig(lr=1e-2),
    )


def make_trainer(how: str, *, sharding: dict[str, Any] | None = None, callbacks: tuple[L.Callback, ...] = (), **options: Any):
    defaults: dict[str, Any] = {
        "accelerator": "cpu" if distributed.get_backend() == "gloo" else "gpu",
        "devices": distributed.get_world_size(),
        "strategy": strategy(how, **(sharding or {})),
        "plugins": None if how == "fsdp2" else AnyCheckpointIO(),
        "callbacks": [Requantize(), *callbacks],
        "max_steps": 3,
        "max_epochs": -1,
        # A norm of reductions in another order would scale gradients by another last bit; this one scales by 1.
        "gradient_clip_val": 1e6,
        "limit_val_batches": 0,
        "inference_mode": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**defaults | options)


def train(
    how: str,
    *,
    sequences_per_step: int = 8,
    steps: int = 3,
    model: dict[str, Any] | None = None,
    quant: dict[str, Any] | None = None,
    sharding: dict[str, Any] | None = None,
    save: tuple[int, str] | None = None,
    resume: str | None = None,
    save_first: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Snapshots of a run of `steps` optimizer steps; a rank takes its share of the sequences, one after the other.

    `save` is a step after which to save to a path and stop, `resume` the path of a checkpoint to continue from.
    """
    module = make_module(model, **(quant or {}))
    snapshots = Snapshots()
    accumulate = sequences_per_step // distributed.get_world_size()
    trainer = make_trainer(
        how,
        sharding=sharding,
        callbacks=(snapshots, *([SaveFirst(save_first)] if save_first else []), *([StopAndSave(*save)] if save else [])),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        **options,
    )
    trainer.fit(module, Tokens(sequences_per_step * steps), ckpt_path=resume, weights_only=True)
    return snapshots.taken
