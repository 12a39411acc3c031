"""Writes metrics.json and sequences.json at the end of a run, and prints a short summary."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed

from nvfp4_train.callbacks.requantize import changed, measure_of
from nvfp4_train.disk import replace_file
from nvfp4_train.export.side_files import copy_side_files
from nvfp4_train.loggers import SegmentedWandbLogger
from nvfp4_train.metrics import (
    EXPORT_BITS_PER_WEIGHT,
    EXPORT_BYTES,
    PEAK_GIB,
    PTQ,
    QUANTIZED,
    SQNR_DB,
    TOKENS_PER_S,
    VAL_LOSS_MASTER,
    VAL_LOSS_MASTER_AT_SWITCH,
    VAL_LOSS_PTQ,
    VAL_LOSS_QUANTIZED,
    evaluation_metric,
)
from nvfp4_train.models.architecture import has_own_code
from nvfp4_train.module import QATModule
from nvfp4_train.quant.policy import SERVINGS, selection_table


class RunSummary(Callback):
    """Prints what is quantized before training, and the outcome after it, which it writes with all validations of the run to
    metrics.json, with what the evaluations found sequence by sequence in sequences.json; keeps the tokenizer beside the checkpoints.

    List it after the callbacks whose results it reports.
    """

    def __init__(self, *, run_dir: str, tokenizer_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self.tokenizer_dir = Path(tokenizer_dir)
        self._validations: list[dict[str, float]] = []
        self._measured_by: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "measured_by": self._measured_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = list(state_dict["validations"])
        self._measured_by = dict(state_dict.get("measured_by", {}))

    def on_validation_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if found and trainer.state.fn == TrainerFn.FITTING:
            measured_by = measure_of(trainer, pl_module)
            if changed(self._measured_by, measured_by):
                # Those so far are in the metrics.csv of their own run.
                self._validations = []
            self._measured_by = measured_by
            self._validations.append({"step": trainer.global_step} | found)

    def on_fit_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        assert pl_module.model is not None and pl_module.selection is not None
        print(
            f"computes in {str(pl_module.compute_dtype).removeprefix('torch.')}: {pl_module.compute_dtype_reason}\n"
            f"NVFP4 policy\n{selection_table(pl_module.model, pl_module.selection)}",
            flush=True,
        )
        for lines in (pl_module.original_note, pl_module.not_built):
            if lines:
                print(lines, flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, SegmentedWandbLogger) and (address := logger.address()):
                print(f"wandb: {address}", flush=True)
        # An export from a checkpoint finds the tokenizer here, and what lies beside it in the folder of the model.
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        tokenizer.save_pretrained(self.tokenizer_dir)
        if (path := pl_module.model_config.path) is not None:
            code = has_own_code(pl_module.model.config)
            copy_side_files(path, self.tokenizer_dir, tokenizer=tokenizer, code=code)

    def on_train_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # The model is loaded, a checkpoint restored, and the weights quantized if they are from the first step on.
        host, device = peak_memory(pl_module.device)
        if trainer.is_global_zero and host:
            peaks = f"{host / 2**30:.2f} GiB of host memory" + (f", {device / 2**30:.2f} GiB of the device" if device else "")
            print(f"start-up took at most {peaks} on one rank", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # The results so far are on disk before the export begins.
        self._write_results(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._write_results(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()

        def row(label: str, *parts: tuple[str, str, str]) -> str:
            known = [f"{text} {pl_module.results[key]:{form}}" for text, key, form in parts if key in pl_module.results]
            return f"  {label:<16}{', '.join(known)}\n" if known else ""

        wandb = [logger for logger in trainer.loggers if isinstance(logger, SegmentedWandbLogger)]
        folders = [
            name
            for name in (
                "export",
                "export_modelopt",
                "checkpoints",
                "metrics.csv",
                "layers.csv",
                "metrics.json",
                "wandb",
                "tensorboard",
            )
            if (self.run_dir / name).exists()
        ]
        print(
            "\nRun summary\n"
            + row("at the switch", ("master", VAL_LOSS_MASTER_AT_SWITCH, ".4f"), ("quantized", VAL_LOSS_PTQ, ".4f"))
            + (
                row("at the end", ("master", VAL_LOSS_MASTER, ".4f"), ("quantized", VAL_LOSS_QUANTIZED, ".4f"))
                if trainer.max_steps
                else ""
            )
            + "".join(
                row(
                    f"as {serving.upper()}",
                    ("loss", evaluation_metric("loss", QUANTIZED, serving), ".4f"),
                    ("KL", evaluation_metric("kl", QUANTIZED, serving), ".4f"),
                    ("PTQ KL", evaluation_metric("kl", PTQ, serving), ".4f"),
                    ("top-1 agreement", evaluation_metric("top1_agreement", QUANTIZED, serving), ".4f"),
                )
                for serving in SERVINGS
            )
            + row("quantization", ("SQNR dB", SQNR_DB, ".2f"), ("bits per weight", EXPORT_BITS_PER_WEIGHT, ".3f"))
            + row("speed", ("tokens/s", TOKENS_PER_S, ",.0f"))
            + row("memory", ("peak GiB of a GPU", PEAK_GIB, ".3f"))
            + row("export", ("bytes", EXPORT_BYTES, ",.0f"))
            + "".join(
                f"  {'wandb':<16}{line}\n" for logger in wandb for line in (logger.address(), logger.upload_command()) if line
            )
            + f"  {'files':<16}{self.run_dir}/{{{','.join(folders)}}}",
            flush=True,
        )

    def _write_results(self, trainer: Trainer, pl_module: QATModule) -> None:
        if not trainer.is_global_zero:
            return
        results: dict[str, Any] = {"step": trainer.global_step} | pl_module.results
        if self._validations:
            results["validations"] = self._validations
        sequences = {state: found.to_dict() for state, found in pl_module.sequences.items()}
        for name, text in (
            ("metrics.json", json.dumps(results, indent=2, sort_keys=True)),
            ("sequences.json", json.dumps(sequences, sort_keys=True)),
        ):
            replace_file(self.run_dir / name, f"{text}\n", what="the results of the run")


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Peak bytes of host and of CUDA memory of any process of the run; 0 where not known. A collective."""
    host = 0
    if sys.platform != "win32":
        import resource

        # ru_maxrss is in bytes on macOS, in KiB elsewhere.
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peaks = torch.tensor([host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0], device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(peaks, distributed.ReduceOp.MAX)
    host, on_device = peaks.tolist()
    return host, on_device
