"""A run moves between numbers of ranks, and between replicated and sharded: what it was saved with is what it goes on from, exactly.

On as many ranks it ends with the bits of an uninterrupted run; on others, up to the order of floating-point sums.
"""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from running import assert_same
from small_runs import train

from nvfp4_train.checkpoints import read_checkpoint
from nvfp4_train.export.checkpoint import load_checkpoint

STEPS = 6
# Ranks, and how the model is held, for the steps up to the number.
JOURNEY = [(1, 4, "fsdp2"), (2, 2, "fsdp2"), (3, 1, "fsdp2"), (4, 2, "fsdp2"), (5, 2, "ddp"), (6, 2, "fsdp2")]


IN_ONE_FILE = {"save_distributed_checkpoint": False}


def run(how: str, **options: Any) -> dict[str, Any]:
    return train(how, steps=STEPS, quant={"start_step": 2}, **options)


def run_both(folder: str) -> dict[str, Any]:
    """Without a stop, and with one after step 3."""
    path = f"{folder}/middle.ckpt"
    return {
        "whole": run("fsdp2", save=(STEPS, f"{folder}/whole.ckpt")),
        "stopped": run("fsdp2", save=(3, path)),
        "resumed": run("fsdp2", resume=path, save=(STEPS, f"{folder}/resumed.ckpt")),
        "one file": run("ddp", save=(3, f"{folder}/one_file.ckpt")),
        "one sharded file": run("fsdp2", save=(3, f"{folder}/one_sharded_file.ckpt"), sharding=IN_ONE_FILE),
    }


def leg(how: str, save: tuple[int, str], resume: str | None, first: str | None = None) -> dict[str, Any]:
    """`first` is a path to save to before the first step, on the ranks that the run has moved to."""
    return run(how, save=save, resume=resume, save_first=first)


def comparable(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    found = {key: checkpoint[key] for key in ("lr_schedulers", "global_step")}
    found["state_dict"] = dict(checkpoint["state_dict"])
    for optimizer in checkpoint["optimizer_states"]:
        found["optimizer"] = optimizer["state"]
        # A tuple comes back from a sharded checkpoint as a list.
        found["options"] = [group | {"betas": list(group["betas"])} for group in optimizer["param_groups"]]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for rank in run_ranks(2, run_both, f"{folder}"):
        assert_same(rank["whole"]["end"], rank["resumed"]["end"])
    return folder


def test_resume_on_as_many_ranks_is_exact(whole: Path) -> None:
    assert_same(comparable(whole / "whole.ckpt"), comparable(whole / "resumed.ckpt"))


def test_a_run_that_moves_goes_on_from_what_it_was_saved_with(whole: Path, tmp_path: Path) -> None:
    """Weights, optimizer states, schedule and step are equal to the bit on either side of a move. The end is that of a run that stays,
    but for the order in which products and reductions of other shapes add up.
    """
    resume = None
    for step, ranks, how in JOURNEY:
        path, first = (str(tmp_path / f"{name}.ckpt") for name in (step, f"first of {step}"))
        # PyTorch makes the states of an optimizer that has none by a step of its own, so the first leg saves after its first step.
        run_ranks(ranks, leg, how, (step, path), resume, first if resume else None)
        if resume is not None:
            assert_same(comparable(Path(resume)), comparable(Path(first)))
        resume = path
    moved, stayed = (comparable(path) for path in (tmp_path / f"{STEPS}.ckpt", whole / "whole.ckpt"))
    assert_same(*({key: state[key] for key in ("lr_schedulers", "global_step", "options")} for state in (moved, stayed)))
    for name, master in stayed["state_dict"].items():
        torch.testing.assert_close(moved["state_dict"][name], master, rtol=1e-5, atol=1e-6)


def test_a_sharded_run_that_saves_one_file_goes_on_from_it_however_it_is_held(whole: Path, tmp_path: Path) -> None:
    assert (whole / "one_sharded_file.ckpt").is_file()
    assert_same(comparable(whole / "middle.ckpt"), comparable(whole / "one_sharded_file.ckpt"))
    for how in ("fsdp2", "ddp"):
        run_ranks(2, leg, how, (STEPS, f"{tmp_path}/{how}.ckpt"), f"{whole / 'one_sharded_file.ckpt'}")
        assert_same(comparable(whole / "whole.ckpt"), comparable(tmp_path / f"{how}.ckpt"))


def tied(model: dict[str, Any], save: tuple[int, str] | None, resume: str | None) -> dict[str, Any]:
    return run("fsdp2", model=model, save=save, resume=resume)


def refusal(path: str, model: dict[str, Any], how: str = "fsdp2") -> str:
    with pytest.raises(ValueError, match=re.escape(path)) as caught:
        run(how, resume=path, model=model)
    return str(caught.value)


def refusals(paths: list[str], model: dict[str, Any]) -> list[str]:
    return [refusal(path, model, how) for path in paths for how in ("fsdp2", "ddp")]


@pytest.mark.parametrize(
    ("model", "mismatch"),
    [
        ({"hidden_size": 64}, r"model\.model\.\S+ is \(\d+(, 32)?\) there and \(\d+(, 64)?\) here"),
        ({"num_hidden_layers": 3}, r"model\.model\.layers\.2\.\S+ is missing there and \(.* here"),
        ({"num_hidden_layers": 1}, r"model\.model\.layers\.1\.\S+ is \(.*\) there and missing here"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(model: dict[str, Any], mismatch: str, whole: Path) -> None:
    paths = [f"{whole / 'middle.ckpt'}", f"{whole / 'one_file.ckpt'}"]
    for rank in run_ranks(2, refusals, paths, model):
        for message in rank:
            assert re.search(f"was saved with another model: {mismatch}", message)
            assert message.endswith("set model.* as in the run that saved it")
            assert "\n" not in message
        assert len({message.replace(paths[1], paths[0]) for message in rank}) == 1


def test_a_checkpoint_that_cannot_be_read_is_named(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    shutil.copytree(whole / "middle.ckpt", path)
    for shard in path.glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))
    for message in itertools.chain(*run_ranks(2, refusals, [f"{path}"], {})):
        assert message.startswith(f"the checkpoint {path} could not be loaded: ")


def test_a_model_with_tied_weights_resumes(tmp_path: Path) -> None:
    model = {"tie_word_embeddings": True}
    path = f"{tmp_path / 'tied.ckpt'}"
    run_ranks(2, tied, model, (3, path), None)
    run_ranks(2, tied, model, None, path)


def test_an_export_reads_the_folder_of_a_sharded_run(whole: Path) -> None:
    assert not torch.distributed.is_initialized()
    checkpoint = load_checkpoint(whole / "whole.ckpt")
    saved = read_checkpoint(whole / "whole.ckpt")["state_dict"]
    names = {f"model.{name}" for name in checkpoint.weights} | {f"quant_state.{name}" for name in checkpoint.quant_state}
    assert names == set(saved)
    assert checkpoint.config.hidden_size == 32
    assert len(checkpoint.manifest.groups) == 8


def test_a_folder_that_was_cut_short_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").mkdir()
    with pytest.raises(ValueError, match="must be a file, or the folder of a sharded checkpoint"):
        load_checkpoint(tmp_path / "cut.ckpt")
