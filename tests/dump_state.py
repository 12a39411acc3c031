"""A callback that writes what every rank holds at the end of training."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from whole import whole_tensors

from nvfp4_train.kernels.fp4_kernel import nvfp4_quantize


class DumpState(Callback):
    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)
        self.all_reduces: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.all_reduces:
            self._count_all_reduces(pl_module.store)

    def _count_all_reduces(self, store: Any) -> None:
        """Record the number of collectives of every later update of the store."""
        update, all_reduce = store.update, torch.distributed.all_reduce

        def counted_update(**options: Any) -> None:
            calls = []

            def counted_all_reduce(*args: Any, **kwargs: Any) -> Any:
                calls.append(args)
                return all_reduce(*args, **kwargs)

            torch.distributed.all_reduce = counted_all_reduce
            try:
                update(**options)
            finally:
                torch.distributed.all_reduce = all_reduce
            self.all_reduces.append(len(calls))

        store.update = counted_update
        self.all_reduces.append(-1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        store = pl_module.store
        packed = {name: nvfp4_quantize(store.master(name), store.global_scale[store.slots(name)]) for name in store.names}
        state = {
            "masters": {name: tensor.clone() for name, tensor in whole_tensors(pl_module.model)},
            "codes": {name: codes for name, (codes, _) in packed.items()},
            "scales": {name: scales.view(torch.uint8) for name, (_, scales) in packed.items()},
            "global_scale": store.global_scale,
            "compute_weights": {name: store.compute_weight(name).clone() for name in store.manifest.names},
            "all_reduces": self.all_reduces[1:],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")
