"""Writes the NVFP4 checkpoint when training has ended and its last checkpoint is saved."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor, distributed
from transformers import PreTrainedModel

from nvfp4_train.export.compressed_tensors import export_compressed_tensors, write_compressed_tensors
from nvfp4_train.export.gathered import FAILED_ON_FIRST_RANK, GatheredWeights
from nvfp4_train.module import QATModule
from nvfp4_train.quant.linear import SERVED_DTYPE
from nvfp4_train.quant.sharded import ShardedWeightStore


class Export(Callback):
    """Exports to `folder`, and proves that the folder decodes to the weights that the last forward used."""

    def __init__(self, *, folder: str, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"callbacks.export.max_shard_bytes must be at least 1, got {max_shard_bytes}")
        if Path(folder).exists() and not overwrite:
            raise ValueError(
                f"callbacks.export.folder must not exist yet, got {folder}; choose another run_dir, or set "
                "callbacks.export.overwrite=true"
            )
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.max_shard_bytes = max_shard_bytes

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        model, store = pl_module.model, pl_module.store
        assert model is not None and store is not None
        if not store.is_enabled:
            store.update()
        options: dict[str, Any] = {
            "tokenizer": trainer.datamodule.tokenizer,  # type: ignore[attr-defined]
            "generation_config": model.generation_config,
            "max_shard_bytes": self.max_shard_bytes,
            "overwrite": self.overwrite,
        }
        report = None
        with first_rank_awaited():
            if isinstance(store, ShardedWeightStore):
                # What the last forward decoded is decoded again, to be compared with the folder.
                served = GatheredWeights(model, store)
                with served.answered() as is_writer:
                    if is_writer:
                        report = write_compressed_tensors(self.folder, served=served, **options)
            elif trainer.is_global_zero:
                weights = model.state_dict()
                compute_weights = {f"{name}.weight": store.compute_weight(name) for name, _ in store.modules()}
                report = export_compressed_tensors(
                    self.folder,
                    weights=weights,
                    groups=store.groups,
                    config=model.config,
                    rule=store.rule,
                    expected=_ComputeWeights(model, weights, compute_weights),
                    **options,
                )
        if report is not None:
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            pl_module.report(
                {
                    "export/bytes": report.verified.bytes,
                    "export/bits_per_weight": 8 * report.verified.bytes / num_parameters,
                    "export/bits_per_quantized_weight": report.verified.bits_per_weight,
                }
            )
        # The first rank may host what the others have waited by.
        trainer.strategy.barrier("export")


_waits = count()


@contextmanager
def first_rank_awaited() -> Iterator[None]:
    """A body that no rank leaves before the first one has left it, however long that takes.

    A collective would fail when the timeout of its process group is over, by default half an hour, and with it an export that takes
    longer. Raises RuntimeError on the others where the body failed on the first rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    store, key = distributed.distributed_c10d._get_default_store(), f"nvfp4_train/exports/{next(_waits)}"
    if distributed.get_rank() == 0:
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            store.set(key, outcome)
    else:
        yield
        while not store.check([key]):
            time.sleep(0.2)
        if store.get(key) != b"done":
            raise RuntimeError(FAILED_ON_FIRST_RANK)


class _ComputeWeights(Mapping[str, Tensor]):
    """What the last forward computed with, by `state_dict` name; rounded one tensor at a time, as it is asked for."""

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._quantized = quantized
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._quantized:
            return self._quantized[name]
        return self._weights[name].to(SERVED_DTYPE) if name in self._parameters else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
