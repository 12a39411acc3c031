"""Conversations as tokens: rendered by the tokenizer's chat template, with a mask of what the assistant writes.

The ids are those of the whole rendered text. What the assistant writes is known as spans of characters, by the `{% generation %}` of
the template or by what it renders of the messages before and up to each turn, and tokens are marked by their offsets.

A special token that a message spells out stays text: it is broken up before the template runs, and the tokenizer knows the template's
own special tokens by other names. Those that the template itself looks for in what the assistant writes, such as `</think>`, are left.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from nvfp4_train.data.chat import ASSISTANT, Message
from nvfp4_train.data.tokenizer import special_tokens

Span = tuple[int, int]

_OPEN, _CLOSE, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
"""Characters that Unicode keeps out of all text. They stand around special tokens of the template, and within those of a message."""
_DATE = {
    "%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%A": "Friday", "%a": "Fri",
    "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM",
}  # fmt: skip
_REPLACED = "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
_FIXED_DATE = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"
"""Before a template that asks for today's date: tokens must be the same on every day and host. The line end is not rendered."""
_PROBE_USER, _PROBE_ASSISTANT = "the question", "the answer"


def encode_chats(
    texts: list[str],
    tools: list[str | None],
    places: list[str],
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: str = "text",
    with_mask: bool = True,
) -> dict[str, list[np.ndarray]]:
    """Ids, and the mask of the assistant's tokens, of conversations as `chat.normalized` gives them.

    Raises ValueError, which begins with the place, where the template cannot render one, or does not tell what the assistant writes.
    """
    encoder = _encoder(tokenizer, special_tokens)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("input_ids", "loss_mask")[: 1 + with_mask]}
    for text, own_tools, place in zip(texts, tools, places, strict=True):
        try:
            if encoder.breaks_literals and any(char in f"{text}{own_tools}" for char in (_OPEN, _CLOSE, _BREAK)):
                raise ValueError("a message holds one of the characters U+FDD0 to U+FDD2, which are in no text; leave it out")
            ids, mask = encoder.encode(json.loads(text), None if own_tools is None else json.loads(own_tools), with_mask)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        found["input_ids"].append(ids)
        if with_mask:
            found["loss_mask"].append(mask)
    return found


def spell_special(texts: list[str], tools: list[str | None], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Which of the conversations, as `chat.normalized` gives them, spell out special tokens that stay text."""
    encoder = _encoder(tokenizer, "text")
    return [encoder.breaks(text, own_tools) for text, own_tools in zip(texts, tools, strict=True)]


def ignores_tools(text: str, tools: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template renders the conversation, as `chat.normalized` gives it, as if it had no tools."""
    return _encoder(tokenizer, "text").ignores_tools(json.loads(text), json.loads(tools))


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ValueError where the tokenizer called `name` has no chat template, or cannot say where its tokens lie in a text."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"conversations need a chat template, and the tokenizer {name!r} has none; set data.chat_template to a jinja file, "
            "data.tokenizer to a tokenizer with one, or data.chat_column=null to read data.text_column instead"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"conversations need a fast tokenizer (tokenizer.json), and {name!r} has none; set data.tokenizer")


@lru_cache(maxsize=2)
def _encoder(tokenizer: PreTrainedTokenizerBase, special: str) -> "_ChatEncoder":
    return _ChatEncoder(tokenizer, special_tokens(tokenizer), breaks_literals=special == "text")


@dataclass
class _ChatEncoder:
    tokenizer: PreTrainedTokenizerBase
    special: dict[str, int]
    breaks_literals: bool
    """Whether special tokens in messages are text."""
    pattern: re.Pattern = field(init=False)

    def __post_init__(self) -> None:
        by_length = sorted(self.special, key=len, reverse=True)
        # Without special tokens nothing matches.
        self.pattern = re.compile("|".join(map(re.escape, by_length)) or "(?!)")

    def encode(self, messages: list[Message], tools: list[Any] | None, with_mask: bool) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids and a uint8 mask."""
        if self.breaks_literals:
            messages, tools = self._broken(messages, tools)
        messages = self._with_calls(messages, tools)
        text, generated = self._render(messages, tools, with_generation=with_mask)
        encoding = self._backend.encode(self._marked(text), add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        for there, here in self._own_ids.items():
            ids[np.array(encoding.ids) == there] = here
        spans = [] if not with_mask else generated if generated is not None else self._turns(messages, tools, text)
        return ids, self._mask(text, spans, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2))

    def breaks(self, text: str, tools: str | None) -> bool:
        """Whether a special token in the messages or tools, both JSON, is broken up."""
        if not self.pattern.search(f"{text}{tools}"):
            return False
        given = json.loads(text), None if tools is None else json.loads(tools)
        return self._broken(*given) != given

    def ignores_tools(self, messages: list[Message], tools: list[Any]) -> bool:
        try:
            messages = self._with_calls(messages, tools)
            return self._render(messages, tools) == self._render(messages, None)
        except ValueError:
            # What is wrong with it, `encode` tells.
            return False

    def _with_calls(self, messages: list[Message], tools: list[Any] | None) -> list[Message]:
        """The messages in a form of which the template writes every tool call. Raises ValueError where there is none.

        DeepSeek's templates write calls where there is no content, and take their arguments as text.
        """
        if not any(message.get("tool_calls") for message in messages):
            return messages
        forms = (messages, [_as_sent(message) for message in messages])
        errors = []
        for form in forms:
            try:
                if self._writes_calls(form, tools):
                    return form
            except ValueError as error:
                errors.append(error)
        if len(errors) == len(forms):
            raise errors[0]
        raise ValueError(
            "the chat template leaves out tool calls of this conversation; set data.chat_template to one that writes them"
        )

    def _writes_calls(self, messages: list[Message], tools: list[Any] | None) -> bool:
        """Whether the text is another one without any one of the calls. Raises ValueError where there is no text."""
        text, _ = self._render(messages, tools)
        for number, message in enumerate(messages):
            for without in _each_without_a_call(message):
                try:
                    if self._render([*messages[:number], without, *messages[number + 1 :]], tools)[0] == text:
                        return False
                except ValueError:
                    # Without it this is no conversation, so it is looked at.
                    continue
        return True

    def _mask(self, text: str, spans: list[Span], offsets: np.ndarray) -> np.ndarray:
        """uint8 [T]: 1 for tokens that lie in the spans. Offsets, [T, 2], are in the marked text."""
        starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        mask = np.zeros(len(offsets), dtype=np.uint8)
        place, marked_place = 0, 0
        for start, end in spans:
            first = marked_place + len(self._marked(text[place:start]))
            inside = self._marked(text[start:end])
            place, marked_place = end, first + len(inside)
            is_inside = (starts < marked_place) & (ends > first)
            for token in np.flatnonzero(is_inside & (starts < first)):
                # White space of the header and of the content in one token: that is not what follows the header.
                is_inside[token] = bool(inside[: ends[token] - first].strip())
            mask |= is_inside
        return mask

    def _render(
        self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False, with_generation: bool = False
    ) -> tuple[str, list[Span] | None]:
        """The text, and what the template says that the assistant writes of it. With `prompt` the header of its next turn ends it."""
        template = self.tokenizer.get_chat_template(None, tools)
        if "strftime_now" in template:
            template = _FIXED_DATE + template
        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        marks = with_generation and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        try:
            # It is annotated to return a string.
            found: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **special,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from error
        rendered, spans = found
        return rendered[0], [(start, end) for start, end in spans[0]] if marks else None

    def _turns(self, messages: list[Message], tools: list[Any] | None, text: str) -> list[Span]:
        """The assistant's turns in `text`, from behind their headers to their end tokens."""
        spans = []
        try:
            for number, message in enumerate(messages):
                if message["role"] != ASSISTANT:
                    continue
                before, _ = self._render(messages[:number], tools, prompt=True)
                upto, _ = self._render(messages[: number + 1], tools)
                if not (text.startswith(upto) and upto.startswith(before)):
                    return self._turns_by_headers(messages, text)
                start = len(before)
                if not self._frame[0]:
                    # There is no prompt: the header is what stands before the content. That of a probe is in no header.
                    probed, _ = self._render([*messages[:number], {"role": ASSISTANT, "content": _PROBE_ASSISTANT}], tools)
                    header = probed[start:].partition(_PROBE_ASSISTANT)[0]
                    if upto.startswith(header, start):
                        start += len(header)
                spans.append((start, self._end_of_turn(text, start, len(upto))))
        except ValueError:
            # A template may take whole conversations alone.
            return self._turns_by_headers(messages, text)
        return spans

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """`end`, or that of the last special token if nothing but white space follows it."""
        ends = [match.end() for match in self.pattern.finditer(text, start, end)]
        return ends[-1] if ends and not text[ends[-1] : end].strip() else end

    def _turns_by_headers(self, messages: list[Message], text: str) -> list[Span]:
        """The turns where the template renders a turn otherwise once others follow: from header to end token, both by a probe."""
        header, begun, end_tokens = self._frame
        starts = [match.end() for match in re.finditer(re.escape(header), text)] if header else []
        starts = [start + len(begun) if text.startswith(begun, start) else start for start in starts]
        if len(starts) == sum(message["role"] == ASSISTANT for message in messages):
            ends = [self._first_end(text, start, stop) for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
            if None not in ends:
                return [(start, end) for start, end in zip(starts, ends, strict=True) if end is not None]
        raise ValueError(
            "the chat template does not tell what the assistant writes: it renders a turn otherwise once others follow, and has no "
            f"header of its own for it ({header!r} and {sorted(end_tokens)} were looked for). Set data.train_on=all, or "
            "data.chat_template to a template with {% generation %}"
        )

    def _first_end(self, text: str, start: int, stop: int) -> int | None:
        header, _, end_tokens = self._frame
        opening = self.pattern.match(header)
        for match in self.pattern.finditer(text, start, stop):
            if match[0] in end_tokens:
                return match.end()
            if opening and match[0] == opening[0]:
                # The next turn begins: this one has an end token of its own, as gpt-oss's tool calls have.
                return self._end_of_turn(text, start, match.start())
        return None

    @cached_property
    def _frame(self) -> tuple[str, str, set[str]]:
        """The header of an assistant's turn, what a prompt has behind it, and the special tokens that end a turn, last or not.

        They are empty where a probe has none.
        """
        user, answer = {"role": "user", "content": _PROBE_USER}, {"role": ASSISTANT, "content": _PROBE_ASSISTANT}
        try:
            asked, prompted = self._render([user], None)[0], self._render([user], None, prompt=True)[0]
            answered = [self._render([user, answer, *more], None)[0] for more in ([], [user])]
        except ValueError:
            return "", "", set()
        ends = [self.pattern.search(text, text.rfind(_PROBE_ASSISTANT)) for text in answered if _PROBE_ASSISTANT in text]
        # A text without the prompt may end otherwise, as Phi-3's does, and the prompt may begin the answer, as R1's does.
        start = self._common_length(prompted, [asked])
        end = self._common_length(prompted, [text.partition(_PROBE_ASSISTANT)[0] for text in answered])
        return prompted[start:end], prompted[max(start, end) :], {match[0] for match in ends if match}

    def _common_length(self, text: str, others: list[str]) -> int:
        """How much of `text` all `others` begin with as well. A special token is common whole or not at all."""
        length = len(os.path.commonprefix([text, *others]))
        return next((match.start() for match in self.pattern.finditer(text) if match.start() < length < match.end()), length)

    def _broken(self, messages: list[Message], tools: list[Any] | None) -> tuple[list[Message], list[Any] | None]:
        """Messages and tools with a character within the special tokens that they spell out."""

        def break_up(text: str, left: Collection[str] = ()) -> str:
            return self.pattern.sub(
                lambda match: match[0] if match[0] in left else f"{match[0][0]}{_BREAK}{match[0][1:]}", text
            )

        of_assistant = partial(break_up, left=self._looked_for)
        broken = [_in_strings(message, of_assistant if message["role"] == ASSISTANT else break_up) for message in messages]
        return broken, _in_strings(tools, break_up)

    @cached_property
    def _looked_for(self) -> set[str]:
        """The special tokens that the template asks for, or splits at; none of those that begin or end a turn or a text."""
        given = self.tokenizer.chat_template
        template = "\n".join(given.values()) if isinstance(given, dict) else given
        header, _, ends = self._frame
        tokenizer = self.tokenizer
        frame = {*ends, *self.pattern.findall(header)[:1], tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}

        def is_looked_for(token: str) -> bool:
            literal = rf"""(['"]){re.escape(token)}(?:\\n)*\1"""
            asked = (rf"{literal}\s+(?:not\s+)?in\b", rf"\b(?:split|startswith|endswith)\(\s*{literal}")
            return any(re.search(form, template) for form in asked)

        found = {token for token in self.special if is_looked_for(token)}
        # A template that splits at the end of a thought may not ask for its begin.
        return ({token.replace("</", "<", 1) for token in found} & self.special.keys() | found) - frame

    def _marked(self, text: str) -> str:
        """A rendered text, or a part of it that cuts no special token, for `_backend`."""
        if not self.breaks_literals:
            return text
        return self.pattern.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", text).replace(_BREAK, "")

    @cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizer without what it adds to a text, and with special tokens under the names that `_marked` gives them."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state |= {"post_processor": None, "truncation": None, "padding": None}
        if self.breaks_literals:
            names = {token: f"{_OPEN}{token}{_CLOSE}" for token in self.special}
            for token in state["added_tokens"]:
                token["content"] = names.get(token["content"], token["content"])
            model = state["model"]
            if isinstance(model.get("vocab"), dict):
                model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
            else:
                model["vocab"] = [[names.get(token, token), *rest] for token, *rest in model["vocab"]]
            if model.get("unk_token") in names:
                model["unk_token"] = names[model["unk_token"]]
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _own_ids(self) -> dict[int, int]:
        """The tokenizer's ids of added tokens by those of `_backend`, where they differ."""
        added = self.tokenizer.added_tokens_decoder
        names = {index: self._marked(token.content) if token.special else token.content for index, token in added.items()}
        pairs = {self._backend.token_to_id(name): index for index, name in names.items()}
        return {there: here for there, here in pairs.items() if there is not None and there != here}


def _each_without_a_call(message: Message) -> Iterator[Message]:
    """The message without the first of its tool calls, without the second, and so on."""
    calls = message.get("tool_calls", [])
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    for place in range(len(calls)):
        yield {**others, "tool_calls": [*calls[:place], *calls[place + 1 :]]} if len(calls) > 1 else others


def _as_sent(message: Message) -> Message:
    """The message as an API gives it: no content beside tool calls, and their arguments as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": _with_text(call["function"])} if "function" in call else _with_text(call)
        for call in message["tool_calls"]
    ]
    return {**message, "content": message["content"] or None, "tool_calls": calls}


def _with_text(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    return function if isinstance(arguments, str) else {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _in_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with a change of every string in it, keys among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _in_strings(own, change) for key, own in value.items()}
    return [_in_strings(own, change) for own in value] if isinstance(value, list) else value
