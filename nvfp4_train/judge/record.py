"""The results as plain data, for other programs.

What the run adds (see `run.evaluation`) are `schema`, `time`, `command`, `versions`, `computed` and `data`. These stay as they are
while `schema` is 1; more may come. A number with an interval is {"mean", "low", "high"}; what is not finite is null.

    models       [{label, given, kind, path, options, found, notes}]
    results      [{model, serving, texts: {text: {loss, perplexity, kl, top1_agreement}}, tasks: {task: {metric: number}}}], a row for
                 each model and serving, the reference first: it has loss and perplexity alone. `sequences` {text: {positions [S],
                 values: {metric: [S]}}} where it was asked for
    differences  [{model, serving, base, base_serving, text, metrics: {metric: {mean, low, high, significant}}}], paired by sequence
    fail_if      {limits: {limit: threshold}, verdicts: [{model, serving, limit, threshold, mean, low, high, exceeded}], failed}
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nvfp4_train.judge.results import Difference, Limits, Row, Verdict
from nvfp4_train.judge.subjects import Subject

SCHEMA = 1


def record(
    subjects: Sequence[Subject],
    notes: dict[str, list[str]],
    rows: Sequence[Row],
    differences: Sequence[Difference],
    limits: Limits,
    verdicts: Sequence[Verdict],
    *,
    keep_sequences: bool = False,
) -> dict[str, Any]:
    """The part that is told of above. `notes` are lines for the user by label."""
    return finite(
        {
            "models": [
                {
                    "label": subject.label,
                    "given": subject.given,
                    "kind": subject.kind,
                    "path": subject.path,
                    "options": list(subject.options),
                    "found": subject.found,
                    "notes": notes.get(subject.label, []),
                }
                for subject in subjects
            ],
            "results": [_row(row, keep_sequences) for row in rows],
            "differences": [
                {
                    "model": found.row.label,
                    "serving": found.row.serving,
                    "base": found.base.label,
                    "base_serving": found.base.serving,
                    "text": found.text,
                    "metrics": {
                        name: value.to_dict() | {"significant": value.excludes_zero} for name, value in found.values.items()
                    },
                }
                for found in differences
            ],
            "fail_if": {
                "limits": limits.given,
                "verdicts": [
                    {
                        "model": verdict.row.label,
                        "serving": verdict.row.serving,
                        "limit": verdict.limit,
                        "threshold": verdict.threshold,
                        **verdict.value.to_dict(),
                        "exceeded": verdict.is_exceeded,
                    }
                    for verdict in verdicts
                ],
                "failed": any(verdict.is_exceeded for verdict in verdicts),
            },
        }
    )


def _row(row: Row, keep_sequences: bool) -> dict[str, Any]:
    texts = {text: {name: value.to_dict() for name, value in row.intervals(text).items()} for text in row.texts}
    found: dict[str, Any] = {"model": row.label, "serving": row.serving, "texts": texts, "tasks": dict(row.tasks)}
    if keep_sequences:
        found["sequences"] = {text: metrics.to_dict() for text, metrics in row.texts.items()}
    return found


def finite(value: Any) -> Any:
    """Without what JSON has no word for: null for a number that is not finite, plain numbers for those of NumPy."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
