"""Tasks of lm-evaluation-harness, an optional package: it has the tasks and the arithmetic, this hands it a model."""

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nvfp4_train.errors import one_line
from nvfp4_train.ranks import gather_from_ranks, rank_and_world_size

MISSING = "tasks= needs lm-evaluation-harness, which is not installed; pip install 'nvfp4_train[evaluate]'"


class Tasks:
    """Some tasks by name: those that the package knows, and those of yaml files in a folder."""

    def __init__(self, names: Sequence[str], folder: str | None = None, *, limit: int | None = None) -> None:
        """`limit` is the number of examples of each task; None for all.

        Raises ValueError where the package is not installed, or knows no task of a name.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(MISSING)
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(f"tasks= needs lm-evaluation-harness, which cannot be imported: {one_line(error)}") from error
        # It speaks of every task that it looks at.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.names, self.limit = list(names), limit
        # To look at all of its own tasks takes ten seconds.
        self._manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(self.names) <= set(self._manager.all_subtasks):
            self._manager = TaskManager(include_path=folder)
        if unknown := [name for name in self.names if not self._manager.match_tasks([name])]:
            raise ValueError(
                f"tasks must be names that lm-evaluation-harness knows, or of yaml files in tasks_path, got {', '.join(unknown)}"
            )

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> dict[str, dict[str, Any]]:
        """What the package says of a model, by task. Ranks share out whole tasks. A collective, if there is a process group."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        rank, num_ranks = rank_and_world_size()
        found: dict[str, dict[str, Any]] = {}
        if own := self.names[rank::num_ranks]:
            harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
            with _alone():
                results = simple_evaluate(
                    harness, tasks=own, limit=self.limit, task_manager=self._manager, log_samples=False, verbosity="ERROR"
                )
            found = {
                # Metrics are named METRIC,FILTER.
                task: {name: value for name, value in numbers.items() if "," in name}
                for task, numbers in results["results"].items()
            }
        of_ranks: dict[str, dict[str, Any]] = {}
        for of_rank in gather_from_ranks(found):
            of_ranks |= of_rank
        return of_ranks


@contextmanager
def _alone() -> Iterator[None]:
    """The package gives no results on ranks that the environment does not call the first."""
    local_rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if local_rank is not None:
            os.environ["LOCAL_RANK"] = local_rank
