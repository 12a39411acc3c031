"""Every command of docs/ is one that its launcher takes, so that options cannot rot. None is run."""

import ast
import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from pages import PAGES, ROOT, commands, name_of

from nvfp4_train.run.compose import compose_options, groups, make
from nvfp4_train.run.options import check_parts, check_targets, check_trainer

OWN_OPTIONS = {
    "train.py": (),
    "ptq.py": (),
    "slurm.sbatch": (),
    "plan.py": ("world_size",),
    "sensitivity.py": ("bits", "sequences", "by"),
}
"""Launchers that take the options of training, and those that they have beside."""
COMMANDS = [(name_of(page), command) for page in PAGES for command in commands(page)]
INLINE = sorted({found for page in PAGES for found in re.findall(r"`(?:python )?launch/(\w+\.\w+)", page.read_text())})


def split_command(command: str) -> tuple[str, list[str]]:
    """The name of the launcher, and what it is given. Raises ValueError for a command of another form."""
    words = shlex.split(command)
    place = next((place for place, word in enumerate(words) if word.startswith("launch/")), None)
    if place is None or words[0] not in ("python", "torchrun", "sbatch"):
        raise ValueError(f"must be python, torchrun or sbatch with a launcher, got {command}")
    return words[place].removeprefix("launch/"), words[place + 1 :]


def without_sweeps(options: list[str]) -> list[list[str]]:
    """The options of each job: a value with commas outside of brackets is several under --multirun."""
    if "--multirun" not in options:
        return [options]
    values = []
    for option in options:
        name, _, value = option.partition("=")
        several = value.split(",") if "," in value and value[0] not in "[{" else [value]
        values += [] if option == "--multirun" else [[f"{name}={each}" for each in several]]
    return [list(job) for job in itertools.product(*values)]


def check_training_options(options: list[str]) -> None:
    """As a run checks them before it builds anything. Raises ValueError."""
    found, _ = compose_options(ROOT, options)
    check_targets(found)
    check_trainer(found["trainer"])
    check_parts(found)
    for name, node in groups(found).items():
        if name not in ("callbacks", "logger", "trainer"):
            make(node, name)


@pytest.fixture(autouse=True)
def run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ID", "docs")


@pytest.mark.parametrize(
    ("page", "command"),
    [pair for pair in COMMANDS if " launch/" in pair[1] and "/extend/" not in f"/{pair[0]}"],
    ids=lambda value: value if value.endswith(".md") else re.sub(r"\W+", "-", value)[:60],
)
def test_a_command_is_one_that_its_launcher_takes(page: str, command: str) -> None:
    launcher, given = split_command(command)
    assert (ROOT / "launch" / launcher).is_file()
    if launcher in OWN_OPTIONS:
        own = tuple(f"{name}=" for name in OWN_OPTIONS[launcher])
        text = (ROOT / "launch" / launcher).read_text()
        assert all(option.partition("=")[0] in text for option in given if option.startswith(own))
        for job in without_sweeps([option for option in given if not option.startswith(own)]):
            check_training_options(job)
    else:
        known = own_options(launcher)
        for word in given:
            if found := re.match(r"(--[\w-]+)|[+~]*(\w+)[\w.]*=", word):
                assert (found[1] or found[2]) in known, f"{word} of {page}"


def own_options(launcher: str) -> set[str]:
    """What a launcher with options of its own takes: its `add_argument`s, and the NAME=s of its docstring and of its config."""
    text = (ROOT / "launch" / launcher).read_text()
    found = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", text))
    found |= set(re.findall(r"\b(\w+)[\w.]*=", ast.get_docstring(ast.parse(text)) or ""))
    config = ROOT / "configs" / f"{Path(launcher).stem}.yaml"
    if config.exists():
        options = yaml.safe_load(config.read_text())
        found |= options.keys() | {name for entry in options["defaults"] if isinstance(entry, dict) for name in entry}
    return found


def test_pages_have_commands_of_the_forms_that_are_checked() -> None:
    others = [command for _, command in COMMANDS if " launch/" not in command]
    assert set(others) == {"pip install -e ."}
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("launcher", INLINE)
def test_a_launcher_that_a_page_names_exists(launcher: str) -> None:
    assert (ROOT / "launch" / launcher).is_file()


def test_scripts_and_files_that_a_page_names_exist() -> None:
    named = {
        path
        for page in PAGES
        for path in re.findall(r"`(?:python )?((?:benchmarks|nvfp4_train|configs|recipes|tests)/[\w/.]+)[` ]", page.read_text())
    }
    assert {"benchmarks/vllm_read.py"} <= named
    added = {"nvfp4_train/export/readers/NAME.py"}
    assert not [path for path in sorted(named - added) if not Path(ROOT, path).exists()]


def test_wrong_options_are_found() -> None:
    with pytest.raises(ValueError, match="quant.rule must be one of"):
        check_training_options(["+recipe=quickstart", "quant.rule=hessain"])
    with pytest.raises(ValueError, match="no such option"):
        check_training_options(["+recipe=quickstart", "+optim.rate=1"])
    with pytest.raises(ValueError, match="recipe"):
        check_training_options(["+recipe=quickstrat"])
