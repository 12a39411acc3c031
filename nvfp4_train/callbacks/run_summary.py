"""The run folder's last word: metrics.json, and a short summary on the terminal."""

import json
import os
from pathlib import Path

from lightning import Callback, Trainer

from nvfp4_train.module import QATModule
from nvfp4_train.quant.policy import selection_table


class RunSummary(Callback):
    """Prints what is quantized before training, and the outcome after it; keeps the tokenizer beside the checkpoints.

    Listed after the callbacks whose results it reports.
    """

    def __init__(self, *, run_dir: str, tokenizer_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self.tokenizer_dir = Path(tokenizer_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        assert pl_module.model is not None and pl_module.selection is not None
        print(f"NVFP4 policy\n{selection_table(pl_module.model, pl_module.selection)}", flush=True)
        # An export from a checkpoint finds the tokenizer here.
        trainer.datamodule.tokenizer.save_pretrained(self.tokenizer_dir)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        # What the run has cost is safe before the export begins.
        self._write_metrics(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        self._write_metrics(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()

        def row(label: str, *parts: tuple[str, str, str]) -> str:
            known = [f"{text} {pl_module.results[key]:{form}}" for text, key, form in parts if key in pl_module.results]
            return f"  {label:<16}{', '.join(known)}\n" if known else ""

        folders = [
            name for name in ("export", "checkpoints", "metrics.csv", "metrics.json", "wandb") if (self.run_dir / name).exists()
        ]
        print(
            "\nRun summary\n"
            + row("at the switch", ("master", "val/loss_master_at_switch", ".4f"), ("quantized (PTQ)", "val/loss_ptq", ".4f"))
            + row("at the end", ("master", "val/loss_master", ".4f"), ("quantized (QAT)", "val/loss_quantized", ".4f"))
            + row("quantization", ("SQNR dB", "quant/sqnr_db", ".2f"), ("bits per weight", "export/bits_per_weight", ".3f"))
            + row("speed", ("tokens/s", "train/tokens_per_s", ",.0f"))
            + row("memory", ("peak GiB of a GPU", "memory/peak_gib", ".3f"))
            + row("export", ("bytes", "export/bytes", ",.0f"))
            + f"  {'files':<16}{self.run_dir}/{{{','.join(folders)}}}",
            flush=True,
        )

    def _write_metrics(self, trainer: Trainer, pl_module: QATModule) -> None:
        if not trainer.is_global_zero:
            return
        results = {"step": trainer.global_step} | pl_module.results
        path = self.run_dir / "metrics.json"
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, path)
