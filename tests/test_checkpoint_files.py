"""A checkpoint that was cut short is recognised, and reading one runs no code that it names."""

import ast
import os
import pickle
import random
import re
import sys
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, assert_same
from torch.distributed.checkpoint import CheckpointException, Metadata, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nvfp4_train import checksums
from nvfp4_train.checkpoints import (
    check_same_weights,
    inspect_checkpoint,
    newest_complete,
    read_checkpoint,
    saved_shapes,
    saved_step,
    shapes,
)
from nvfp4_train.checksums import read_checksums
from nvfp4_train.saving import ShardedWriter, remove_partials, save_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OPTIMIZER = {
    "state": {"w": {"step": torch.tensor(7.0), "exp_avg": torch.arange(1000.0)}},
    "param_groups": [{"params": ["w"], "lr": 1e-3, "betas": (0.9, 0.95), "fused": None, "maximize": False}],
}


def save_folder(path: Path, step: int = 7, **values: Any) -> None:
    writer = ShardedWriter(path)
    writer.start({"global_step": step, "lr_schedulers": []})
    state = {"state_dict": {"w": torch.arange(1000.0), **values}, "optimizer_0": OPTIMIZER}
    save(state, storage_writer=writer, no_dist=True)


def save_one_file(path: Path, step: int = 7) -> None:
    save_file({"global_step": step, "lr_schedulers": [], "state_dict": {"w": torch.arange(1000.0)}}, path)


def choose(folder: Path) -> tuple[Path | None, list[Path]]:
    """`newest_complete`, without the faults."""
    newest, passed_over = newest_complete(folder)
    return newest, [facts.path for facts in passed_over]


def cut_short(path: Path, keep: float | None) -> None:
    """Keep this share of a file, or all but some bytes of it; None removes it."""
    size = path.stat().st_size
    path.unlink() if keep is None else os.truncate(path, int(size * keep) if 0 <= keep < 1 else int(size - keep))


KEEP = {"missing": None, "empty": 0, "half": 0.5, "99 percent": 0.99, "all but 23 bytes": 23, "all but a byte": 1}


@pytest.mark.parametrize("keep", [name for name in KEEP if name != "missing"])
def test_a_file_that_was_cut_short_is_not_used(keep: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "step-0000006.ckpt", tmp_path / "step-0000007.ckpt"
    save_one_file(whole, 6)
    save_one_file(broken, 7)
    assert choose(tmp_path) == (broken, [])
    cut_short(broken, KEEP[keep])
    assert choose(tmp_path) == (whole, [broken])


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
def test_a_sharded_checkpoint_that_was_cut_short_is_not_used(name: str, keep: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "step-0000006.ckpt", tmp_path / "step-0000007.ckpt"
    save_folder(whole, 6)
    save_folder(broken, 7)
    assert choose(tmp_path) == (broken, [])
    cut_short(broken / name, KEEP[keep])
    assert choose(tmp_path) == (whole, [broken])
    if name != "meta.pt":
        with pytest.raises(ValueError, match="was cut short"):
            read_checkpoint(broken)


@pytest.mark.parametrize("save", [save_one_file, save_folder])
def test_what_a_killed_process_leaves_is_named_and_cleared_by_the_next(save: Any, tmp_path: Path) -> None:
    whole, broken, partial = (tmp_path / f"{name}.ckpt{end}" for name, end in (("6", ""), ("7", ""), ("7", ".partial")))
    save(whole, 6)
    save(broken, 7)
    broken.rename(partial)
    assert choose(tmp_path) == (whole, [partial])
    save(broken, 7)
    assert choose(tmp_path) == (broken, [])


def save_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "weights of another project")


FOREIGN = {
    "zip": save_zip,
    "script": lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "list": lambda path: torch.save([1, 2], path),
    "weights": lambda path: torch.save({"w": torch.ones(3)}, path),
    "old format": lambda path: torch.save({"global_step": 7}, path, _use_new_zipfile_serialization=False),
    "class": lambda path: torch.save({"global_step": 7, "path": Path("x")}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"global_step": 7})),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "step of another kind": lambda path: torch.save({"global_step": "last"}, path),
    "empty folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_a_file_of_another_program_is_not_used(kind: str, tmp_path: Path) -> None:
    whole, foreign = tmp_path / "step-0000006.ckpt", tmp_path / "step-0000007.ckpt"
    save_one_file(whole, 6)
    FOREIGN[kind](foreign)
    assert saved_step(foreign) is None
    assert choose(tmp_path) == (whole, [foreign])


PARTS = [(save_one_file, ""), *((save_folder, name) for name in ("meta.pt", ".metadata", "__0_0.distcp", "checksums.json"))]


@pytest.mark.parametrize(("save", "name"), PARTS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_raises_nothing_and_is_named_or_changes_nothing(save: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / "7.ckpt"
    save(path)
    whole = read_checkpoint(path)
    content, generator = (path / name).read_bytes(), random.Random(0)
    found = set()
    for number in range(200):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 4, 16))):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (path / name).write_bytes(damaged)
        assert saved_step(path) in (None, 7)
        facts = inspect_checkpoint(path)
        if facts.fault is None:
            # Some bytes of a zip archive stand between its records.
            assert save is save_one_file, f"{number}: {facts}"
            assert_same(read_checkpoint(path), whole)
        else:
            assert name in facts.fault
            assert "\n" not in facts.fault
        found.add(facts.fault is None)
    assert True not in found if path.is_dir() else found == {True, False}


@pytest.mark.parametrize(("save", "name"), PARTS)
def test_a_damaged_checkpoint_is_passed_over_by_name(save: Any, name: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "step-0000006.ckpt", tmp_path / "step-0000007.ckpt"
    save(whole, 6)
    save(broken, 7)
    flip_a_bit(broken / name)
    newest, (facts,) = newest_complete(tmp_path)
    assert (newest, facts.path) == (whole, broken)
    where = name or "data/0"
    assert str(facts) == f"{broken} is damaged: {where} does not have its checksum"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_piece_of_a_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PIECE_BYTES", 1000)
    save_folder(tmp_path / "7.ckpt")
    shard = tmp_path / "7.ckpt" / "__0_0.distcp"
    content = shard.read_bytes()
    pieces = read_checksums(tmp_path / "7.ckpt")["__0_0.distcp"].pieces
    assert pieces == tuple(zlib.crc32(content[start : start + 1000]) for start in range(0, len(content), 1000))
    assert inspect_checkpoint(tmp_path / "7.ckpt").fault is None
    for place in (0, 999, 1000, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 128]) + content[place + 1 :])
        assert inspect_checkpoint(tmp_path / "7.ckpt").fault == "is damaged: __0_0.distcp does not have its checksum"
        # Without reading the weights nothing shows.
        assert inspect_checkpoint(tmp_path / "7.ckpt", verify=False).fault is None


def test_a_sharded_checkpoint_of_an_older_version_has_no_checksums(tmp_path: Path) -> None:
    save_folder(tmp_path / "7.ckpt")
    (tmp_path / "7.ckpt" / "checksums.json").unlink()
    assert choose(tmp_path) == (tmp_path / "7.ckpt", [])


def test_what_cannot_be_continued_from_says_why(tmp_path: Path) -> None:
    def fault(path: Path) -> str | None:
        (facts,) = {inspect_checkpoint(path, verify=verify) for verify in (False, True)}
        return facts.fault

    writer = ShardedWriter(tmp_path / "weights")
    writer.start({"global_step": 7})
    save({"state_dict": {"w": torch.ones(3)}}, storage_writer=writer, no_dist=True)
    save_file({"global_step": 7, "state_dict": {}}, tmp_path / "weights.ckpt")
    assert fault(tmp_path / "weights") == fault(tmp_path / "weights.ckpt") == "holds weights only, no state of the optimizer"
    assert saved_step(tmp_path / "weights") == 7
    assert fault(tmp_path / "none.ckpt") == "does not exist"
    assert fault(tmp_path) == "is no checkpoint of a run"
    (tmp_path / "7.ckpt.partial").touch()
    assert fault(tmp_path / "7.ckpt.partial") == "was cut short"
    torch.save([1], tmp_path / "list.ckpt")
    assert fault(tmp_path / "list.ckpt") == "is no checkpoint of a run"


@pytest.mark.parametrize("save", [save_one_file, save_folder])
def test_what_killed_processes_left_is_removed(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "6.ckpt", 6)
    save(tmp_path / "7.ckpt", 7)
    (tmp_path / "7.ckpt").rename(tmp_path / "7.ckpt.partial")
    assert remove_partials(tmp_path) == [tmp_path / "7.ckpt.partial"]
    assert os.listdir(tmp_path) == ["6.ckpt"]


@pytest.mark.parametrize("save", [save_one_file, save_folder])
def test_an_error_of_the_disk_is_raised(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("input/output error")

    save(tmp_path / "7.ckpt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="input/output error"):
        newest_complete(tmp_path)


@pytest.mark.parametrize("index", [{"storage_data": {}}, [1, 2], Metadata({}, storage_data={"w": "__0_0.distcp"})])
def test_a_folder_with_another_index_is_not_used(index: Any, tmp_path: Path) -> None:
    whole, foreign = tmp_path / "step-0000006.ckpt", tmp_path / "step-0000007.ckpt"
    save_folder(whole, 6)
    save_folder(foreign, 7)
    (foreign / ".metadata").write_bytes(pickle.dumps(index))
    assert choose(tmp_path) == (whole, [foreign])


@pytest.mark.parametrize("save", [save_one_file, save_folder])
def test_weights_of_other_names_or_shapes_are_named(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "7.ckpt"
    save(path)
    saved = saved_shapes(path) if path.is_dir() else shapes(read_checkpoint(path)["state_dict"])
    check_same_weights(path, saved, shapes({"w": torch.ones(1000)}))
    for ours, difference in (
        ({"w": torch.ones(10, 100)}, "w is (1000,) there and (10, 100) here"),
        ({"w": torch.ones(1000), "b": torch.ones(())}, "b is missing there and () here"),
        ({}, "w is (1000,) there and missing here"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"the checkpoint {path} was saved with another model: {difference}; ")):
            check_same_weights(path, saved, shapes(ours))


def calls(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Where a function is called in the package and the launchers, and with which constant options."""
    found = []
    for file in [*(ROOT / "nvfp4_train").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                found.append((f"{file.name}:{node.lineno}", options))
    return found


def test_all_checkpoints_are_read_with_weights_only() -> None:
    assert len(calls("torch.load")) >= 4
    # Lightning hands the option of fit to its own torch.load.
    for place, options in calls("torch.load") + calls("trainer.fit"):
        assert options.get("weights_only") is True, place
    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "FileSystemReader", "DefaultLoadPlanner"):
        assert not calls(name), name


def test_a_sharded_checkpoint_holds_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reads it where nvfp4_train and Lightning cannot be imported."""
    save_folder(tmp_path / "7.ckpt")
    for name in [*sys.modules, "nvfp4_train", "lightning"]:
        if name.split(".")[0] in ("nvfp4_train", "lightning"):
            monkeypatch.setitem(sys.modules, name, None)
    dcp_to_torch_save(tmp_path / "7.ckpt", tmp_path / "one.pt")
    loaded = torch.load(tmp_path / "one.pt", weights_only=True)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(1000.0))
    assert loaded["optimizer_0"]["param_groups"] == OPTIMIZER["param_groups"]
    assert torch.load(tmp_path / "7.ckpt" / "meta.pt", weights_only=True) == {"global_step": 7, "lr_schedulers": []}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "shard", "file"])
def test_code_in_a_checkpoint_is_not_run(name: str, tmp_path: Path) -> None:
    evil, path = Evil(tmp_path / "ran"), tmp_path / "7.ckpt"
    if name == "file":
        torch.save({"global_step": 7, "state_dict": {"w": evil}}, path)
    elif name == "shard":
        save_folder(path, evil=evil)
    else:
        save_folder(path)
        (path / name).unlink()
        torch.save({"global_step": 7, "evil": evil}, path / name) if name == "meta.pt" else (path / name).write_bytes(
            pickle.dumps(evil)
        )
    with pytest.raises((pickle.UnpicklingError, CheckpointException, ValueError)):
        read_checkpoint(path)
    # A file of values that nobody looks at may well be complete.
    assert saved_step(path) == (7 if name == "shard" else None)
    assert not evil.path.exists()


def test_threads_that_check_a_file_do_not_share_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python 3.12 they would move each other's place in it, and find damage in a file that is whole."""
    save_file(
        {"global_step": 7, "lr_schedulers": [], "state_dict": {str(i): torch.ones(3) for i in range(200)}}, tmp_path / "7.ckpt"
    )
    users: dict[zipfile.ZipFile, set[int]] = {}
    open_record = zipfile.ZipFile.open

    def noted(archive: zipfile.ZipFile, *args: Any, **kwargs: Any) -> Any:
        users.setdefault(archive, set()).add(threading.get_ident())
        return open_record(archive, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    monkeypatch.setattr("nvfp4_train.parallel.usable_cores", lambda: 4)
    assert inspect_checkpoint(tmp_path / "7.ckpt").fault is None
    assert all(len(threads) == 1 for threads in users.values())
    assert len(set.union(*users.values())) > 1
