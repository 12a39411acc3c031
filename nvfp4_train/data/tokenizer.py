"""Tokenizers: the built-in byte tokenizer, and any tokenizer of a local folder or the Hugging Face hub."""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nvfp4_train.load_errors import reading

END_OF_TEXT = "<|endoftext|>"
"""The one special token of the byte tokenizer: begin, end and padding."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0..255 are the bytes of the UTF-8 text and whose id 256 is `<|endoftext|>`.

    It is an ordinary `tokenizers` byte-level model without merges, so AutoTokenizer loads what it saves.
    """
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer called `name`: "byte" is the built-in one, anything else a local folder or a hub name."""
    if name == "byte":
        return byte_tokenizer()
    what = (
        f"the tokenizer must be 'byte', a folder with tokenizer files or a reachable hub name; got {name!r}. Set data.tokenizer"
    )
    # Files without what a tokenizer needs lead to these.
    with reading(what, name, KeyError, TypeError, AttributeError):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"packing needs a tokenizer with an end-of-sequence token; that of {name!r} has none. Set data.tokenizer to "
            "another one, or save this one with an eos_token."
        )
    return tokenizer


def surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids before and behind those of a document's text: what the tokenizer itself puts there, and the end token, once.

    Raises ValueError where it puts tokens elsewhere.
    """
    probe, text = next(_probes(tokenizer))
    whole = tokenizer(probe)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    if start is None:
        raise ValueError(
            f"the tokenizer must put its special tokens before and behind a text; it makes {whole} of {text}. Set data.tokenizer"
        )
    behind = whole[start + len(text) :]
    return whole[:start], behind if behind[-1:] == [tokenizer.eos_token_id] else [*behind, tokenizer.eos_token_id]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of special tokens by their text: those that a text holds only where it is told to."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def largest_id(tokenizer: PreTrainedTokenizerBase, *, with_special: bool = True) -> int:
    """The largest id that the tokenizer can give; without special tokens, but those that it puts around a text."""
    special = set() if with_special else set(special_tokens(tokenizer).values())
    before, behind = surroundings(tokenizer)
    return max(*(index for index in tokenizer.get_vocab().values() if index not in special), *before, *behind)


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Short texts with their ids, of which there are some. The first is "a", where the tokenizer knows it."""
    for text in ("a", *tokenizer.get_vocab()):
        try:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception:
            # So `tokenizers` says that a text is in no token and that there is none for the unknown. It has no class of its own for it.
            continue
        if ids:
            yield text, ids


def _byte_alphabet() -> list[str]:
    """The printable character by which the byte-level model of `tokenizers` writes each byte, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]
