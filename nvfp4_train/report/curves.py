"""What was logged on the way: curves of loss and KL with the switch marked."""

import math
from collections.abc import Iterator, Sequence

from nvfp4_train import pictures
from nvfp4_train.report.blocks import Block, Picture, Table, Text
from nvfp4_train.report.comparison import loss_is_kl
from nvfp4_train.report.numbers import NONE, number
from nvfp4_train.report.run_files import RunFiles

POINTS = 300
"""More than a page can show; longer series are drawn as means of as many parts."""
ROWS = 12
SIZE = (5.4, 3.3)
"""Inches: two fit beside each other, and one on a phone."""
FORWARD_KL = "forward_kl"
LOG_RANGE = 20
"""Largest over smallest value, above which the axis is logarithmic."""

Points = Sequence[tuple[int, float]]


def curve_blocks(files: RunFiles) -> Iterator[Block]:
    history = files.history
    if not files.step:
        yield Text("The run took no training steps, so there are no curves. launch/train.py trains.")
        return
    loss: dict[str, Points] = {"training": history.get("train/loss", []), "held-out text": history.get("val/loss", [])}
    if not any(loss.values()):
        yield Text(
            "No curves: metrics.csv is not in this folder, or has no loss. logger=csv writes it, and logger=wandb does, too."
        )
        return
    kl = history.get("val/kl", [])
    is_kl = loss_is_kl(files)
    yield _curve("KL to the original (the loss)" if is_kl else "Loss", "nats a token", loss, files)
    if kl and not is_kl:
        # Another divergence, or one at a temperature, is no KL beside that of held-out text.
        is_forward_kl = files.option("loss.divergence", FORWARD_KL) == FORWARD_KL and files.option("loss.temperature", 1.0) == 1
        training = history.get("train/divergence", []) if is_forward_kl else []
        yield _curve("KL to the original", "nats a token", {"training": training, "held-out text": kl}, files)
    if agreement := history.get("val/top1_agreement"):
        percent = [(step, 100 * value) for step, value in agreement]
        yield _curve("Same most likely token as the original", "% of positions", {"held-out text": percent}, files)
    if kl or agreement:
        return
    of_kl = files.option("loss._target_", "").endswith(".DistillationLoss") or any(
        "kl" in of.values for of in files.sequences.values()
    )
    if of_kl:
        yield Text(
            "There is no curve of the KL on held-out text: there was no validation. "
            "trainer.val_check_interval says every how many steps there is one."
        )
    else:
        yield Text("There is no KL: the loss compares with no other model. loss=distillation reports it.")


def _curve(title: str, unit: str, lines: dict[str, Points], files: RunFiles) -> Picture:
    lines = {label: points for label, points in lines.items() if points}
    marks = _marks(files)
    values = [value for points in lines.values() for _, value in points]
    is_log = min(values) > 0 and max(values) / min(values) > LOG_RANGE
    series = []
    for label, points in lines.items():
        steps, means = zip(*thinned(points), strict=True)
        series.append(pictures.Series(label=label, x=steps, y=means))
    figure = pictures.curves(title, "step", f"{unit}{', log scale' if is_log else ''}", series, marks=marks, log=is_log)
    figure.set_size_inches(SIZE)
    said = [
        f"{label} from {number(points[0][1])} at step {points[0][0]} to {number(points[-1][1])} at step {points[-1][0]}"
        for label, points in lines.items()
    ]
    marked = "".join(f", {label} marked at step {step}" for label, step in marks.items())
    return Picture(figure=figure, says=f"{title} over steps, in {unit}: {'; '.join(said)}{marked}.", numbers=_table(lines))


def _marks(files: RunFiles) -> dict[str, float]:
    start = files.start_step
    return {"NVFP4 on": start} if start else {}


def thinned(points: Points, number: int = POINTS) -> list[tuple[float, float]]:
    """At most `number` points: means of steps and values over equal parts."""
    size = math.ceil(len(points) / number)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in parts]


def _table(lines: dict[str, Points]) -> Table:
    """Some of the steps of the last line, with what the others had logged by then."""
    *_, last = lines.values()
    chosen = sorted({round(at * (len(last) - 1) / max(ROWS - 1, 1)) for at in range(ROWS)})
    rows = []
    for step, _ in (last[at] for at in chosen):
        before = [[value for at, value in points if at <= step] for points in lines.values()]
        rows.append([f"{step:,}", *(number(values[-1]) if values else NONE for values in before)])
    return Table(header=["step", *lines], rows=rows, align="r" * (1 + len(lines)))
