from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nvfp4_train.data.tokenizer import byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_ids_are_the_bytes_of_the_text_and_decode_to_it(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert TOKENIZER.decode(ids) == text


def test_every_byte_is_its_own_id() -> None:
    every_character = "".join(chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000)
    assert TOKENIZER.encode(every_character) == list(every_character.encode("utf-8"))
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(257))


def test_the_special_token_is_id_256_and_survives_a_round_trip() -> None:
    assert len(TOKENIZER) == 257
    assert TOKENIZER.eos_token_id == TOKENIZER.bos_token_id == TOKENIZER.pad_token_id == 256
    text = "a<|endoftext|> b , c  \r\n"
    assert TOKENIZER.encode(text)[:2] == [97, 256]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_auto_tokenizer_loads_it_unchanged(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " Grüße, 世界 \U0001f600\x00 don't . <|endoftext|>\n"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (len(loaded), loaded.special_tokens_map) == (len(TOKENIZER), TOKENIZER.special_tokens_map)
    assert loaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert load_tokenizer(str(tmp_path)).encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/nothing", "not a name"])
def test_a_missing_tokenizer_is_named_with_its_option(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'byte', a folder .*; got '{name}'. Set data.tokenizer"):
        load_tokenizer(name)


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Set data.tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="end-of-sequence token"):
        load_tokenizer(str(tmp_path))
