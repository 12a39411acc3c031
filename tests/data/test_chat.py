"""What counts as a conversation, in both styles."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_data import chat_tokenizer, conversation, write_jsonl
from datasets import Dataset

from nvfp4_train.data.chat import normalized, read_all_tools, read_message
from nvfp4_train.data.module import DataConfig, TextDataModule


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}),
        ({"from": "human", "value": "hi"}, {"role": "user", "content": "hi"}),
        ({"from": "gpt", "value": "hi", "weight": None}, {"role": "assistant", "content": "hi"}),
        ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "ab"},
        ),
        ({"role": "assistant", "content": None, "name": None}, {"role": "assistant", "content": ""}),
        ({"role": "tool", "content": "3", "name": "add"}, {"role": "tool", "content": "3", "name": "add"}),
        ({"role": "assistant", "content": "hi", "tool_calls": []}, {"role": "assistant", "content": "hi"}),
    ],
    ids=["openai", "sharegpt", "gpt", "observation", "parts", "null", "name", "no calls"],
)  # fmt: skip
def test_a_message_becomes_what_templates_take(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_message(given) == expected


def test_arguments_of_tool_calls_are_objects() -> None:
    """Data has them as JSON in a string, as the API sends them; a template would write that as a string of JSON."""
    function = {"name": "add", "arguments": {"a": 1, "b": "2"}}
    as_text = function | {"arguments": json.dumps(function["arguments"])}
    call = {"id": "0", "type": "function", "function": as_text}
    expected = {"role": "assistant", "content": "", "tool_calls": [{"id": "0", "type": "function", "function": function}]}
    assert read_message({"role": "assistant", "content": None, "tool_calls": [call]}) == expected
    assert read_message({"role": "assistant", "content": "", "tool_calls": [as_text]})["tool_calls"] == [function]
    of_sharegpt = read_message({"from": "function_call", "value": json.dumps(function)})
    assert of_sharegpt["tool_calls"] == [{"type": "function", "function": function}]


def test_tools_may_be_json_in_strings() -> None:
    tool = {"type": "function", "function": {"name": "add", "description": None, "parameters": {"type": "object"}}}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        assert read_all_tools(json.dumps(tools)) == [tool]
    assert (
        read_all_tools(None)
        is read_all_tools("[]")
        is read_all_tools(json.dumps(""))
        is read_all_tools(json.dumps(" "))
        is None
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "teacher", "content": "hi"}], "role of a message must be one of system, .* got 'teacher'"),
        ([{"content": "hi"}], "role .* got None"),
        (["hi"], "message must be an object .* got 'hi'"),
        ({"role": "user", "content": "hi"}, "data.chat_column='messages' must hold lists"),
        ([{"role": "user", "content": 3}], "content of a message must be a string or a list of parts of text; got 3"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "only text can be trained on"),
        ([{"role": "assistant", "content": "", "tool_calls": "add"}], "tool_calls must be a list; got 'add'"),
        ([{"from": "function_call", "value": "add it"}], "not readable as JSON .*add it"),
    ],
    ids=["role", "no role", "string", "one message", "number", "image", "calls", "function call"],
)
def test_what_is_no_conversation_is_named_with_its_place(messages: Any, reason: str) -> None:
    rows = [
        {"messages": json.dumps(value), "__place__": f"row {n} of a.jsonl"}
        for n, value in enumerate((conversation(0), messages))
    ]
    with pytest.raises(ValueError, match=f"data.path='here': row 1 of a.jsonl: .*{reason}"):
        normalized(rows_of(rows), "messages", "here")


def rows_of(rows: list[dict[str, Any]]) -> Dataset:
    """As `load_rows` gives them."""
    return Dataset.from_list([{"tools": None, "system": None, **row} for row in rows])


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def module(file: Path, tokenizer: str, **options: Any) -> TextDataModule:
    return TextDataModule(
        DataConfig(path=str(file), tokenizer=tokenizer, **{"seq_len": 256, "val_fraction": 0.3, **options}), seed=0
    )


def test_both_styles_give_the_same_sequences(tmp_path: Path, tokenizer_folder: str) -> None:
    """The column is found by its name. Rows without messages, and a column of tools without any, change nothing."""
    names = {"user": "human", "assistant": "gpt"}
    chats = [conversation(i) for i in range(30)]
    openai = [{"messages": messages, "tools": None, "source": "x"} for messages in chats]
    sharegpt = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]} for messages in chats]
    own = [{"dialog": messages, "text": "unused"} for messages in chats]
    found = []
    for name, rows, options in (
        ("openai", [*openai[:5], {"messages": [], "source": "y"}, *openai[5:]], {}),
        ("sharegpt", sharegpt, {}),
        ("own", own, {"chat_column": "dialog"}),
    ):
        made = module(write_jsonl(tmp_path / f"{name}.jsonl", rows), tokenizer_folder, **options)
        made.setup()
        found.append([{key: value.tolist() for key, value in row.items()} for row in made._train])
    assert found[0] == found[1] == found[2]
    assert found[0]
    assert all(row.keys() == {"input_ids", "loss_mask"} for row in found[0])


def test_a_text_column_wins_and_null_never_reads_conversations(tmp_path: Path, tokenizer_folder: str) -> None:
    rows = [{"text": f"document {i} " * 50, "messages": conversation(i)} for i in range(30)]
    made = module(write_jsonl(tmp_path / "both.jsonl", rows), tokenizer_folder)
    made.setup()
    assert made.tokenizer.decode(made._train[0]["input_ids"]).startswith("document")
    with pytest.raises(ValueError, match="text_column='text'"):
        module(
            write_jsonl(tmp_path / "chat.jsonl", [{"messages": conversation(0)}]), tokenizer_folder, chat_column=None
        ).setup()


def test_options_that_do_not_fit_the_data_are_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "x" * 900}])
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": conversation(i)} for i in range(30)])
    with pytest.raises(ValueError, match="data.train_on=assistant needs conversations"):
        module(text, tokenizer_folder, train_on="assistant").setup()
    with pytest.raises(ValueError, match="the tokenizer 'byte' has none; set data.chat_template"):
        module(chat, "byte").setup()
    with pytest.raises(ValueError, match="data.chat_template='/nowhere.jinja' must be a file"):
        module(chat, "byte", chat_template="/nowhere.jinja").setup()
    with pytest.raises(ValueError, match="holds no conversation with messages in its column 'message'"):
        module(
            write_jsonl(tmp_path / "none.jsonl", [{"message": [], "tools": ["{}"]}]), tokenizer_folder, chat_column="message"
        ).setup()
    ends_with_header = str(tmp_path / "other")
    chat_tokenizer(special=("<|endoftext|>", "<|im_end|>", "<|im_start|>"), bos=2, eos=1).save_pretrained(ends_with_header)
    made = module(chat, ends_with_header)
    made.check_model(258, None)
    with pytest.raises(
        ValueError, match=r"model embeds 258 tokens; the conversations have ids up to 258 .* Set data.tokenizer"
    ):
        made.setup()


def test_a_template_from_a_file_takes_the_place_of_the_tokenizers_own(tmp_path: Path, tokenizer_folder: str) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": conversation(i)} for i in range(30)])
    made = module(chat, tokenizer_folder, chat_template=str(template), train_on="all", seq_len=80)
    made.setup()
    assert "<|im_start|>assistant: it is" in made.tokenizer.decode(made._train[0]["input_ids"])
