"""Writes the NVFP4 checkpoint when training has ended and its last checkpoint is saved."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import distributed

from nvfp4_train.callbacks.run_facts import run_facts
from nvfp4_train.errors import RunError
from nvfp4_train.export.gathered import FAILED_ON_FIRST_RANK, FailedOnFirstRank, FromRanks
from nvfp4_train.export.passed_through import PassedThrough
from nvfp4_train.export.registry import folders_of
from nvfp4_train.export.replicated import FromStore
from nvfp4_train.export.served import ServedWeights
from nvfp4_train.export.writer import MAX_SHARD_BYTES, ExportReport, export_model
from nvfp4_train.module import QATModule
from nvfp4_train.progress import progress
from nvfp4_train.quant.inputs import InputSample, record_inputs
from nvfp4_train.quant.sharded import ShardedWeightStore


class Export(Callback):
    """Exports to `folder`, and proves that the folder decodes to the weights that the last forward used.

    `format` is the name of a file in export/formats/, or `both` for compressed_tensors in `folder` and modelopt in `folder_modelopt`.
    `command` is what started the run, for the model card. List it after the callbacks whose results the card reports.
    """

    def __init__(
        self,
        *,
        folder: str,
        format: str = "compressed_tensors",
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        command: Sequence[str] | None = None,
    ) -> None:
        # An unknown name ends the run before it begins.
        self.folders = folders_of(format, Path(folder))
        if max_shard_bytes < 1:
            raise ValueError(f"callbacks.export.max_shard_bytes must be at least 1, got {max_shard_bytes}")
        for target in self.folders.values():
            if target.exists() and not overwrite:
                raise ValueError(
                    f"callbacks.export.folder must not exist yet, got {target}; choose another run_dir, or set "
                    "callbacks.export.overwrite=true"
                )
        self.overwrite = overwrite
        self.max_shard_bytes = max_shard_bytes
        self.command = command or ()
        self.reports: list[ExportReport] = []
        """Of the folders that were written, in the order of `folders`, on the first rank."""

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
            "inputs": self._record_inputs(trainer, pl_module),
            "files_from": pl_module.model_config.path,
            "run": run_facts(trainer, pl_module, self.command),
            "progress": progress,
        }
        with first_rank_awaited():
            if isinstance(store, ShardedWeightStore):
                # What the last forward decoded is decoded again, to be compared with the folder.
                ranks = FromRanks(model, store)
                with ranks.answered() as is_writer:
                    if is_writer:
                        self.reports = self._write(ranks, pl_module, options)
            elif trainer.is_global_zero:
                self.reports = self._write(FromStore(model, store), pl_module, options)
        if self.reports:
            report = self.reports[0]
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            pl_module.report(
                {
                    "export/bytes": report.verified.bytes,
                    "export/bits_per_weight": 8 * report.verified.bytes / num_parameters,
                    "export/bits_per_quantized_weight": report.verified.bits_per_weight,
                }
            )
        # Rank 0's process may host the TCP store that the other ranks poll, so it must not exit before they are done.
        trainer.strategy.barrier("export")

    def _write(self, served: ServedWeights, pl_module: QATModule, options: dict[str, Any]) -> list[ExportReport]:
        """A folder of each format. The first stays if a later one fails."""
        reports, passed_through = [], _passed_through(pl_module)
        for format, folder in self.folders.items():
            reports.append(export_model(folder, served, format=format, passed_through=passed_through, **options))
            print(reports[-1], flush=True)
        return reports

    @staticmethod
    def _record_inputs(trainer: Trainer, pl_module: QATModule) -> list[InputSample]:
        """What the forward makes of a held-out batch, for the verification of a folder with quantized inputs. A collective."""
        model, store, inputs = pl_module.model, pl_module.store, pl_module.inputs
        assert model is not None and store is not None and inputs is not None
        if store.manifest.activations == "none":
            return []
        batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
        return record_inputs(model, inputs, lambda: pl_module(batch["input_ids"].to(pl_module.device)))


def _passed_through(module: QATModule) -> PassedThrough | None:
    if module.not_built is None or not module.not_built.kept:
        return None
    return PassedThrough(module.not_built, module.model_config.path)


DONE = "done"
SECONDS_TO_SPEAK = 1
_waits = count()


@contextmanager
def first_rank_awaited() -> Iterator[None]:
    """No rank leaves the body before rank 0 has left it, however long that takes.

    A collective would fail after the timeout of its process group, by default half an hour; an export may take longer. Raises
    FailedOnFirstRank on the other ranks where the body failed on rank 0, with the reason where that was a RunError.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    store, key = distributed.distributed_c10d._get_default_store(), f"nvfp4_train/exports/{next(_waits)}"
    if distributed.get_rank() == 0:
        outcome = FAILED_ON_FIRST_RANK
        try:
            yield
            outcome = DONE
        except RunError as error:
            outcome = str(error)
            raise
        finally:
            store.set(key, outcome)
    else:
        # Where the first rank writes with the help of this one, this one may hear of the failure within the body.
        with suppress(RunError):
            yield
        while not store.check([key]):
            time.sleep(0.2)
        if (outcome := store.get(key).decode()) != DONE:
            # The first rank speaks first: torchrun ends all ranks when one has ended.
            time.sleep(SECONDS_TO_SPEAK)
            raise FailedOnFirstRank(outcome)
