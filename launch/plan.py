"""Print the memory and traffic per GPU and optimizer step of a recipe under FSDP2, before any GPU is rented.

python launch/plan.py +recipe=llama3_8b_qat world_size=64 [OPTION=VALUE ...]
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="+", metavar="OPTION=VALUE", help="world_size=N, and the options of launch/train.py")
    arguments = parser.parse_args().overrides
    own = [argument for argument in arguments if argument.startswith("world_size=")]
    if not own:
        sys.exit("error: world_size=N must say for how many GPUs")
    world_size = own[-1].partition("=")[2]
    if not world_size.isdecimal():
        sys.exit(f"error: world_size must be a number of GPUs, got {world_size!r}")
    # This import takes seconds. Neither --help nor a refusal needs it.
    from nvfp4_train.run.planning import plan_recipe

    # RUN_ID names the folder of a run; a plan writes nothing.
    os.environ.setdefault("RUN_ID", "plan")
    try:
        print(plan_recipe(ROOT, [argument for argument in arguments if argument not in own], int(world_size)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
