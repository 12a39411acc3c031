"""Checks options before anything is built: against the annotations of what they are handed to, and against each other.

A YAML file or a command line turns a slip of the keyboard into a string (`max_steps=1o0`, `enable_progress_bar=flase`), and Python
takes it without a word until much later.
"""

import difflib
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from nvfp4_train.run.compose import target_class


def check_targets(options: Any, where: str = "") -> None:
    """Check every `_target_` of a config against the signature of its class. Raises ValueError with the location of a slip."""
    if not isinstance(options, dict):
        return
    for name, value in options.items():
        check_targets(value, f"{where}.{name}" if where else name)
    if "_target_" in options:
        # Nested targets are objects by the time the class sees them.
        plain = {name: value for name, value in options.items() if name != "_target_" and not _is_target(value)}
        target = target_class(options, where)
        check_options(target, plain, where)
        if issubclass(target, WandbLogger):
            import wandb

            # WandbLogger hands what it does not know to wandb.init.
            own = inspect.signature(WandbLogger).parameters
            check_options(wandb.init, {name: value for name, value in plain.items() if name not in own}, where)


_STREAM = "the data is one endless stream; trainer.max_steps says where a run ends"
OF_NO_USE: Mapping[str, tuple[Sequence[Any], str]] = {
    "max_epochs": ((-1, None), _STREAM),
    "min_epochs": ((None,), _STREAM),
    "limit_train_batches": ((None, 1.0), f"{_STREAM}, and data.max_documents how much text is used"),
    "overfit_batches": ((0.0, 0), f"{_STREAM}, and data.max_documents how much text is used"),
    "limit_val_batches": ((None, 1.0), "data.val_sequences says how much of the held-out text is used"),
    "check_val_every_n_epoch": ((None,), "trainer.val_check_interval counts micro-batches"),
    "reload_dataloaders_every_n_epochs": ((0,), _STREAM),
    "use_distributed_sampler": ((False,), "the stream is cut for the ranks by its own sampler"),
    "num_sanity_val_steps": ((0,), "every run is checked before its first step by callbacks.served_check"),
    "fast_dev_run": ((False, 0), "set trainer.max_steps=2, which keeps loggers and checkpoints"),
    "barebones": ((False,), "logger=none trainer.enable_progress_bar=false leaves out what can be left out"),
    "enable_checkpointing": ((None, True), "callbacks.checkpoint=null callbacks.last_checkpoint=null leave out checkpoints"),
    "callbacks": ((None,), "callbacks are the options of the group callbacks, each under a name"),
    "logger": ((None,), "loggers are those of the group: logger=wandb, tensorboard, csv or none"),
    "max_time": (
        (None,),
        "a run that time ends is no finished one; `timeout -s USR1 TIME python launch/train.py ...` saves and ends with 75",
    ),
    "sync_batchnorm": ((False,), "a language model has no batch norms"),
}
"""Options of Lightning's Trainer that mean something else here: the values that change nothing, and what to set in their place."""


def check_trainer(options: dict[str, Any]) -> None:
    """Raise ValueError for values that Lightning takes and that no run can use."""
    for name, (allowed, instead) in OF_NO_USE.items():
        if name in options and not any(type(options[name]) is type(value) and options[name] == value for value in allowed):
            wanted = " or ".join("null" if value is None else str(value).lower() for value in allowed)
            raise ValueError(f"trainer.{name} must be {wanted}, got {options[name]}: {instead}")
    if isinstance(strategy := options.get("strategy"), str) and any(way in strategy for way in ("spawn", "fork", "notebook")):
        raise ValueError(
            f"trainer.strategy must not be one that starts ranks out of a process, got {strategy}; see trainer=ddp"
        )
    for name, least in (("max_steps", 1), ("accumulate_grad_batches", 1), ("log_every_n_steps", 1), ("val_check_interval", 1)):
        if name in options and not (isinstance(options[name], int) and options[name] >= least):
            raise ValueError(f"trainer.{name} must be at least {least}, got {options[name]}")
    if (clip := options.get("gradient_clip_val")) is not None and clip < 0:
        raise ValueError(f"trainer.gradient_clip_val must be at least 0, or null, got {clip}")
    world_size, devices = os.environ.get("WORLD_SIZE"), options.get("devices")
    if world_size and isinstance(devices, int) and devices * options.get("num_nodes", 1) != int(world_size):
        raise ValueError(
            f"trainer.devices times trainer.num_nodes must be the {world_size} ranks that this run was started with, got "
            f"{devices} times {options.get('num_nodes', 1)}; see trainer=ddp"
        )


def check_parts(options: dict[str, Any]) -> None:
    """Raise ValueError where a callback or logger is no object, or quantization has no callback to do it."""
    for group in ("callbacks", "logger"):
        for name, node in (options[group] or {}).items():
            if node is not None and not _is_target(node):
                raise ValueError(f"{group}.{name} must be null or have a _target_, got {node!r}")
            if node is not None and target_class(node, f"{group}.{name}") is ModelCheckpoint and _is_ranked(node):
                raise ValueError(
                    f"{group}.{name}._target_ must be nvfp4_train.callbacks.checkpoint.Checkpoint with a metric of held-out text in "
                    "monitor or filename: Lightning's own saves before the validation of a step, and ranks by an earlier one"
                )
    if options["quant"].get("enabled") and not (options["callbacks"] or {}).get("requantize"):
        raise ValueError("callbacks.requantize quantizes the weights and must not be null; to train without, choose quant=none")


def _is_ranked(node: dict[str, Any]) -> bool:
    """Whether a checkpoint callback is to rank by, or to name, a metric of held-out text."""
    return any("val/" in str(node.get(name) or "") for name in ("monitor", "filename"))


def _is_target(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def check_options(target: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where `options` holds a name that `target` does not take, or a value that its annotation refuses.

    `where` is the place of the options in the config, for the message.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        # A builtin such as datetime.timedelta; it refuses what it does not take.
        return
    takes_any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in options.items():
        if name not in parameters and not takes_any_name:
            close = difflib.get_close_matches(name, parameters, n=1)
            way_out = f"did you mean {close[0]}?" if close else f"{where} takes {', '.join(parameters)}"
            raise ValueError(f"{where}.{name}: no such option; {way_out}")
        hint = parameters[name].annotation if name in parameters else Any
        if not _accepts(hint, value):
            raise ValueError(f"{where}.{name} must be {_describe(hint)}, got {value!r}")


def _accepts(hint: Any, value: Any) -> bool:
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is str or hint is dict or hint is list:
        return isinstance(value, hint)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence | Mapping):
        is_list = isinstance(value, origin) and not isinstance(value, str)
        return is_list and (len(arguments) != 1 or all(_accepts(arguments[0], element) for element in value))
    # Objects (a strategy, a logger, a path) are built elsewhere; plain values cannot stand for a class of their own.
    return not isinstance(value, bool | int | float | str) or not inspect.isclass(hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is Sequence:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
