"""Which model types work: trains, exports and reads back a small random model of each, and writes the README's table.

    python benchmarks/families.py                        all types of tests/families/cases.py; says what differs from the last time
    python benchmarks/families.py llama gemma3           some of them
    python benchmarks/families.py --write                and puts the outcomes into tests/families/outcomes.json and README.md

Runs on CPUs, a process for each.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

FAMILIES = Path(__file__).resolve().parent.parent / "tests" / "families"
sys.path.insert(0, str(FAMILIES))

from cases import CASES, fields_of  # noqa: E402
from expectations import README, read_outcomes, readme_with, table, write_outcomes  # noqa: E402
from family import Outcome, run_family  # noqa: E402


def measure(model_type: str) -> Outcome:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return run_family(model_type, fields_of(model_type), Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", choices=[*CASES, []])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    types = options.types or list(CASES)
    known = read_outcomes()
    outcomes: dict[str, Outcome] = {}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for model_type, outcome in zip(types, pool.map(measure, types), strict=True):
            outcomes[model_type] = outcome
            if outcome != known.get(model_type):
                print(f"{model_type}: {outcome}, which was {known.get(model_type)}", flush=True)
    exact = sum(not (o.refused or o.failed or o.difference) for o in outcomes.values())
    print(f"{exact} of {len(outcomes)} types train, and give the training logits once decoded: difference 0.0", flush=True)
    outcomes = known | outcomes
    if options.write:
        write_outcomes(outcomes)
        README.write_text(readme_with(outcomes))
    elif not options.types:
        print(table(outcomes))


if __name__ == "__main__":
    main()
