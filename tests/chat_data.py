"""Conversations, and small tokenizers with chat templates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nvfp4_train.data.tokenizer import byte_tokenizer

SMOLLM2_TEMPLATE = (Path(__file__).parent / "smollm2_chat_template.jinja").read_text(encoding="utf-8")
"""The chat template of SmolLM2-135M-Instruct."""
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 260
"""Tokens of a tokenizer with three special ones."""


def chat_tokenizer(
    template: str = SMOLLM2_TEMPLATE, special: Sequence[str] = SMOLLM2_TOKENS, *, bos: int = 1, eos: int = 2
) -> PreTrainedTokenizerFast:
    """Every byte is a token, and each of `special` is, from id 256 on. By default it has SmolLM2's special tokens."""
    backend = Tokenizer(models.BPE(vocab=byte_tokenizer().backend_tokenizer.get_vocab(with_added_tokens=False), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = byte_tokenizer().backend_tokenizer.decoder
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[bos],
        eos_token=special[eos],
        pad_token=special[eos],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def conversation(number: int, turns: int = 2, *, answer: str = "it is") -> list[dict[str, Any]]:
    """Messages that differ from those of other numbers."""
    return [
        message
        for turn in range(turns)
        for message in (
            {"role": "user", "content": f"what is {number} and {turn}?"},
            {"role": "assistant", "content": f"{answer} {number * number + turn}."},
        )
    ]


def write_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file
