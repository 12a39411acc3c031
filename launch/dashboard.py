"""Lay out a wandb workspace for the runs of a project: losses, the quantizer's health, worst layers, heat maps, histograms, speed.

python launch/dashboard.py ENTITY/PROJECT --dry-run
python launch/dashboard.py ENTITY/PROJECT [+recipe=NAME OPTION=VALUE ...]    for the statistics that these runs have
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are: logger.wandb.entity and project")
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="options of launch/train.py")
    parser.add_argument("--name", help="of the workspace; default: NVFP4 training")
    parser.add_argument("--dry-run", action="store_true", help="print the layout, and save nothing")
    arguments = parser.parse_intermixed_args()
    entity, slash, project = arguments.project.partition("/")
    if not (entity and project) or "/" in project:
        sys.exit(f"error: the first argument must be ENTITY/PROJECT, got {arguments.project!r}")
    # These imports take seconds. Neither --help nor a refusal needs them.
    import wandb

    from nvfp4_train.errors import one_line
    from nvfp4_train.run.dashboard import NAME, listing, sections_of, workspace

    # RUN_ID names the folder of a run; a layout writes nothing.
    os.environ.setdefault("RUN_ID", "dashboard")
    try:
        layout = sections_of(ROOT, arguments.overrides)
        if arguments.dry_run:
            print(listing(layout))
            return
        print(workspace(layout, entity, project, arguments.name or NAME).save().url)
    except (ValueError, OSError, wandb.Error) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
