"""Whole runs on conversations, with documents that do not see each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_data import VOCABULARY, chat_tokenizer, conversation, write_jsonl
from running import launch, load_checkpoint, metrics

STEPS = (
    "trainer.max_steps=3",
    "trainer.log_every_n_steps=1",
    "quant.start_step=2",
    "data.seq_len=256",
    "data.batch_size=2",
    "data.isolate_documents=true",
    "data.val_fraction=0.2",
    "optim.lr=1e-3",
    "optim.min_lr_ratio=1",
    f"model.config.vocab_size={VOCABULARY}",
    "callbacks.export=null",
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("chat")
    chat_tokenizer().save_pretrained(folder / "tokenizer")
    rows: list[dict[str, Any]] = [
        {"messages": conversation(i, turns=1, answer="it is " * (i % 5)), "tools": [{"type": "function"}]} for i in range(40)
    ]
    file = write_jsonl(folder / "chat.jsonl", [*rows, {"messages": conversation(99, answer="word " * 300)}])
    return f"data.path={file}", f"data.tokenizer={folder / 'tokenizer'}", "data.max_documents=41"


def test_a_run_trains_on_conversations_counts_what_is_cut_and_refuses_other_data(chat: tuple[str, ...], tmp_path: Path) -> None:
    done = launch(tmp_path / "run", *STEPS, *chat, "trainer.accumulate_grad_batches=2")
    output = done.stdout + done.stderr
    assert "41 conversations of its column 'messages'" in output
    assert "1 of 41 documents are longer than data.seq_len=256 and cut" in output
    assert 0 < metrics(tmp_path / "run")["val/loss_quantized"] < 10
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    other = launch(
        tmp_path / "other", *STEPS, *chat, f"ckpt_path={last}", "data.seq_len=128", "trainer.max_steps=6", check=False
    )
    assert other.returncode == 1
    (line,) = [line for line in other.stderr.splitlines() if line.startswith("error:")]
    assert "data.seq_len: 256 in the checkpoint's run, 128 now" in line
    assert "Traceback" not in other.stderr


def test_two_ranks_distil_on_conversations_as_one_does(chat: tuple[str, ...], tmp_path: Path) -> None:
    """Each rank's mean counts by its tokens, so the step is that of one process with the same batch."""
    loss = ("loss=distillation", "loss.cross_entropy=0.25", "quant.enabled=false")
    losses = {}
    for ranks, options in (
        (0, ("data.batch_size=4",)),
        (2, ("data.batch_size=2", "trainer=ddp", "trainer.accelerator=cpu")),
    ):
        run_dir = tmp_path / str(ranks)
        launch(run_dir, *STEPS, *chat, *loss, "model.compute_dtype=float32", "quant.start_step=0", *options, ranks=ranks)
        losses[ranks] = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    for name, tensor in losses[0].items():
        torch.testing.assert_close(losses[2][name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def test_a_model_that_does_not_keep_documents_apart_is_refused_before_training(chat: tuple[str, ...], tmp_path: Path) -> None:
    hybrid = (
        "model.config.model_type=lfm2",
        "+model.config.layer_types=[conv,full_attention]",
        "+model.config.block_auto_adjust_ff_dim=false",
    )
    done = launch(tmp_path / "run", *STEPS, *chat, *hybrid, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "data.isolate_documents=true needs a model that keeps documents apart" in line
