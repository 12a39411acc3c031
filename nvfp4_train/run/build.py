"""Builds what a run needs from its options."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import WandbLogger

from nvfp4_train.callbacks.progress import TrainingProgress
from nvfp4_train.checkpoints import saved_step
from nvfp4_train.data.cache import check_data_cache
from nvfp4_train.data.module import TextDataModule
from nvfp4_train.loggers import SegmentedTensorBoardLogger
from nvfp4_train.models.architecture import positions
from nvfp4_train.models.causal_lm import load_config
from nvfp4_train.models.weight_files import check_folder
from nvfp4_train.module import QATModule
from nvfp4_train.run.compose import groups, make
from nvfp4_train.run.options import check_parts, check_targets, check_trainer
from nvfp4_train.run.resume import check_checkpoint, keep_earlier_metrics


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    """The options that checkpoints keep: those that say what is trained, on what, and how, wherever it is done."""
    of_place = ("run_dir", "ckpt_path", "trainer", "callbacks", "logger")
    return {name: node for name, node in options.items() if name not in of_place}


def build(options: dict[str, Any], *, trains: bool = True) -> tuple[L.Trainer, QATModule, TextDataModule]:
    """Check the options and build everything that a run needs, with or without training steps. Raises ValueError for what the user
    can correct.

    Every group but those of the data and the trainer is an argument of QATModule by the group's name.
    """
    check_targets(options)
    check_trainer(options["trainer"])
    check_parts(options)
    check_checkpoint(options)
    nodes = groups(options)
    parts = {
        group: {name: node for name, node in (nodes.pop(group) or {}).items() if node} for group in ("callbacks", "logger")
    }
    trainer_options = nodes.pop("trainer")
    if not trains:
        if options["ckpt_path"] is not None:
            raise ValueError(
                f"ckpt_path must be null without training: launch/export.py exports a checkpoint, got {options['ckpt_path']!r}"
            )
        trainer_options |= {"max_steps": 0}
        nodes["quant"] |= {"start_step": 0}

    configs = {name: make(node, name) for name, node in nodes.items()}
    model = configs["model"]
    # A folder that cannot be trained is refused before its tokenizer is, and before any data is read.
    hf_config = load_config(model)
    for option, path in (("model.path", model.path), ("loss.teacher_path", getattr(configs["loss"], "teacher_path", None))):
        if path is not None:
            check_folder(path, option)
    check_data_cache()
    data = TextDataModule(
        configs.pop("data"), seed=options["seed"], model_path=model.path, trust_remote_code=model.trust_remote_code
    )
    data.check_model(hf_config.get_text_config().vocab_size, positions(hf_config))
    module = QATModule(**configs, seed=options["seed"], options=recorded(options))

    callbacks = [make(node, f"callbacks.{name}") for name, node in parts["callbacks"].items()]
    has_own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if trainer_options.get("enable_progress_bar") is not False and not has_own_bar:
        callbacks.append(TrainingProgress())
    keep_earlier_metrics(Path(options["run_dir"]), options["ckpt_path"])
    loggers = [make(node, f"logger.{name}") for name, node in parts["logger"].items()]
    trainer = make(trainer_options, "trainer", callbacks=callbacks, logger=loggers)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(options)
        if isinstance(logger, SegmentedTensorBoardLogger) and (path := options["ckpt_path"]) is not None:
            logger.continue_after(saved_step(Path(path)) or 0)
    return trainer, module, data
