"""Documents as ids: what stands around them, special tokens in them, and long ones."""

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nvfp4_train.data import packing
from nvfp4_train.data.module import DataConfig, TextDataModule
from nvfp4_train.data.packing import _encode
from nvfp4_train.data.tokenizer import byte_tokenizer, largest_id, surroundings


def words(*, before: str = "", behind: str = "", **vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows two words, and writes special tokens around a text."""
    vocab = {"hello": 3, "world": 4, "<unk>": 0, "<s>": 1, "</s>": 2, **vocab}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    template = " ".join(part for part in (before, "$A", behind) if part)
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocab[token]) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("before", "behind", "expected"),
    [
        ("", "", [3, 4, 2]),
        ("<s>", "", [1, 3, 4, 2]),
        ("<s>", "</s>", [1, 3, 4, 2]),
        ("", "</s>", [3, 4, 2]),
        ("<s>", "<s>", [1, 3, 4, 1, 2]),
    ],
    ids=["nothing", "bos", "bos and eos", "eos", "another end"],
)
def test_a_document_has_around_it_what_its_tokenizer_puts_there_and_one_end(
    before: str, behind: str, expected: list[int]
) -> None:
    (ids,) = _encode(["hello world"], words(before=before, behind=behind))["input_ids"]
    assert ids.tolist() == expected


def test_the_byte_tokenizer_puts_nothing_before_a_document() -> None:
    assert surroundings(byte_tokenizer()) == ([], [256])
    assert _encode(["hello"], byte_tokenizer())["input_ids"][0].tolist() == [*b"hello", 256]


def test_what_stands_around_a_text_is_found_without_a_token_for_the_unknown() -> None:
    backend = Tokenizer(models.WordLevel({"hello": 1, "</s>": 0}))
    backend.add_special_tokens(["</s>"])
    assert surroundings(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")) == ([], [0])


def test_special_tokens_in_a_text_are_text_unless_asked_for() -> None:
    """Else a page that spells one out would end its document in the middle."""
    tokenizer, text = byte_tokenizer(), "a<|endoftext|>b"
    assert _encode([text], tokenizer)["input_ids"][0].tolist() == [*text.encode(), 256]
    assert _encode([text], tokenizer, special_tokens="control")["input_ids"][0].tolist() == [97, 256, 98, 256]
    assert _encode([text], tokenizer)["input_ids"][0].tolist() == [*text.encode(), 256], "whatever was asked for before"


def test_the_largest_id_is_looked_at_not_the_number_of_tokens() -> None:
    assert largest_id(words(far=900)) == 900
    module = TextDataModule(DataConfig(path="/nowhere"), seed=0)
    module.tokenizer = words(far=900)
    module.check_model(901, None)
    with pytest.raises(
        ValueError, match="embeds 320 tokens; the tokenizer has 901 with ids up to 900|tokenizer has 6 with ids up to 900"
    ):
        module.check_model(320, None)


def test_a_special_token_that_no_text_holds_needs_no_row_in_the_embedding() -> None:
    """Gemma 3's text models lack that of images."""
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    module = TextDataModule(DataConfig(path="/nowhere"), seed=0)
    module.tokenizer = tokenizer
    module.check_model(5, None)
    control = TextDataModule(DataConfig(path="/nowhere", special_tokens="control"), seed=0)
    control.tokenizer = tokenizer
    with pytest.raises(ValueError, match="ids up to 5"):
        control.check_model(5, None)


def prose(seed: int, num_words: int) -> str:
    """Words, numbers, runs of white space, line ends of both kinds, signs, letters of two bytes, and a word without end."""
    draw = random.Random(seed)
    parts = ["the", "of", "läßt", "12345678", "don't", "a_b", "x=1;", "世界", "\t\tif", "(ab)", "e" * 40]
    gaps = [" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\n    ", " \n", "\n \n\n  ", ". ", ""]
    return "".join(draw.choice(parts) + draw.choice(gaps) for _ in range(num_words))


def trained(model: models.Model, trainer: trainers.Trainer, change: Callable[[Tokenizer], None]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    change(backend)
    backend.train_from_iterator([prose(seed, 400) for seed in range(20)], trainer)
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_level(regex: bool) -> PreTrainedTokenizerFast:
    def change(backend: Tokenizer) -> None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(models.BPE(), trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False), change)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    def change(backend: Tokenizer) -> None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)

    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    return trained(models.BPE(unk_token="<unk>"), trainer, change)


def prepended() -> PreTrainedTokenizerFast:
    """As Llama 2's: a word mark before the text, and no pre-tokenizer."""

    def change(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])

    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], max_token_length=8, show_progress=False)
    return trained(models.BPE(unk_token="<unk>"), trainer, change)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: spaces that are joined, and NFKC."""

    def change(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")

    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, change)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: byte_level(regex=True),
    "byte-level without regex": lambda: byte_level(regex=False),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "prepended": prepended,
    "unigram": unigram,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_documents_have_the_ids_of_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = [prose(seed, 900) for seed in range(3)] + ["1234567" * 900, "ab " * 2000, "\n" * 5000, "word" * 1500]
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    monkeypatch.setattr(packing, "_PIECE_CHARS", 700)
    monkeypatch.setattr(packing, "_NEIGHBOURS", 100)
    assert [ids.tolist() for ids in _encode(texts, tokenizer)["input_ids"]] == expected


def test_byte_level_text_is_cut_so_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PIECE_CHARS", 700)
    sizes: list[int] = []
    tokenizer = TOKENIZERS["byte-level"]()
    pieces = packing._pieces

    def watched(*args) -> list[str]:
        found = pieces(*args)
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr(packing, "_pieces", watched)
    _encode([prose(0, 3000)], tokenizer)
    assert max(sizes) <= 700
    assert len(sizes) > 10
