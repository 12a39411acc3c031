"""Conversations: the rows of a chat data set, in both styles that are common, as the messages that chat templates take.

{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
{"conversations": [{"from": "human", "value": "..."}, ...]}
"""

import json
from typing import Any

from datasets import Dataset, Features, Value

from nvfp4_train.data.cache import cache_errors
from nvfp4_train.data.rows import Columns

COLUMNS = ("messages", "conversations")
"""The columns that hold conversations by their usual names."""
TOOLS_COLUMN = "tools"
SYSTEM_COLUMN = "system"
"""May hold a system message beside the conversation."""
PLACE_COLUMN = "__place__"

ASSISTANT = "assistant"
SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", ASSISTANT, "tool", "function", "ipython")
_OTHER_NAMES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names of roles in data, by those that templates know."""
_THOUGHTS = ("reasoning_content", "thinking")

Message = dict[str, Any]


def columns_of(column: str) -> Columns:
    """What to read where `column` holds the conversations."""
    return {column: "json", TOOLS_COLUMN: "beside", SYSTEM_COLUMN: "beside", PLACE_COLUMN: "place"}


def normalized(rows: Dataset, column: str, path: str) -> Dataset:
    """One row per conversation: `text`, its messages as JSON, or "" where there are none; `tools`, JSON or None.

    `said` is what is said in it, the same for conversations that differ in other fields alone, such as ids; `place` is for errors.
    `rows` are as `columns_of` says. Raises ValueError, which names path and row, for what is no conversation.
    """
    with cache_errors():
        return rows.map(
            _normalize,
            batched=True,
            input_columns=list(columns_of(column)),
            remove_columns=rows.column_names,
            fn_kwargs={"column": column, "path": path},
            features=Features({name: Value("large_string") for name in ("text", "tools", "said", "place")}),
            desc="Reading conversations",
        )


def has_tools(tools: list[str | None]) -> list[bool]:
    """Of conversations as `normalized` gives them."""
    return [own is not None for own in tools]


def has_messages(texts: list[str]) -> list[bool]:
    """Of conversations as `normalized` gives them."""
    return [bool(text) for text in texts]


def _normalize(
    conversations: list[str | None],
    tools: list[str | None],
    systems: list[str | None],
    places: list[str],
    column: str,
    path: str,
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"text": [], "tools": [], "said": [], "place": places}
    for text, own_tools, system, place in zip(conversations, tools, systems, places, strict=True):
        try:
            messages = with_system([read_message(message) for message in _read_list(text, column)], system)
            read_tools = read_all_tools(own_tools)
        except ValueError as error:
            raise ValueError(f"data.path={path!r}: {place}: {error}") from error
        found["text"].append(_json(messages) if messages else "")
        found["tools"].append(_json(read_tools) if read_tools else None)
        found["said"].append(_json([_said(message) for message in messages]) + (_json(read_tools) if read_tools else ""))
    return found


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages behind that of the column `system`, JSON text of a string, where they have none themselves."""
    content = _parsed(system)
    if content is None or not messages:
        return messages
    if not isinstance(content, str):
        raise ValueError(f"the column {SYSTEM_COLUMN!r} beside conversations must hold strings; got {_short(content)}")
    if not content.strip() or any(message["role"] in SYSTEM for message in messages):
        return messages
    return [{"role": "system", "content": content}, *messages]


def _said(message: Message) -> Message:
    """The message without fields that templates do not write out, such as ids."""
    said = {name: message[name] for name in ("role", "content", *_THOUGHTS) if name in message}
    if calls := message.get("tool_calls"):
        functions = [call.get("function", call) for call in calls]
        said["tool_calls"] = [{name: function.get(name) for name in ("name", "arguments")} for function in functions]
    return said


def read_message(message: Any) -> Message:
    """The message in the style of templates: a known role, content as a string, arguments of tool calls as objects.

    Its fields that are null are left out. Raises ValueError for what is no message.
    """
    if not isinstance(message, dict):
        raise ValueError(f"a message must be an object with role and content, or from and value; got {_short(message)}")
    message = {name: value for name, value in message.items() if value is not None}
    given = message.pop("role", None) or message.pop("from", None)
    message.pop("from", None)
    role = _OTHER_NAMES.get(given, given)
    if role not in ROLES:
        raise ValueError(f"the role of a message must be one of {', '.join((*ROLES, *_OTHER_NAMES))}; got {given!r}")
    content = message.pop("content", message.pop("value", ""))
    if given == "function_call":
        return {"role": role, "content": "", "tool_calls": [_as_call(call) for call in _read_calls(content)]}
    read = {"role": role, "content": _read_content(content), **message}
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise ValueError(f"tool_calls must be a list; got {_short(calls)}")
        read["tool_calls"] = [_with_arguments(call) for call in calls]
    else:
        # Templates ask whether there are any by whether the field is there.
        read.pop("tool_calls", None)
    return read


def read_all_tools(text: str | None) -> list[Any] | None:
    """The tools of a conversation, JSON schemas. They, and each of them, may be JSON in a string. Raises ValueError for others."""
    # Itself JSON text of a column, which may be a string of JSON.
    tools = _parsed(text)
    # Columns of text have "" where there are none.
    tools = _parsed(tools) if not isinstance(tools, str) or tools.strip() else None
    if not tools:
        return None
    tools = [_parsed(tool) for tool in (tools if isinstance(tools, list) else [tools])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools must be a list of objects; got {_short(tools)}")
    return tools


def _read_list(text: str | None, column: str) -> list[Any]:
    messages = _parsed(_parsed(text))
    if messages is None:
        return []
    if not isinstance(messages, list):
        raise ValueError(f"data.chat_column={column!r} must hold lists of messages; got {_short(messages)}")
    return messages


def _read_content(content: Any) -> str:
    """The text of a message; that of all its parts, one after the other, where it comes in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content of a message must be a string or a list of parts of text; got {_short(content)}")
    parts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"only text can be trained on, and a message has a part {_short(part)}; leave such rows out")
        parts.append(text)
    return "".join(parts)


def _read_calls(content: Any) -> list[Any]:
    calls = _parsed(content)
    return calls if isinstance(calls, list) else [calls]


def _as_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or "name" not in call:
        raise ValueError(f"a function_call must be JSON with name and arguments; got {_short(call)}")
    return _with_arguments({"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}})


def _with_arguments(call: Any) -> dict[str, Any]:
    """The call with its arguments as an object: data has them as a string of JSON, and templates write JSON themselves."""
    if not isinstance(call, dict):
        raise ValueError(f"a tool call must be an object; got {_short(call)}")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise ValueError(f"the function of a tool call must be an object; got {_short(function)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and isinstance(read := _parsed(arguments, or_text=True), dict):
        function = {**function, "arguments": read}
    return {**call, "function": function} if "function" in call else function


def _parsed(value: Any, *, or_text: bool = False) -> Any:
    """What JSON in a string says; anything else as it is. Raises ValueError where a string is no JSON, unless it may be text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        if or_text:
            return value
        raise ValueError(f"not readable as JSON ({error}): {_short(value)}") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
