"""Draw the picture with which the README opens, from the numbers of the README's own table.

python benchmarks/picture.py                    writes docs/images/result.svg
python benchmarks/picture.py --out FILE         an .svg or a .png
"""

import argparse
import re
import sys
from pathlib import Path

from nvfp4_train.pictures import COLOURS, bar_panels, png, svg

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "result.svg"
TITLE = "SmolLM2-135M-Instruct in NVFP4: how far it is from itself in bf16"
OURS, OTHERS = COLOURS[0], "#9aa3ab"
BARS = (
    # Label, colour, and how the row of the table begins; SERVING is the one that is served.
    ("PTQ, max scales", OTHERS, "PTQ, max scales"),
    ("PTQ, ours", OURS, "PTQ, ours"),
    ("QAD, Model Optimizer", OTHERS, "QAD for SERVING, Model Optimizer"),
    ("QAD, ours", OURS, "QAD for SERVING, ours"),
)
PANELS = {"W4A16": "W4A16: weights in NVFP4", "W4A4": "W4A4: weights and activations"}


def read_table(readme: str) -> dict[str, dict[str, float]]:
    """KL by serving and by the first cell of a row. Raises ValueError where the README has no such table."""
    lines = iter(readme.splitlines())
    columns = next(([cell.strip() for cell in line.split("|")] for line in lines if "served W4A16: KL" in line), None)
    if columns is None:
        raise ValueError("README.md must have a table with a column 'served W4A16: KL', got none")
    found: dict[str, dict[str, float]] = {serving: {} for serving in PANELS}
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.split("|")]
        for serving in PANELS:
            found[serving][cells[1]] = float(cells[columns.index(f"served {serving}: KL")].strip("*"))
    return found


def chosen(table: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """The values of `BARS` by serving. Raises ValueError where not exactly one row begins so."""
    values: dict[str, list[float]] = {}
    for serving, rows in table.items():
        values[serving] = []
        for _, _, begin in BARS:
            pattern = re.compile(re.escape(begin.replace("SERVING", serving)) + r"(,|$)")
            matching = [name for name in rows if pattern.match(name)]
            if len(matching) != 1:
                raise ValueError(f"one row must begin with {begin!r}, got {matching}")
            values[serving].append(rows[matching[0]])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE", help="an .svg or a .png (default: %(default)s)")
    out = parser.parse_args().out
    try:
        values = chosen(read_table((ROOT / "README.md").read_text()))
    except ValueError as error:
        sys.exit(f"error: {error}")
    figure = bar_panels(
        TITLE,
        "KL divergence from bf16 on held-out text, nats a token (less is better)",
        [label for label, _, _ in BARS],
        {PANELS[serving]: row for serving, row in values.items()},
        colours=[colour for _, colour, _ in BARS],
        form=".4f",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    if out.suffix == ".png":
        partial.write_bytes(png(figure))
    else:
        # matplotlib ends lines of paths with a space.
        partial.write_text("".join(f"{line.rstrip()}\n" for line in svg(figure).splitlines()))
    partial.replace(out)
    print(out)


if __name__ == "__main__":
    main()
