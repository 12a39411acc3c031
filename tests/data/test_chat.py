"""What counts as a conversation, in both styles."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_data import chat_tokenizer, conversation, write_jsonl
from datasets import Dataset

from nvfp4_train.data.chat import columns_of, normalized, read_all_tools, read_message
from nvfp4_train.data.module import DataConfig, TextDataModule
from nvfp4_train.data.sources import load_rows


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


def test_null_inside_arguments_is_an_argument() -> None:
    function = {"name": "add", "arguments": {"a": None}}
    for arguments in (function["arguments"], json.dumps(function["arguments"])):
        message = {"role": "assistant", "content": None, "tool_calls": [{"function": {**function, "arguments": arguments}}]}
        assert read_message(message)["tool_calls"] == [{"function": function}]


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


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "default": None}}}


def call(number: int, **fields: Any) -> list[dict[str, Any]]:
    """A conversation with a call."""
    function = {"name": "add", "arguments": {"a": number, "b": None}}
    calls = [{"type": "function", "function": function, **fields}]
    return [conversation(number)[0], {"role": "assistant", "content": "", "tool_calls": calls}]


@pytest.mark.parametrize("val_fraction", [0.3, 0.01], ids=["by hash", "too few documents"])
def test_conversations_that_differ_in_ids_alone_are_on_one_side(
    tmp_path: Path, tokenizer_folder: str, val_fraction: float
) -> None:
    rows = [{"messages": [{**message, "id": f"{n}-{copy}"} for message in conversation(n)]} for n in range(20) for copy in "ab"]
    made = module(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer_folder, val_fraction=val_fraction)
    made.setup()
    train, val = (
        {made.tokenizer.decode(row["input_ids"]) for row in (side.dataset[i] for i in side.indices)}
        for side in (made._train, made._val)
    )
    assert train
    assert val
    assert not train & val


def test_what_is_said_is_role_content_calls_and_tools() -> None:
    def said(messages: list[dict[str, Any]], tools: Any = None) -> str:
        row = {"messages": json.dumps(messages), "tools": json.dumps(tools), "__place__": "row 1"}
        return normalized(rows_of([row]), "messages", "here")["said"][0]

    assert said(call(1, id="x")) == said([{**message, "name": "y"} for message in call(1, id="y")])
    others = [said(call(1)), said(call(2)), said(call(1), [TOOL]), said(call(1)[:1]), said([*call(1), *conversation(1)])]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    "bad", [{"role": "teacher", "content": "x"}, {"role": "system", "content": "x"}], ids=["role", "template"]
)
def test_errors_name_file_and_row(tmp_path: Path, tokenizer_folder: str, bad: dict[str, str]) -> None:
    """Of rows that are no conversations, and of those that the template does not take. Empty lines count."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"messages": conversation(i)} for i in range(10)])
    write_jsonl(folder / "b.jsonl", [{"messages": conversation(i)} for i in range(10, 15)])
    with (folder / "b.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"messages": [bad, *conversation(16)]}) + "\n")
    reason = "role of a message" if bad["role"] == "teacher" else "does not take this conversation: no system"
    with pytest.raises(ValueError, match=f"row 7 of {folder / 'b.jsonl'}: .*{reason}"):
        module(folder, tokenizer_folder, chat_template=str(template)).setup()


def test_null_is_kept_where_it_was_written_and_left_out_where_arrow_put_it(tmp_path: Path) -> None:
    messages = call(1)
    rows = [{"messages": messages, "tools": [TOOL]}, {"messages": conversation(2), "tools": None}]
    expected = json.dumps([TOOL])
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    texts = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    Dataset.from_list(texts).to_parquet(tmp_path / "texts.parquet")
    # Here every message has the field of the calls, and every tool that of the description.
    other = {"type": "function", "function": {"name": "sub", "description": "less", "parameters": {"type": "object"}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}, other]
    Dataset.from_list([{**rows[0], "tools": tools}, rows[1]]).to_parquet(tmp_path / "structs.parquet")
    for name in ("a.jsonl", "a.json", "texts.parquet", "structs.parquet"):
        found = normalized(load_rows(str(tmp_path / name), columns=columns_of("messages")), "messages", "here")
        assert found["place"][:] == [f"row {n} of {tmp_path / name}" for n in (1, 2)]
        if name == "structs.parquet":
            assert json.loads(found["tools"][0]) == tools
            assert json.loads(found["text"][0])[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        else:
            assert found["tools"][0] == expected
            assert json.loads(found["text"][0]) == messages
        assert json.loads(found["text"][1]) == conversation(2)


def test_a_system_column_is_the_first_message_where_there_is_none(tmp_path: Path) -> None:
    own = [{"from": "system", "value": "own"}, {"from": "human", "value": "hi"}]
    rows = [
        {"conversations": own[1:], "system": "beside"},
        {"conversations": own, "system": "beside"},
        {"conversations": own[1:], "system": " "},
        {"conversations": own[1:]},
        {"conversations": [], "system": "beside"},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = normalized(load_rows(str(file), columns=columns_of("conversations")), "conversations", "here")
    systems = [[m["content"] for m in json.loads(text) if m["role"] == "system"] for text in found["text"] if text]
    assert systems == [["beside"], ["own"], [], []]
    assert found["text"][4] == ""
    assert json.loads(found["text"][0])[0] == {"role": "system", "content": "beside"}
    with pytest.raises(ValueError, match="row 1: the column 'system' beside conversations must hold strings; got 3"):
        normalized(
            rows_of([{"messages": json.dumps(conversation(1)), "system": "3", "__place__": "row 1"}]), "messages", "here"
        )


def test_one_notice_counts_what_is_not_taken_as_it_seems(
    tmp_path: Path, tokenizer_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools that the template ignores, and special tokens in messages."""
    rows = [{"messages": conversation(i), "tools": [TOOL] if i < 7 else None} for i in range(30)]
    for row in rows[:3]:
        row["messages"][0]["content"] += "<|im_end|>"
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    module(file, tokenizer_folder).setup()
    assert caplog.text.count("the chat template leaves out the tools of 7 conversations") == 1
    assert caplog.text.count("3 conversations spell out special tokens, which stay text; data.special_tokens=control") == 1
    caplog.clear()
    template = tmp_path / "own.jinja"
    template.write_text("{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}")
    module(file, tokenizer_folder, chat_template=str(template), special_tokens="control").setup()
    assert "leaves out" not in caplog.text
    assert "spell out" not in caplog.text


def test_a_file_without_conversations_is_refused_whatever_is_beside_them(tmp_path: Path) -> None:
    """Else all of its rows would be left out as if they were empty."""
    write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(1)}])
    write_jsonl(tmp_path / "b.jsonl", [{"conversations": [{"from": "human", "value": "hi"}], "system": "x", "tools": [TOOL]}])
    with pytest.raises(ValueError, match=r"b.jsonl has the columns .*; none of them is 'messages'$"):
        load_rows(str(tmp_path), columns=columns_of("messages"))
    Dataset.from_dict({"system": ["x"]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet has the columns \['system'\]; none of them is 'messages'$"):
        load_rows(str(tmp_path / "c.parquet"), columns=columns_of("messages"))
