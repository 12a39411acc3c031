"""Quantization-aware distillation: the student's distributions over the next token are drawn to those of a frozen teacher."""

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from nvfp4_train.losses.base import Batch
from nvfp4_train.losses.chunked import Logits, ProjectedLogits, WholeLogits, mean_losses, row_metrics, with_gradients
from nvfp4_train.losses.divergence import Divergence, Objective, Positions
from nvfp4_train.losses.hidden import LayerOutputs, hidden_error
from nvfp4_train.models.build import ModelBuilder
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits, decoder_layers
from nvfp4_train.models.logits import find_logit_map, hidden_states
from nvfp4_train.models.sharding import call_within


class DistillationLoss:
    """(1 - c) T^2 D + c CE + w E: D is a divergence of student and teacher at temperature T, c is `cross_entropy`, w is `hidden`.

    Without a mask D is a mean over every position, and the next token's cross-entropy CE over all but the last of a sequence; with one
    both are over those before a marked token. See `Objective`. E is the `hidden_error` of some layers, over the positions of D.

    Where gradients are off, as in an evaluation, metrics come beside the loss: `kl`, the forward KL at temperature 1, and
    `cross_entropy`, both in nats a position, `top1_agreement`, the share of positions at which student and teacher hold the same token
    most likely, and `hidden_error`. In training the parts of a mix do: `divergence`, which is T^2 D, `cross_entropy`, `hidden_error`.
    """

    def __init__(
        self,
        *,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        hidden: float = 0.0,
        teacher_path: str | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        """
        Args:
            divergence: `forward_kl`, KL(teacher || student); `reverse_kl`, KL(student || teacher); or `jsd`, Jensen-Shannon.
            temperature: T, by which the logits of both are divided in D.
            cross_entropy: c, the weight of CE in the mix, from 0 to below 1.
            hidden: w, the weight of the error of hidden states.
            teacher_path: A local folder or a hub name of a Hugging Face causal LM with the student's tokens. None: the student as it
                was loaded, in bf16.
            chunk_tokens: Positions whose logits exist at once. None: as many as 1 GiB holds.

        Raises:
            ValueError: An option is out of range.
        """
        self.objective = Objective(divergence=divergence, temperature=temperature, cross_entropy=cross_entropy)
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"loss.chunk_tokens must be at least 1, or null, got {chunk_tokens}")
        if not 0 <= hidden < math.inf:
            raise ValueError(f"loss.hidden must be at least 0 and finite, got {hidden}")
        self.hidden = hidden
        self.teacher_path = teacher_path
        self.chunk_tokens = chunk_tokens
        self.teacher: nn.Module | None = None
        self._layers: tuple[LayerOutputs, ...] = ()
        """Of student and teacher, where their hidden states are compared."""
        self._is_chunked: bool | None = None
        """Whether both models' logits are made a few positions at a time. Not known before the first call."""

    def prepare(self, build: ModelBuilder) -> None:
        """Make the teacher. Raises ValueError if it cannot be loaded, or its vocabulary has another size than the student's."""
        try:
            teacher = build(None if self.teacher_path is None else ModelConfig(path=self.teacher_path))
        except ValueError as error:
            raise ValueError(f"loss.teacher_path={self.teacher_path!r}: {error}") from error
        self.check_teacher(build.student, teacher)
        if self.hidden:
            self._layers = LayerOutputs(build.student), LayerOutputs(teacher)
        self.teacher = teacher

    def check_teacher(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ValueError where the two cannot be compared. Both may lie on the meta device."""
        expected, found = vocabulary_size(student), vocabulary_size(teacher)
        if found != expected:
            raise ValueError(
                f"loss.teacher_path={self.teacher_path!r} must name a model with the student's vocabulary of {expected} tokens, "
                f"got one of {found}"
            )
        for name, of in (("layers", num_layers), ("channels", num_channels)) if self.hidden else ():
            if of(teacher) != of(student):
                raise ValueError(
                    f"loss.hidden={self.hidden:g} needs a teacher with as many {name} as the student, {of(student)}, got "
                    f"{of(teacher)} of loss.teacher_path={self.teacher_path!r}; set loss.hidden=0"
                )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, found = self._compute(model, batch)
        return (loss.sum(), {name: parts.sum() for name, parts in found.items()}) if loss.dim() else (loss, found)

    def per_sequence(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `SequenceLoss`. The error of hidden states, which is of a batch, is shared out by positions."""
        loss, found = self._compute(model, batch)
        return {"loss": loss, **found}

    def _compute(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics: scalars where there will be a backward, else what each sequence adds to them, [B]."""
        assert self.teacher is not None, "prepare comes first"
        if self._is_chunked is None:
            self._is_chunked = self._find_logit_maps(model, batch["input_ids"])
        positions = Positions.of(batch)
        for outputs in self._layers:
            outputs.start()
        if self._is_chunked:
            return call_within(model, self._by_chunks, model, batch, positions)
        tokens = batch["input_ids"], batch.get("position_ids")
        student = WholeLogits(compute_logits(model, *tokens).flatten(0, 1))
        with torch.no_grad():
            teacher = WholeLogits(compute_logits(self.teacher, *tokens).flatten(0, 1))
            found = self._compare(student, teacher, positions)
        return self._result(student, found, positions, len(batch["input_ids"]))

    def _find_logit_maps(self, model: nn.Module, input_ids: Tensor) -> bool:
        assert self.teacher is not None
        maps = {name: find_logit_map(which, input_ids) for name, which in (("student", model), ("teacher", self.teacher))}
        student, teacher = maps.values()
        if student is not None and teacher is not None:
            self.objective = replace(self.objective, student_map=student, teacher_map=teacher)
            return True
        others = " and ".join(name for name, found in maps.items() if found is None)
        warnings.warn(
            f"the logits of the {others} are no products with its output embedding, so loss=distillation keeps those of all positions",
            stacklevel=2,
        )
        return False

    def _by_chunks(self, model: nn.Module, batch: Batch, positions: Positions) -> tuple[Tensor, dict[str, Tensor]]:
        """Called within the student."""
        assert self.teacher is not None
        student = projected_logits(model, hidden_states(model, batch["input_ids"], batch.get("position_ids")))
        # Under FSDP2 a teacher whose output takes part in the backward would be gathered in it.
        with torch.no_grad():
            found = call_within(self.teacher, self._against_teacher, student, batch, positions)
        return self._result(student, found, positions, len(batch["input_ids"]))

    def _against_teacher(self, student: Logits, batch: Batch, positions: Positions) -> dict[str, Tensor]:
        """Called within the teacher."""
        assert self.teacher is not None
        hidden = hidden_states(self.teacher, batch["input_ids"], batch.get("position_ids"))
        return self._compare(student, projected_logits(self.teacher, hidden), positions)

    def _compare(self, student: Logits, teacher: Logits, positions: Positions) -> dict[str, Tensor]:
        function = mean_losses if student.takes_gradients else row_metrics
        with torch.autocast(positions.weights.device.type, enabled=False):
            return function(student, teacher, positions, self.objective, num_rows=self.chunk_tokens)

    def _result(
        self, student: Logits, found: dict[str, Tensor], positions: Positions, num_sequences: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not student.takes_gradients:
            found = {name: parts.view(num_sequences, -1).sum(1) for name, parts in found.items()}
        loss = self.objective.mix(found["divergence"], found["cross_entropy"])
        if student.takes_gradients:
            loss = with_gradients(loss, student)
            found = found if self.objective.cross_entropy or self.hidden else {}
        else:
            del found["divergence"]
        if self.hidden:
            of_student, of_teacher = (outputs.take() for outputs in self._layers)
            error = hidden_error(of_student, of_teacher, positions.weights)
            if not student.takes_gradients:
                error = error * positions.weights.view(num_sequences, -1).sum(1)
            loss, found = loss + self.hidden * error, found | {"hidden_error": error.detach()}
        return loss, found


def projected_logits(model: nn.Module, hidden: Tensor) -> ProjectedLogits:
    """Logits of hidden states [B, T, H] by the output embedding that `model` shows now."""
    head = model.get_output_embeddings()  # type: ignore
    return ProjectedLogits(hidden.flatten(0, 1), head.weight, getattr(head, "bias", None))


def num_layers(model: nn.Module) -> int:
    return len(decoder_layers(model))


def num_channels(model: nn.Module) -> int:
    return model.config.get_text_config().hidden_size  # type: ignore


def vocabulary_size(model: nn.Module) -> int:
    """The number of tokens that a transformers model has logits of."""
    return model.config.get_text_config().vocab_size  # type: ignore
