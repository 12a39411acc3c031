"""The evaluation of a command line: what launch/evaluate.py runs.

Texts are the held-out ones of the data module, chat masks and all, so numbers compare with those of a run on the same data, seed and
tokenizer. data.val_fraction=1 data.val_sequences=null takes the whole of a text. With `domains` those are the texts, and data.path is
what `ptq:` models are calibrated on.

evaluation.json holds `schema`, `time` (UTC), `command`, `versions`, `computed` {device, dtype, ranks}, `data` {options, texts: {text:
{path, fingerprint, sequences, positions}}}, and what `judge.record` tells of.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nvfp4_train.data.cache import check_data_cache
from nvfp4_train.data.config import DataConfig
from nvfp4_train.data.module import TextDataModule
from nvfp4_train.data.tokenizer import load_tokenizer
from nvfp4_train.disk import disk_errors_named, replace_file
from nvfp4_train.errors import RunError, one_line
from nvfp4_train.judge.loading import Loaded, Place, load
from nvfp4_train.judge.measure import ALL, LOSS, measure, only, own_share, with_all
from nvfp4_train.judge.record import SCHEMA, record
from nvfp4_train.judge.results import Difference, Limits, Row, Verdict, differences, shown_serving, verdicts
from nvfp4_train.judge.subjects import BF16, PTQ, Subject, config_of_subject, find_subjects
from nvfp4_train.judge.table import differences_table, metrics_table, tasks_table
from nvfp4_train.judge.tasks import Tasks
from nvfp4_train.models.architecture import positions
from nvfp4_train.models.causal_lm import choose_compute_dtype
from nvfp4_train.models.isolation import check_isolation
from nvfp4_train.progress import progress_bar, tame_other_bars
from nvfp4_train.quant.policy import SERVINGS, QuantConfig
from nvfp4_train.ranks import is_rank_zero, rank_and_world_size
from nvfp4_train.run.compose import make
from nvfp4_train.run.evaluation_options import Options, override, read_options, read_quant
from nvfp4_train.run.identity import choose_run_id
from nvfp4_train.run.options import check_targets
from nvfp4_train.sequence_metrics import LEVEL

FAILED = 2
"""Exit code where a quantized model exceeds a threshold."""
_MODEL = "model="
_PACKAGES = ("nvfp4_train", "torch", "transformers", "datasets", "lm_eval")


def run_evaluation(root: Path, arguments: Sequence[str]) -> int:
    """Evaluate what a command line says, print tables and write the results. Returns the exit code; errors of the user are a line."""
    tame_other_bars(is_shown=is_rank_zero())
    try:
        given = [argument.removeprefix(_MODEL) for argument in arguments if argument.startswith(_MODEL)]
        overrides = [override(argument) for argument in arguments if not argument.startswith(_MODEL)]
        os.environ["RUN_ID"] = choose_run_id()
        options = read_options(root, overrides)
        subjects = find_subjects(given)
        quants = {
            subject.label: read_quant(root, [*overrides, *subject.options]) for subject in subjects if subject.kind == PTQ
        }
        # As in a run.
        torch.set_float32_matmul_precision("high")
        with _process_group(options.device) as device:
            return Evaluation(options, subjects, quants, device).run(["python", "launch/evaluate.py", *arguments])
    except (ValueError, OSError, RunError) as error:
        rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        print(f"error: {f'rank {rank}: ' if num_ranks > 1 else ''}{one_line(error)}", file=sys.stderr, flush=True)
        return 1


class Evaluation:
    """Some models on some texts. Raises ValueError, before any weights are read, for models that cannot be compared."""

    def __init__(
        self, options: Options, subjects: Sequence[Subject], quants: Mapping[str, QuantConfig], device: torch.device
    ) -> None:
        self.options, self.subjects, self.quants = options, subjects, quants
        self.limits = Limits(**options.fail_if)
        if self.limits.given and all(subject.kind == BF16 for subject in subjects[1:]):
            raise ValueError("fail_if is about quantized models beside the first one, got none; give model= several times")
        dtype, self.dtype_reason = choose_compute_dtype(options.compute_dtype, device)
        self.is_first_rank = rank_and_world_size()[0] == 0
        self.place = Place(
            device=device,
            compute_dtype=dtype,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
            is_shown=self.is_first_rank,
        )
        self.calibration_text = self._data(make(options.data, "data"))
        self.texts = {name: self._data(self._domain(name, node)) for name, node in options.domains.items()} or {
            ALL: self.calibration_text
        }
        self._check_models()
        self.tasks = Tasks(options.tasks, options.tasks_path, limit=options.task_limit) if options.tasks else None
        self.notes: dict[str, list[str]] = {}

    def run(self, command: Sequence[str]) -> int:
        """Measure, print, and write the results. Returns the exit code. A collective, if there is a process group."""
        self._print(f"computes in {_name(self.place.compute_dtype)}: {self.dtype_reason}")
        for subject in self.subjects:
            self._print(f"{subject.label}: {subject.found}, {subject.path}")
        self._load_texts()
        rows = self._measure()
        found, judged = list(differences(rows)), verdicts(rows, self.limits)
        self._print(
            "\nheld-out text: "
            + "; ".join(
                f"{name}, {len(m.positions)}{self._out_of(name)} sequences, {int(m.positions.sum()):,} positions"
                for name, m in rows[0].texts.items()
            )
            + f"\neach mean ± half of its {LEVEL:.0%} interval, a bootstrap over sequences\n\n{metrics_table(rows)}"
        )
        for table in (differences_table(found), tasks_table(rows)):
            if table:
                self._print(f"\n{table}")
        self._print("".join(f"\n{verdict}" for verdict in judged))
        try:
            if self.is_first_rank:
                self._write(command, rows, found, judged)
        finally:
            # torchrun ends all ranks when one has ended with another code than 0.
            if distributed.is_initialized():
                distributed.barrier()
        return FAILED if any(verdict.is_exceeded for verdict in judged) else 0

    def _write(
        self, command: Sequence[str], rows: Sequence[Row], found: Sequence[Difference], judged: Sequence[Verdict]
    ) -> None:
        results = {
            **self._circumstances(command, rows[0]),
            **record(self.subjects, self.notes, rows, found, self.limits, judged, keep_sequences=self.options.keep_sequences),
        }
        output = Path(self.options.output)
        with disk_errors_named(output, "the evaluation"):
            output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, json.dumps(results, indent=2) + "\n", what="the evaluation")
        self._print(f"written to {self.options.output}")

    def _out_of(self, name: str) -> str:
        """How many held-out sequences a text has, where not all of them are taken."""
        text = self.texts.get(name)
        is_part = text is not None and text.val_sequences < text.held_out_sequences
        return f" of {text.held_out_sequences}" if is_part and text is not None else ""

    def _domain(self, name: str, node: Any) -> DataConfig:
        """A text of its own with the options of the group data, but for those that it sets."""
        own = node if isinstance(node, dict) else {"path": node}
        unknown = own.keys() - {field.name for field in dataclasses.fields(DataConfig)}
        if unknown:
            raise ValueError(f"domains.{name} takes a path, or options of the group data, got {', '.join(sorted(unknown))}")
        if "path" not in own:
            raise ValueError(
                f"domains.{name} must say where its text is: domains.{name}=PATH, got {', '.join(sorted(own))} alone"
            )
        merged = {**self.options.data, **own}
        check_targets(merged, f"domains.{name}")
        return make(merged, f"domains.{name}")

    def _data(self, config: DataConfig) -> TextDataModule:
        """Tokens of all texts are those of the first model."""
        return TextDataModule(
            config,
            seed=self.options.seed,
            model_path=self.subjects[0].tokenizer,
            trust_remote_code=self.options.trust_remote_code,
        )

    def _check_models(self) -> None:
        """Raise ValueError where models have no tokens in common, or fewer positions than the text."""
        trusts = self.options.trust_remote_code
        configs = {subject.label: config_of_subject(subject, trust_remote_code=trusts) for subject in self.subjects}
        first = self.subjects[0].label
        sizes = {label: config.get_text_config().vocab_size for label, config in configs.items()}
        for label, size in sizes.items():
            if size != sizes[first]:
                raise ValueError(
                    f"models must have one vocabulary to be compared, got {sizes[first]} tokens of {first} and {size} of {label}"
                )
        data = next(iter(self.texts.values()))
        if data.config.tokenizer == "auto" and self.subjects[0].tokenizer is None:
            raise ValueError(f"{first} has no tokenizer/ beside its checkpoint; data.tokenizer= must say which to take")
        vocabulary = data.tokenizer.get_vocab()
        for subject in self.subjects[1:] if data.config.tokenizer == "auto" else ():
            if self._vocabulary(subject) not in (None, vocabulary):
                raise ValueError(
                    f"models must have one tokenizer to be compared, but {subject.label} has other tokens than {first}; "
                    "data.tokenizer= says which to take for both"
                )
        for text in {id(text): text for text in (self.calibration_text, *self.texts.values())}.values():
            for config in configs.values():
                text.check_model(config.get_text_config().vocab_size, positions(config))

    def _vocabulary(self, subject: Subject) -> dict[str, int] | None:
        if subject.tokenizer is None:
            return None
        try:
            return load_tokenizer(subject.tokenizer, trust_remote_code=self.options.trust_remote_code).get_vocab()
        except ValueError:
            # A folder of weights alone: then it is the user who knows.
            return None

    def _load_texts(self) -> None:
        """On the first rank of every host, then on the others, from its cache."""
        check_data_cache()
        needed = [*self.texts.values(), *([self.calibration_text] if self.quants else [])]
        for text in {id(text): text for text in needed}.values():
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                text.prepare_data()
            if distributed.is_initialized():
                distributed.barrier()
            text.setup("validate")

    def _measure(self) -> list[Row]:
        rows: list[Row] = []
        with ExitStack() as stack:
            reference = self._load(self.subjects[0])
            servings = self._servings(self.subjects[0], reference)[:1]
            stack.enter_context(reference.serving(servings[0]))
            for subject in self.subjects:
                is_first = subject is self.subjects[0]
                loaded = reference if is_first else self._load(subject)
                for serving in servings if is_first else self._servings(subject, loaded):
                    # The reference stays as it is served.
                    with ExitStack() if is_first else loaded.serving(serving):
                        rows.append(self._row(subject, serving, loaded, reference))
                del loaded
                gc.collect()
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
        return rows

    def _servings(self, subject: Subject, loaded: Loaded) -> list[str]:
        if subject.kind == BF16:
            return list(loaded.servings)
        wanted = [serving for serving in SERVINGS if serving in self.options.servings and serving in loaded.servings]
        if not wanted:
            raise ValueError(
                f"{subject.label} must be measured as one of servings={list(self.options.servings)}: {'; '.join(loaded.notes)}"
            )
        if subject is self.subjects[0] and len(wanted) > 1:
            self._note(subject, f"the first model is the reference, measured as {shown_serving(wanted[0])} alone")
        return wanted

    def _load(self, subject: Subject) -> Loaded:
        def calibration(num_sequences: int) -> Any:
            return own_share([batch for batch, _ in self.calibration_text.calibration_batches(num_sequences)])

        with _fitting(subject, self.place.device):
            quant = self.quants.get(subject.label, QuantConfig())
            loaded = load(subject, self.place, quant=quant, calibration=calibration)
        for note in loaded.notes:
            self._note(subject, note)
        if any(text.isolates_documents for text in self.texts.values()):
            check_isolation(loaded.model, self.place.device, name=subject.label)
        return loaded

    def _row(self, subject: Subject, serving: str, loaded: Loaded, reference: Loaded) -> Row:
        """Of a model that computes as it is served."""
        found = {}
        with _fitting(subject, self.place.device):
            for name, text in self.texts.items():
                what = f"{subject.label} {shown_serving(serving)}" + ("" if name == ALL else f" on {name}")
                batches = progress_bar(what, is_shown=self.is_first_rank)(text.val_dataloader())
                found[name] = measure(loaded.model, reference.model, batches, self.place.device)
            tasks = {}
            if self.tasks is not None:
                text = next(iter(self.texts.values()))
                tasks = self.tasks.evaluate(loaded.model, text.tokenizer, text.config.val_batch_size or text.config.batch_size)
        texts = with_all(found)
        if loaded is reference:
            texts = {name: only(metrics, [LOSS]) for name, metrics in texts.items()}
        return Row(label=subject.label, serving=serving, texts=texts, tasks=tasks)

    def _circumstances(self, command: Sequence[str], reference: Row) -> dict[str, Any]:
        device = self.place.device
        versions = {name: found for name in _PACKAGES if (found := _version(name))}
        return {
            "schema": SCHEMA,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": list(command),
            "versions": {"python": sys.version.split()[0], **versions},
            "computed": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "dtype": _name(self.place.compute_dtype),
                "ranks": rank_and_world_size()[1],
            },
            "data": {
                "options": {name: value for name, value in self.options.data.items() if name != "_target_"},
                "seed": self.options.seed,
                "texts": {
                    name: {
                        "path": text.config.path,
                        "fingerprint": text.held_out_fingerprint,
                        "sequences": text.val_sequences,
                        "positions": int(reference.texts[name].positions.sum()),
                    }
                    for name, text in self.texts.items()
                },
            },
        }

    def _note(self, subject: Subject, note: str) -> None:
        self.notes.setdefault(subject.label, []).append(note)
        self._print(f"{subject.label}: {note}")

    def _print(self, text: str) -> None:
        if self.is_first_rank:
            print(text, flush=True)


@contextmanager
def _fitting(subject: Subject, device: torch.device) -> Iterator[None]:
    """Raise ValueError where the device has no room."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{subject.label} does not fit on {device}, where it lies whole on every rank, with the first model beside it; "
            f"data.val_batch_size=1 and a shorter data.seq_len take less for activations: {one_line(error)}"
        ) from error


@contextmanager
def _process_group(option: str) -> Iterator[torch.device]:
    """The device of this rank, and a process group where torchrun started several."""
    local_rank, num_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if option != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"every rank needs a GPU, got {torch.cuda.device_count()} for rank {local_rank} of this host")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif option == "cuda":
        raise ValueError("device=cuda needs a GPU that PyTorch can use, got none")
    if num_ranks == 1 or distributed.is_initialized():
        yield device
        return
    # A rank may wait for another one's tasks for hours.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
