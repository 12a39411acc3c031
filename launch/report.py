"""Make the report of a run anew from the files of its folder: report.html, one page without scripts or links, and report.md.

python launch/report.py outputs/RUN
"""

import argparse
import sys
from pathlib import Path

from nvfp4_train.errors import RunError, one_line
from nvfp4_train.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run")
    run_dir = parser.parse_args().run_dir
    try:
        print(write_report(run_dir))
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
