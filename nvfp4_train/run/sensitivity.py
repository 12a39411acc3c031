"""What launch/sensitivity.py runs: the options of a training run, of which it takes the model, the data and the quantization."""

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from nvfp4_train.disk import replace_file
from nvfp4_train.errors import one_line
from nvfp4_train.judge.bits_budget import check_budget, exclusion_patterns, most_sensitive, nearest_to_the_ends, override
from nvfp4_train.judge.record import finite
from nvfp4_train.judge.sensitivity import Comparison, Key
from nvfp4_train.judge.sensitivity_report import CHOSEN, MOST, NAIVE, Findings, files, markdown
from nvfp4_train.judge.units import ALL, LEVELS, Unit, smallest_units, units_by_level, whole
from nvfp4_train.lightning_quirks import back_to_device
from nvfp4_train.losses.base import Batch
from nvfp4_train.module import QATModule
from nvfp4_train.progress import progress, progress_bar
from nvfp4_train.quant.store import ReplicatedWeightStore
from nvfp4_train.run.compose import target_class
from nvfp4_train.run.job import run_job
from nvfp4_train.sequence_metrics import SequenceMetrics
from nvfp4_train.strategy import FullyShardedStrategy

OVERRIDE_FILE = "exclude.txt"
DEFAULTS = {"bits": "4.75", "sequences": "8", "by": "weight"}
"""Options of the launcher beside those of a run."""


def take_own_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The launcher's own options, and the other arguments. Raises ValueError for a value that is none."""
    own, others = dict(DEFAULTS), []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            others.append(argument)
    try:
        bits = float(own["bits"])
    except ValueError:
        bits = math.nan
    if not math.isfinite(bits):
        raise ValueError(f"bits must be a number, the mean bits of a weight, got {own['bits']!r}")
    if not own["sequences"].isdecimal() or not int(own["sequences"]):
        raise ValueError(f"sequences must be a number of held-out sequences, at least 1, got {own['sequences']!r}")
    if own["by"] not in LEVELS:
        raise ValueError(f"by must be {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got {own['by']!r}")
    return {"bits": bits, "sequences": int(own["sequences"]), "by": own["by"]}, others


def sensitivity_options(options: dict[str, Any], *, bits: float, sequences: int, by: str) -> dict[str, Any]:
    """The options of a run that measures instead of training. Raises ValueError for such as it cannot follow."""
    strategy = options["trainer"].get("strategy")
    if isinstance(strategy, dict) and issubclass(target_class(strategy, "trainer.strategy"), FullyShardedStrategy):
        raise ValueError("trainer must be one that holds the whole model on every rank, cpu, gpu or ddp, got a sharded one")
    if not options["quant"].get("enabled", True):
        raise ValueError("quant.enabled must be true: nothing is quantized otherwise")
    measure = {"_target_": f"{__name__}.{MeasureSensitivity.__name__}", "run_dir": options["run_dir"], "bits": bits, "by": by}
    return options | {
        # The model itself, unquantized, is what it is compared with.
        "loss": {"_target_": "nvfp4_train.losses.next_token.NextTokenLoss"},
        # As many to choose by as to verify the choice.
        "data": options["data"] | {"val_sequences": 2 * sequences},
        "callbacks": {"requantize": measure},
        "logger": {},
    }


def run_sensitivity(options: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Run the job. Ends as `run_job` does; what cannot be followed is one line, with exit code 1."""
    try:
        options = sensitivity_options(options, **own)
    except ValueError as error:
        sys.exit(f"error: {one_line(error)}")
    run_job(options, trains=False)


class MeasureSensitivity(Callback):
    """Calibrates and quantizes the model as `Requantize` does at the switch, and measures what each part of it costs.

    It stands in the place of `callbacks.requantize` in a run without training steps.
    """

    def __init__(self, *, run_dir: str, bits: float, by: str) -> None:
        """`bits` is the budget, bits a weight; `by` the level of units that are chosen among, one of `units.LEVELS`: larger units are
        measured beside these, smaller ones are not."""
        self.run_dir = Path(run_dir)
        self.bits = bits
        self.by = by

    def on_fit_end(self, trainer: Trainer, pl_module: QATModule) -> None:  # type: ignore[override]
        back_to_device(trainer)
        model, store, inputs, selection = pl_module.model, pl_module.store, pl_module.inputs, pl_module.selection
        assert model is not None and inputs is not None and selection is not None and isinstance(store, ReplicatedWeightStore)
        config, is_shown = pl_module.quant_config, trainer.is_global_zero
        smallest = smallest_units(model, selection.manifest)
        units = {level: units_by_level(smallest, level) for level in LEVELS[LEVELS.index(self.by) :]}
        # A budget that cannot be met is refused before the work.
        check_budget(smallest, self.bits)
        to_choose, to_verify, num_sequences = _halves(trainer)
        _quantize(trainer, pl_module)

        servings = ("w4a16", "w4a4") if config.needs_input_scales else ("w4a16",)
        sets = {unit.label: unit.names for unit in (whole(smallest), *(unit for of in units.values() for unit in of))}
        comparison = Comparison(model, store, inputs, forward_context=trainer.precision_plugin.forward_context)
        differing = comparison.prove_restarts(to_choose[0], sets, config.serving)

        def measure(sets: Mapping[str, Collection[str]], batches: list[Batch], name: str) -> dict[Key, SequenceMetrics]:
            num_forwards = len(batches) * (1 + len(servings) * len(sets))
            with progress(name, total=num_forwards, unit="forwards", is_shown=is_shown) as bar:
                return comparison.measure(batches, sets, servings, on_forward=bar.advance)

        if is_shown:
            print(_cost(comparison, sets, servings, len(to_choose), num_sequences, differing), flush=True)
        metrics = measure(sets, to_choose, "sensitivity")
        kl = {label: found.means()["kl"] for (label, serving), found in metrics.items() if serving == config.serving}
        chosen = most_sensitive(units[self.by], kl, self.bits)
        # Kinds have no place in the order of layers.
        naive = nearest_to_the_ends(smallest if self.by == "kind" else units[self.by], self.bits)
        configurations = {ALL: (), CHOSEN: chosen, NAIVE: naive}
        quantized = {label: _names_without(smallest, excluded) for label, excluded in configurations.items()}
        verified = measure(quantized, to_verify, "verification")
        patterns = exclusion_patterns([name for unit in chosen for name in unit.names], selection.manifest.names)
        found = Findings(
            by=self.by,
            bits=self.bits,
            serving=config.serving,
            servings=servings,
            smallest=smallest,
            units=units,
            metrics=metrics,
            verified=verified,
            chosen=chosen,
            naive=naive,
            exclude=[*config.exclude, *patterns],
        )
        if is_shown:
            self._write(found, pl_module.options)

    def _write(self, found: Findings, options: dict[str, Any]) -> None:
        written: dict[str, str | bytes] = {
            "sensitivity.json": json.dumps(finite({"options": options} | found.to_dict()), indent=2),
            "sensitivity.md": markdown(found),
            OVERRIDE_FILE: f"{override(found.exclude)}\n",
            **dict(files(found)),
        }
        for name, content in written.items():
            replace_file(self.run_dir / name, content, what="what was measured")
        print(
            f"\n{markdown(found, most=MOST)}\nfiles: {self.run_dir}/{{{','.join(written)}}}\n"
            "to leave these in bf16, add this to the command line of launch/ptq.py or launch/train.py:\n"
            f'  "$(cat {self.run_dir / OVERRIDE_FILE})"',
            flush=True,
        )


def _quantize(trainer: Trainer, pl_module: QATModule) -> None:
    """Calibrate, equalize and quantize the model as `quant` says."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if num_sequences := pl_module.quant_config.calibration.sequences:
        shown = progress_bar("calibration", is_shown=trainer.is_global_zero)
        notes = pl_module.prepare(data.calibration_batches(num_sequences), shown)
        if trainer.is_global_zero:
            print("\n".join(notes), flush=True)
    pl_module.update(refit=True)
    assert pl_module.store is not None
    pl_module.store.check_finite()


def _halves(trainer: Trainer) -> tuple[list[Batch], list[Batch], int]:
    """This rank's batches of the first and of the second half of the held-out sequences, and how many sequences a half has on all
    ranks. Raises ValueError where some rank would have none."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    world_size = trainer.world_size
    # Of both halves every rank has equally many.
    own = data.val_sequences // (2 * world_size)
    if not own:
        raise ValueError(
            f"every rank needs two held-out sequences, got {data.val_sequences} for {world_size} ranks; raise sequences, or "
            "data.val_fraction if the held-out text has no more"
        )
    halves: tuple[list[Batch], list[Batch]] = ([], [])
    first = 0
    for batch in data.val_dataloader():
        last = first + len(batch["input_ids"])
        for half, start in zip(halves, (0, own), strict=True):
            rows = slice(max(start - first, 0), max(min(start + own, last) - first, 0))
            if rows.stop > rows.start:
                half.append({name: tensor[rows] for name, tensor in batch.items()})
        first = last
    return *halves, own * world_size


def _cost(
    comparison: Comparison,
    sets: Mapping[str, Collection[str]],
    servings: Sequence[str],
    num_batches: int,
    num_sequences: int,
    differing: str | None,
) -> str:
    """What is to be done, in a line."""
    num_forwards = 1 + len(servings) * len(sets)
    work = 1 + len(servings) * sum(map(comparison.cost, sets.values()))
    how = (
        "each from the first layer with quantized weights on (proven: the same bits as from the first layer on)"
        if differing is None
        else f"each from the first layer on (one that begins at {differing} gives other bits)"
    )
    return (
        f"sensitivity: {num_sequences} held-out sequences to choose by, in {num_batches} batches a rank; {num_forwards} forwards a "
        f"batch ({len(sets)} sets of weights, {' and '.join(map(str.upper, servings))}), {how}, the work of {work:.0f} whole ones; "
        f"{num_sequences} other sequences to verify the choice"
    )


def _names_without(units: Sequence[Unit], excluded: Collection[Unit]) -> list[str]:
    """Parameters of the units that are in none of the excluded ones."""
    left = {name for unit in excluded for name in unit.names}
    return [name for unit in units for name in unit.names if name not in left]
