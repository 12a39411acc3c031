"""How far a model moves from itself when some of its weights are quantized and all others are not.

The measure is KL(p || q) in nats a token, p being the distribution over the next token of the unquantized model (its masters after
calibration and equalization, rounded to bf16 as they are served), q that of the same model with some weights, and as W4A4 their
inputs, in NVFP4. Each batch goes once through the unquantized model, and once for each set of weights.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nvfp4_train.judge.restart import LayerOutputsOfAForward
from nvfp4_train.losses.base import Batch, num_positions_per_sequence
from nvfp4_train.losses.chunked import Logits, WholeLogits, row_metrics
from nvfp4_train.losses.distillation import projected_logits
from nvfp4_train.losses.divergence import Objective, Positions
from nvfp4_train.models.causal_lm import compute_logits, decoder_layers
from nvfp4_train.models.logits import LogitMap, find_logit_map, hidden_states
from nvfp4_train.models.sharding import call_within
from nvfp4_train.quant.inputs import InputQuantizers
from nvfp4_train.quant.policy import SERVINGS
from nvfp4_train.quant.store import ReplicatedWeightStore
from nvfp4_train.quant.undisturbed import undisturbed
from nvfp4_train.sequence_metrics import SequenceCollector, SequenceMetrics, over_ranks

PROOF_TOKENS = 64
"""Tokens of the sequence on which restarted forwards are proven."""
METRICS = ("kl", "top1_agreement")

Key = tuple[str, str]
"""A label of a set of weights, and a serving, a name in `SERVINGS`."""


class Comparison:
    """A model with some of its weights quantized against the same model unquantized.

    Its store has been updated, so that the quantized values are those of its masters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: ReplicatedWeightStore,
        inputs: InputQuantizers,
        *,
        chunk_tokens: int | None = None,
        forward_context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """`chunk_tokens` are positions whose logits exist at once, by default as many as 1 GiB holds. Forwards run in
        `forward_context`."""
        self._model, self._store, self._inputs = model, store, inputs
        self._chunk_tokens = chunk_tokens
        self._forward_context = forward_context
        self._outputs = LayerOutputsOfAForward(decoder_layers(model))
        self._logit_map: LogitMap | None = None
        self._objective: Objective | None = None
        self.restarts = False
        """Whether forwards begin at the first layer with a quantized weight, which `prove_restarts` decides."""

    @torch.no_grad()
    def prove_restarts(self, batch: Batch, sets: Mapping[str, Collection[str]], serving: str) -> str | None:
        """Compare whole forwards with such as begin at a layer, bit for bit, once for every layer at which one of `sets` begins.

        Restarted forwards are taken from then on if all are equal. Returns None, or the label of a set with which they are not.
        """
        ids, position_ids = self._tokens({name: tensor[:1, :PROOF_TOKENS] for name, tensor in batch.items()})
        self.restarts = False
        with undisturbed(self._model), self._forward_context():
            with self._showing((), "w4a16"), self._outputs.recording():
                self._body(ids, position_ids)
            by_start = {self._start(names): label for label, names in sets.items()}
            for start, label in sorted(by_start.items()):
                with self._showing(sets[label], serving):
                    whole = self._body(ids, position_ids)
                    with self._outputs.starting_at(start):
                        restarted = self._body(ids, position_ids)
                if not whole.equal(restarted):
                    return label
        self._outputs.forget()
        self.restarts = bool(self._outputs.calls)
        return None

    def cost(self, names: Collection[str]) -> float:
        """The share of a whole forward's layers that one with these weights quantized runs through, once restarts are proven."""
        calls = len(self._outputs.calls)
        return 1 - self._start(names) / calls if self.restarts else 1.0

    @torch.no_grad()
    def measure(
        self,
        batches: Iterable[Batch],
        sets: Mapping[str, Collection[str]],
        servings: Collection[str],
        *,
        on_forward: Callable[[], object] = lambda: None,
    ) -> dict[Key, SequenceMetrics]:
        """`kl` and `top1_agreement` of every sequence of the batches of all ranks, with each of the sets quantized alone.

        `sets` are names of quantized parameters by a label. `on_forward` is called after every forward. Raises ValueError if no
        position counts. A collective.
        """
        collected = {(label, serving): SequenceCollector() for label in sets for serving in servings}
        with undisturbed(self._model), self._forward_context():
            for batch in batches:
                positions = num_positions_per_sequence(batch)
                batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
                for key, found in self._measure_batch(batch, sets, servings, on_forward):
                    parts = {metric: found[metric].view(len(positions), -1).sum(1) for metric in METRICS}
                    collected[key].add(positions, parts)
        return over_ranks(collected)

    def _measure_batch(
        self, batch: Batch, sets: Mapping[str, Collection[str]], servings: Collection[str], on_forward: Callable[[], object]
    ) -> Iterator[tuple[Key, dict[str, Tensor]]]:
        tokens, positions = self._tokens(batch), Positions.of(batch)
        with self._showing((), "w4a16"):
            objective = self._objective_of(tokens[0])
            with self._outputs.recording() if self.restarts else nullcontext():
                reference = self._logits(*tokens)
        on_forward()
        for label, names in sets.items():
            start = self._start(names) if self.restarts else 0
            for serving in servings:
                with self._showing(names, serving), self._outputs.starting_at(start) if start else nullcontext():
                    logits = self._logits(*tokens)
                with torch.autocast(self._device.type, enabled=False):
                    yield (label, serving), row_metrics(logits, reference, positions, objective, num_rows=self._chunk_tokens)
                on_forward()
        self._outputs.forget()

    @contextmanager
    def _showing(self, names: Collection[str], serving: str) -> Iterator[None]:
        quantized_inputs = names if SERVINGS[serving] == "nvfp4" else ()
        with self._store.quantized_only(names), self._inputs.quantizing(quantized_inputs):
            yield

    def _objective_of(self, input_ids: Tensor) -> Objective:
        if self._objective is None:
            self._logit_map = find_logit_map(self._model, input_ids)
            found = self._logit_map or LogitMap()
            self._objective = Objective(student_map=found, teacher_map=found)
        return self._objective

    def _logits(self, input_ids: Tensor, position_ids: Tensor | None) -> Logits:
        """A few positions at a time where the model's logits are products with its output embedding."""
        if self._logit_map is None:
            return WholeLogits(compute_logits(self._model, input_ids, position_ids).flatten(0, 1))
        return call_within(
            self._model, lambda: projected_logits(self._model, hidden_states(self._model, input_ids, position_ids))
        )

    def _body(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        return hidden_states(self._model, input_ids, position_ids)

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        position_ids = batch.get("position_ids")
        return batch["input_ids"].to(self._device), None if position_ids is None else position_ids.to(self._device)

    def _start(self, names: Collection[str]) -> int:
        """The first call of a decoder layer in which one of these weights is used."""
        modules: list[nn.Module] = [self._model.get_submodule(name.rpartition(".")[0]) for name in names]
        return self._outputs.first_call(modules)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device
