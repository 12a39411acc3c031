"""A resumed run goes on in the data of its checkpoint, or is told what differs."""

from pathlib import Path
from typing import Any

import pytest
from chat_data import chat_tokenizer, conversation, write_jsonl

from nvfp4_train.data.module import DataConfig, TextDataModule


def module(corpus: Path, *, seed: int = 0, **options: Any) -> TextDataModule:
    made = TextDataModule(DataConfig(path=str(corpus), **{"seq_len": 32, "val_fraction": 0.2, **options}), seed=seed)
    made.setup()
    return made


def state(corpus: Path, position: int = 40, **options: Any) -> dict[str, Any]:
    """What a checkpoint of step 5 keeps."""
    made = module(corpus, **options)
    made.load_state_dict({"step": 5, "position": position})
    return made.state_dict()


def copy_of(corpus: Path, target: Path) -> Path:
    target.mkdir()
    for file in corpus.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_same_data_goes_on_wherever_it_lies_and_in_whatever_batches(corpus: Path, tmp_path: Path) -> None:
    saved = state(corpus)
    moved = module(copy_of(corpus, tmp_path / "moved"), batch_size=3, val_batch_size=1, val_sequences=5, num_workers=1)
    moved.load_state_dict(saved)
    assert moved._position() == 40
    assert moved.state_dict()["fingerprint"] == saved["fingerprint"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 16}, "data.seq_len: 32 in the checkpoint's run, 16 now"),
        ({"val_fraction": 0.5}, "data.val_fraction: 0.2 in the checkpoint's run, 0.5 now"),
        ({"max_documents": 30}, "data.max_documents: null in the checkpoint's run, 30 now"),
        ({"seed": 7}, "seed: 0 in the checkpoint's run, 7 now"),
        ({"isolate_documents": True}, "data.isolate_documents: false in the checkpoint's run, true now"),
        ({"too_long": "cut"}, "data.too_long: null in the checkpoint's run, cut now"),
        ({"seq_len": 16, "seed": 7}, "data.seq_len: 32 .*; seed: 0 in"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_data_is_refused_by_option_and_both_values(corpus: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*or data.restart=true to start at the beginning"):
        module(corpus, **options).load_state_dict(state(corpus))


def test_other_text_is_refused_by_path_or_as_changed(corpus: Path, tmp_path: Path) -> None:
    saved = state(corpus)
    other = copy_of(corpus, tmp_path / "other")
    for file in other.iterdir():
        file.write_text(file.read_text().replace("line", "verse"))
    with pytest.raises(ValueError, match=f"data.path: {corpus} in the checkpoint's run, {other} now"):
        module(other).load_state_dict(saved)
    (corpus / "00.txt").write_text("a first document of another length")
    with pytest.raises(ValueError, match=f"the text of data.path='{corpus}' has changed"):
        module(corpus).load_state_dict(saved)


def test_restart_takes_other_data_from_its_beginning_once(corpus: Path) -> None:
    saved = state(corpus)
    again = module(corpus, seq_len=16, restart=True)
    again.load_state_dict(saved)
    assert (again._position(), again._resumed["step"]) == (0, 5)
    # The command of a run that is preempted and continued has the option still.
    continued = module(corpus, seq_len=16, restart=True)
    continued.load_state_dict(again.state_dict() | {"step": 8, "position": 24})
    assert continued._position() == 24
    same_data = module(corpus, restart=True)
    same_data.load_state_dict(saved)
    assert same_data._position() == 0


def test_a_checkpoint_from_before_fingerprints_is_taken(corpus: Path) -> None:
    made = module(corpus)
    made.load_state_dict({"step": 5, "position": 40})
    assert made._position() == 40
    restarted = module(corpus, restart=True)
    restarted.load_state_dict({"step": 5, "position": 40})
    assert restarted._position() == 0


def test_held_out_sequences_have_a_fingerprint_of_their_own(corpus: Path) -> None:
    first = module(corpus)
    assert first.state_dict()["held_out"] == first.held_out_fingerprint
    assert module(corpus, seed=3, batch_size=2).held_out_fingerprint == first.held_out_fingerprint
    others = [module(corpus, **options) for options in ({"val_sequences": 5}, {"val_fraction": 0.4}, {"seq_len": 16})]
    assert len({first.held_out_fingerprint, *(other.held_out_fingerprint for other in others)}) == 4


def test_which_tokens_are_trained_on_belongs_to_the_data(tmp_path: Path) -> None:
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": conversation(i)} for i in range(40)])
    options = {"tokenizer": str(tmp_path / "tokenizer"), "seq_len": 200}
    with pytest.raises(ValueError, match="data.train_on: null in the checkpoint's run, all now"):
        module(chat, **options, train_on="all").load_state_dict(state(chat, **options))
