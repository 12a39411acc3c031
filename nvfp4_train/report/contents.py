"""What there is to say about a run, in the order in which a reader asks."""

import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from nvfp4_train.metrics import EXPORT_BITS_PER_WEIGHT, PEAK_GIB, SQNR_DB, TOKENS_PER_S
from nvfp4_train.report.blocks import Block, Code, Contents, Section, Table, Text, Tile
from nvfp4_train.report.comparison import comparison_blocks, comparisons, main_comparison, tiles, verdict
from nvfp4_train.report.curves import curve_blocks
from nvfp4_train.report.layers import health_blocks, heat_map_blocks, worst_blocks
from nvfp4_train.report.numbers import duration, in_bytes, number
from nvfp4_train.report.run_files import RunFiles

NOT_RUN = "not run"
"""How `ExportReport` begins the line of the readers that it did not run."""
NO_RECORD = "run.json is not in this folder. callbacks.report writes it at the end of a run."


def contents(files: RunFiles) -> Contents:
    found = comparisons(files)
    main = main_comparison(files, found)
    return Contents(
        title=f"NVFP4 report: {files.run_dir.resolve().name}",
        subtitle=" · ".join(filter(None, [_model(files), _served(files), files.record.get("method")])),
        verdict=[*_unfinished(files), *verdict(files, main)],
        tiles=[*tiles(main), *_tiles(files)],
        sections=[
            Section("What was run", list(_run_blocks(files))),
            Section("Curves", list(curve_blocks(files))),
            Section("PTQ, final and masters", list(comparison_blocks(files, found))),
            Section("Layers", list(heat_map_blocks(files))),
            Section("The ten worst layers", list(worst_blocks(files))),
            Section("Quantizer health", list(health_blocks(files))),
            Section("Memory and time", list(_cost_blocks(files))),
            Section("Which readers were verified", list(_reader_blocks(files))),
            Section("How to serve it", list(_serve_blocks(files))),
            Section("How to run it again", list(_command_blocks(files))),
        ],
    )


def _unfinished(files: RunFiles) -> Iterator[str]:
    if files.is_finished:
        return
    yield f"Not finished: stopped at step {files.step:,}. The same command with ckpt_path=auto continues it."
    if files.finished_step is not None:
        yield (
            f"What was measured at the end, exports and times are of step {files.finished_step:,}, where it had ended before; curves "
            "and layers go on from there."
        )


def _model(files: RunFiles) -> str:
    path = files.record.get("model") or files.option("model.path")
    if path:
        return Path(path).name if Path(path).is_absolute() or Path(path).exists() else str(path)
    return f"a {files.option('model.config.model_type', 'model')} with random weights to begin with"


def _served(files: RunFiles) -> str:
    exports = files.record.get("exports") or []
    serving = exports[0]["serving"] if exports else files.option("quant.serve") or files.record.get("trained_serving")
    return serving.upper() if serving else ""


def _tiles(files: RunFiles) -> Iterator[Tile]:
    for metric, label, unit in (
        (SQNR_DB, "SQNR of all weights", "dB"),
        (EXPORT_BITS_PER_WEIGHT, "bits a weight, all tensors", ""),
    ):
        if metric in files.metrics:
            yield Tile(label, f"{number(files.metrics[metric])} {unit}".strip())


def _run_blocks(files: RunFiles) -> Iterator[Block]:
    record, option = files.record, files.option
    step, start = files.step, files.start_step
    quantized = "not in training: at the end, to be measured and exported"
    if start is None and not files.is_finished and option("quant.enabled", True):
        quantized = f"from step {option('quant.start_step', 0):,} on, which it has not come to"
    elif start is not None:
        quantized = "from the first step on" if start == 0 else f"from step {start:,} on"
    parameters = None
    if record.get("parameters"):
        share = record["quantized_parameters"] / record["parameters"]
        parameters = f"{record['parameters']:,}, of which {record['quantized_parameters']:,} ({share:.1%}) in NVFP4"
    exponent = option("quant.equalize")
    rows: list[tuple[str, Any]] = [
        ("model", f"{_model(files)}" + (f" ({record['architecture']})" if record else "")),
        ("parameters", parameters),
        ("method", record.get("method")),
        ("loss", _loss(files)),
        ("data", _options(files, "data", ("path", "seq_len", "batch_size", "train_on", "max_documents"))),
        ("optimizer steps", f"{step:,}" + _steps_note(files)),
        ("quantized", quantized),
        ("scale rule", f"{option('quant.rule')}, global scales {option('quant.global_scale')}" if option("quant") else None),
        ("trained inputs", {"none": "bf16 (W4A16)", "nvfp4": "NVFP4 (W4A4)"}.get(option("quant.activations", ""))),
        ("equalization", record.get("equalization") or ("none" if exponent in (None, "none") else f"exponent {exponent}")),
        (
            "calibration",
            f"{option('quant.calibration.sequences'):,} sequences" if option("quant.calibration.sequences") else None,
        ),
        ("kept in bf16", ", ".join(option("quant.exclude", []))),
        ("optimizer", _options(files, "optim", ("lr", "warmup_steps", "min_lr_ratio", "weight_decay", "betas"))),
        ("computes in", record.get("compute_dtype")),
        ("seed", option("seed")),
        ("hardware", _hardware(record)),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())),
        ("run folder", files.run_dir),
    ]
    yield Table(header=["", ""], rows=[[name, str(value)] for name, value in rows if value not in (None, "")], align="ll")
    if not record:
        yield Text(f"Hardware, versions and times are not known: {NO_RECORD}")


def _steps_note(files: RunFiles) -> str:
    if not files.is_finished:
        return ", not finished"
    return f" ({files.record['tokens']:,} tokens)" if files.record.get("tokens") else ""


def _options(files: RunFiles, group: str, names: tuple[str, ...]) -> str:
    """Those of the options of a group that are set."""
    known = [(name, files.option(f"{group}.{name}")) for name in names]
    return ", ".join(f"{name}={value}" for name, value in known if value is not None)


def _loss(files: RunFiles) -> str:
    kind = str(files.option("loss._target_", "")).rpartition(".")[2]
    options = _options(files, "loss", ("divergence", "temperature", "cross_entropy", "hidden", "teacher_path"))
    return f"{kind}: {options}" if options else kind


def _hardware(record: Any) -> str | None:
    if not record:
        return None
    devices = ", ".join(f"{count} x {name}" for name, count in record["devices"].items())
    return f"{devices} ({record['strategy']})" if record["ranks"] > 1 else devices


def _cost_blocks(files: RunFiles) -> Iterator[Block]:
    record, metrics = files.record, files.metrics
    rows: list[tuple[str, str]] = []
    if record:
        started, ended = (datetime.fromisoformat(record[name]) for name in ("started", "ended"))
        rows.append(("started", f"{started:%Y-%m-%d %H:%M:%S %Z}"))
        rows.append(("ended", f"{ended:%Y-%m-%d %H:%M:%S %Z}, after {duration((ended - started).total_seconds())}"))
        if (steps := record["last_step"] - record["first_step"]) > 0:
            since = f", from step {record['first_step']:,} on, where this process continued" if record["first_step"] else ""
            rows.append((f"{steps:,} training steps", f"{duration(record['steps_s'])}, evaluations left out{since}"))
        for export in record["exports"]:
            rows.append(
                (
                    f"export, {export['format']}",
                    f"written in {duration(export['write_s'])}, verified in {duration(export['verify_s'])}",
                )
            )
    # metrics.json of a run that continued with nothing left to train lacks both.
    of_training = record.get("training", {}) | metrics
    if TOKENS_PER_S in of_training:
        rows.append(("tokens a second, all ranks", number(of_training[TOKENS_PER_S])))
    if PEAK_GIB in of_training:
        rows.append(("device memory in training, peak of a rank", f"{number(of_training[PEAK_GIB])} GiB"))
    if record:
        if record["peak_device_bytes"]:
            rows.append(("device memory up to the end, peak of a rank", in_bytes(record["peak_device_bytes"])))
        if record["peak_host_bytes"]:
            rows.append(("host memory, peak of a rank", in_bytes(record["peak_host_bytes"])))
        for export in record["exports"]:
            rows.append(
                (
                    f"size of the export, {export['format']}",
                    f"{in_bytes(export['bytes'])}; {export['bits_per_quantized_weight']:.3f} bits a quantized weight",
                )
            )
    if rows:
        yield Table(header=["", ""], rows=rows, align="ll")
    if not record:
        yield Text(f"{'More' if rows else 'Memory and time'} is not known: {NO_RECORD}")


def _reader_blocks(files: RunFiles) -> Iterator[Block]:
    exports = files.record.get("exports")
    rows = [["training", "nvfp4_train, before the first step", check] for check in files.record.get("checks", [])]
    for export in exports or []:
        for line in export["checked"]:
            reader, _, found = line.partition(": ")
            if reader == NOT_RUN:
                reader, found = found, reader
            rows.append([export["folder"], reader, found])
    if rows:
        yield Table(header=["of", "reader", "what it found"], rows=rows, align="lll")
    for export in exports or []:
        if export["note"]:
            yield Text(f"{export['folder']}: {export['note']}.")
    if not exports:
        yield Text(_no_export(files))


def _serve_blocks(files: RunFiles) -> Iterator[Block]:
    exports = files.record.get("exports") or []
    for export in exports:
        for reader, line in export["serve"]:
            yield Text(f"{reader}, {export['format']}:")
            yield Code(line)
    if not exports:
        yield Text(_no_export(files))


def _no_export(files: RunFiles) -> str:
    if not files.record:
        return f"Exports are not known: {NO_RECORD}"
    last = shlex.quote(str(files.run_dir / "checkpoints" / "last.ckpt"))
    return f"No folder was exported: callbacks.export is null. python launch/export.py {last} FOLDER exports a checkpoint."


def _command_blocks(files: RunFiles) -> Iterator[Block]:
    command = files.record.get("command")
    if command:
        yield Code(command)
        yield Text("In an empty run_dir. Options that are not named there are in .hydra/config.yaml of the run folder.")
    else:
        why = "the run was not started by a launcher." if files.record else NO_RECORD
        yield Text(f"The command is not known: {why} Options are in .hydra/config.yaml of the run folder.")
    yield Text("This report, anew:")
    yield Code(f"python launch/report.py {shlex.quote(str(files.run_dir))}")
