"""Files of an earlier run in the folder of a run: they are kept, under a numbered name."""

from pathlib import Path


def keep_earlier(path: Path) -> None:
    """Give a file of an earlier run in the folder a numbered name, NAME.1.SUFFIX or the next that is free."""
    number = 1
    while (earlier := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(earlier)
