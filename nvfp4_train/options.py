"""Checks options against the annotations of what they are handed to, before anything is built.

A YAML file or a command line turns a slip of the keyboard into a string (`max_steps=1o0`, `enable_progress_bar=flase`), and Python
takes it without a word until much later.
"""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def check_options(target: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where `options` holds a name that `target` does not take, or a value that its annotation refuses.

    `where` is the place of the options in the config, for the message.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        # Of a builtin, as datetime.timedelta, which refuses what it does not take.
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
