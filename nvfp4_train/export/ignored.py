"""Entries that name unquantized modules, from the language of one format into that of another."""

import re

_TOKENS = re.compile(r"\.\*|\\.|[\w.-]")


def translate(entry: str, format: str) -> str:
    """An entry of compressed-tensors (`re:` and a regular expression, or a name) or of ModelOpt (wildcards), as `format` has it.

    Raises ValueError for a regular expression that no wildcard stands for.
    """
    if format == "compressed_tensors":
        return _to_regex(entry) if set("*?[") & set(entry) else entry
    return _to_wildcard(entry) if entry.startswith("re:") else entry


def _to_regex(wildcard: str) -> str:
    if "[" in wildcard:
        raise ValueError(f"the ignored name {wildcard!r} holds a set of characters, which is not translated")
    pattern = "".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in wildcard)
    # Regular expressions are matched at the start of a name alone.
    return "re:" + (pattern if pattern.endswith(".*") else f"{pattern}$")


def _to_wildcard(entry: str) -> str:
    body = entry.removeprefix("re:").removeprefix("^")
    pattern, is_whole = (body[:-1], True) if body.endswith("$") else (body, False)
    tokens = _TOKENS.findall(pattern)
    if "".join(tokens) != pattern or any(len(token) == 2 and token != ".*" and token[1].isalnum() for token in tokens):
        raise ValueError(f"the ignored pattern {entry!r} is more than names and .*, so that no wildcard stands for it")
    wildcard = "".join({".*": "*", ".": "?"}.get(token, token[-1]) for token in tokens)
    return wildcard if is_whole or wildcard.endswith("*") else f"{wildcard}*"
