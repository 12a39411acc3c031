"""What came of every case when it was last measured, and the README's table of it. `benchmarks/families.py` measures anew."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import transformers
from cases import KINDS
from family import Outcome

FILE = Path(__file__).parent / "outcomes.json"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
HEADER = """\
| kind | types | share in NVFP4 | decoded folder | packed folder in transformers |
| --- | --- | --- | --- | --- |
"""


def read_outcomes() -> dict[str, Outcome]:
    return {name: Outcome(**fields) for name, fields in json.loads(FILE.read_text())["outcomes"].items()}


def measured_with() -> str:
    """The version of transformers with which the outcomes were measured: others may load another set of packed folders."""
    return json.loads(FILE.read_text())["transformers"]


def write_outcomes(outcomes: Mapping[str, Outcome]) -> None:
    """One line for each type, in the order of the cases."""
    lines = [f"  {json.dumps(name)}: {json.dumps(outcomes[name].to_dict())}" for names in KINDS.values() for name in names]
    version = json.dumps(transformers.__version__)
    FILE.write_text(f'{{"transformers": {version}, "outcomes": {{\n' + ",\n".join(lines) + "\n}}\n")


def table(outcomes: Mapping[str, Outcome]) -> str:
    """A Markdown table with a row for the types of a kind that have one outcome in common."""
    rows = HEADER
    for kind, cases in KINDS.items():
        groups: dict[tuple, list[str]] = {}
        for name in cases:
            outcome = outcomes[name]
            # Reasons that differ in names and numbers alone are one.
            reason = re.sub(r"<class .*?>|\[.*\]|\S+_\S+|\d+", "", outcome.refused or outcome.failed or "")
            groups.setdefault((reason, not outcome.packed, bool(outcome.difference)), []).append(name)
        rows += "".join(_row(kind, groups[key], outcomes) for key in sorted(groups))
    return rows


def _row(kind: str, names: list[str], outcomes: Mapping[str, Outcome]) -> str:
    first = outcomes[names[0]]
    types = f"{len(names)}: {', '.join(sorted(names))}"
    if reason := first.refused or first.failed:
        return f"| {kind} | {types} | {'refused' if first.refused else 'fails'}: {reason.replace('|', '/')} | | |\n"
    shares = sorted(round(outcomes[name].share * 100) for name in names)
    share = f"{shares[0]} %" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]} %"
    worst = max(outcomes[name].difference for name in names)
    return f"| {kind} | {types} | {share} | {worst:.3g} | {'the same logits' if first.packed else 'no'} |\n"


def readme_with(outcomes: Mapping[str, Outcome]) -> str:
    """The README with the table of some outcomes between its two markers."""
    before, _, rest = README.read_text().partition(BEGIN)
    return before + BEGIN + table(outcomes) + END + rest.partition(END)[2]
