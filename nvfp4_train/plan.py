"""Memory and traffic of one GPU and optimizer step under FSDP2, from a model without storage.

W GPUs share one copy of the model, R such copies are trained (HSDP), a step has A micro-batches of T tokens per GPU. The formulas
stand beside the numbers, and `NOTES` explains their other symbols. A layer is one decoder layer; the head is everything that is
in no layer and no embedding. Without a teacher the peak is within 2 % of what two GPUs measured (benchmarks/README.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.losses.chunked import FUSED_BYTES
from nvfp4_train.models.architecture import freeze_outside
from nvfp4_train.models.build import kept_in_fp32
from nvfp4_train.models.causal_lm import ModelConfig, from_config, load_config
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.models.sharding import fsdp_units
from nvfp4_train.plan_sizes import PACKED_BYTES, ModelSizes, layer_activation_bytes
from nvfp4_train.quant.local_weight import rows_per_rank
from nvfp4_train.quant.policy import QuantConfig, select
from nvfp4_train.quant.statistics import Statistic


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What decides memory and traffic beside the model."""

    world_size: int
    replicate_size: int = 1
    reshard_after_forward: bool = True
    micro_batches: int = 1
    batch_size: int = 1
    seq_len: int = 2048
    gradient_checkpointing: bool = False
    logits_at_once: int | None = None
    """Tokens whose logits exist at once, of student and teacher, where the loss has a teacher; None without one."""
    compared_layers: int = 0
    """Decoder layers whose hidden states the loss compares with those of the teacher."""
    keeps_history: bool = False
    """Whether `callbacks.oscillation` keeps the history of codes."""

    def __post_init__(self) -> None:
        for name, option in (
            ("world_size", "world_size"),
            ("replicate_size", "trainer.strategy.replicate_size"),
            ("micro_batches", "trainer.accumulate_grad_batches"),
            ("batch_size", "data.batch_size"),
            ("seq_len", "data.seq_len"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, name)}")
        if self.world_size % self.replicate_size:
            raise ValueError(
                f"world_size must be a multiple of trainer.strategy.replicate_size, got {self.world_size} and {self.replicate_size}"
            )

    @property
    def shard_size(self) -> int:
        return self.world_size // self.replicate_size

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a plan, in bytes. `bf16` is with quantization off; `packed` is as `quant` says: packed unless quant.gather=bf16."""

    name: str
    formula: str
    bf16: float
    packed: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of memory and of traffic, of one GPU."""

    num_parameters: int
    num_quantized: int
    memory: list[Row]
    parts: list[Row]
    moments: list[Row]
    peak: Row
    wire: list[Row]
    wire_total: Row


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model without storage; no weight is read."""
    with torch.device("meta"):
        model = from_config(load_config(config), {"dtype": torch.float32})
    freeze_outside(model)
    return model


NOTES = """\
N elements of the model; n of this GPU's shards, rows padded to a multiple of W; t of those trained, q quantized; V words; h hidden
      size
A_l   activations of all layers, T (16 h + 4 d + 4 k + 4 heads + 8 f) each, of a layer in eager bf16 with flash attention: two
      norms save their fp32 input (4 h), its bf16 normalisation (2 h) and their output (2 h); attention saves queries, keys, values
      and output (d, k wide: 2 (2 d + 2 k)) and its log-sum-exps (4 heads), norms of queries and keys 8 (d + k) more; the MLP saves
      gate, up, the activated gate and the product (f wide: 2 f each). A layer of experts saves 4 h + 8 f + 44 for every expert that
      a token goes to, and 4 for every expert, instead of 8 f. With gradient checkpointing T 2 h each, and one whole layer in its
      backward. Compilation saves less. W4A4 saves the inputs of quantized weights packed: 0.5625 in place of 2 bytes.
logits  12 V T: the loss holds the fp32 log-softmax, its gradient and the gradient of the logits. Distillation has the logits of C
      tokens at once, of student and teacher in fp32 with a gradient in bf16; the last hidden states of both and the gradient of
      one; and the gradient of a head that is trained, which adds up in fp32
On top: the allocator's slack, the CUDA context (about 0.5 GiB), NCCL's buffers (about 1 GiB)."""


def _logits(model: PreTrainedModel, shape: RunShape) -> tuple[float, str]:
    """Bytes of the logits and of what the loss makes of them, and their formula."""
    config = model.config.get_text_config()
    if shape.logits_at_once is None:
        return 12 * config.vocab_size * shape.tokens, "12 V T"
    at_once = min(shape.logits_at_once, shape.tokens)
    num_bytes = FUSED_BYTES * config.vocab_size * at_once + 6 * config.hidden_size * shape.tokens
    if not model.get_output_embeddings().weight.requires_grad:
        return num_bytes, f"{FUSED_BYTES} V C + 6 h T"
    return num_bytes + 4 * config.vocab_size * config.hidden_size, f"{FUSED_BYTES} V C + 6 h T + 4 V h"


def make_plan(
    model: PreTrainedModel,
    quant: QuantConfig,
    shape: RunShape,
    teacher: PreTrainedModel | None = None,
    statistics: Sequence[Statistic] = (),
) -> Plan:
    """Count memory and traffic. `model` and the teacher of its loss, if it has one, may lie on the meta device.

    `statistics` are those of the run, some of which keep what they saw last.
    """
    config, width = model.config.get_text_config(), shape.shard_size
    manifest = select(model, quant, HubLayout(model.config)).manifest if quant.enabled else None
    names = [] if manifest is None else manifest.names
    parameters = dict(model.named_parameters(remove_duplicate=False))
    quantized = {id(parameters[name]) for name in names}
    quantized_bytes = PACKED_BYTES if quant.gather == "packed" else 2.0
    units = ModelSizes(model, fsdp_units(model, kept=kept_in_fp32(model)), width, quantized, quantized_bytes)
    teacher_units = None
    if teacher is not None:
        # Its tensors travel in bf16, as they are held.
        teacher_units = ModelSizes(teacher, [replace(unit, in_fp32=False) for unit in fsdp_units(teacher)], width)
    layer, layers, head_unit = units.largest_layer, units.modules_of_layers, units.head

    elements, shard = sum(unit.elements for unit in units.all), sum(unit.shard for unit in units.all)
    trained, trained_shard = sum(unit.trained for unit in units.all), sum(unit.trained_shard for unit in units.all)

    def row(name: str, formula: str, count: Callable[[bool], float]) -> Row:
        return Row(name=name, formula=formula, bf16=count(False), packed=count(True))

    is_window = shape.micro_batches > 1
    memory = [
        row("masters", "4 n", lambda _: 4 * shard),
        row("optimizer (AdamW)", "8 t", lambda _: 8 * trained_shard),
        # Gradients of an accumulation window are whole until the last backward reduces them to shards, layer by layer.
        row(
            "gradients",
            "4 t; whole while A > 1 (reduced once per step)",
            lambda _: 4 * (trained if is_window else trained_shard),
        ),
        Row(
            name="quantized shards",
            formula="0.5625 q (2 q with quant.gather=bf16) + 2 bytes of what is gathered with them",
            bf16=0,
            packed=sum(unit.kept() for unit in units.all),
        ),
    ]
    if manifest is not None and manifest.rule.is_fitted:
        hessians = sum(64 * parameters[group[0]].shape[-1] for group in manifest.groups)
        steps = sum(unit.quantized_shard for unit in units.all) / BLOCK_SIZE
        memory.append(
            Row(name="Hessians and steps", formula="64 K for every group's input + q / 16", bf16=0, packed=hessians + steps)
        )
    if manifest is not None and shape.keeps_history:
        per_weight = 1 if quant.gather == "packed" else 1 + PACKED_BYTES
        history = per_weight * sum(unit.quantized_shard for unit in units.all)
        memory.append(Row(name="history of codes", formula="q (1.5625 q with quant.gather=bf16)", bf16=0, packed=history))
    weights = {id(parameters[name]): parameters[name] for name in names}.values()
    if kept := sum(_bytes_kept(statistics, weight.shape, shape) for weight in weights):
        memory.append(
            Row(
                name="last look of statistics",
                formula="5.0625 for each weight of the sampled rows",
                bf16=0,
                packed=kept,
            )
        )
    if teacher_units is not None:
        teacher_shard = sum(unit.shard for unit in teacher_units.all)
        memory.append(row("teacher", "2 bytes of its shards", lambda _: 2 * teacher_shard))

    def saved(packed: bool) -> list[float]:
        """Bytes that each layer saves for its backward."""
        packs_inputs = packed and quant.activations == "nvfp4"
        return [shape.tokens * layer_activation_bytes(config, module, packs_inputs=packs_inputs) for module in layers]

    def activations(packed: bool) -> float:
        return shape.tokens * 2 * config.hidden_size * len(layers) if shape.gradient_checkpointing else sum(saved(packed))

    def recomputed(packed: bool) -> float:
        return max(saved(packed)) if shape.gradient_checkpointing else 0

    logits, logits_formula = _logits(model, shape)
    # First of both models in bf16, then their difference in fp32 beside them.
    compared = 4 * config.hidden_size * shape.tokens * shape.compared_layers
    parts = [
        row("activations", "A_l", activations),
        row("logits", logits_formula, lambda _: logits),
        row("largest layer, gathered", "2 bytes an element", lambda _: layer.unsharded),
    ]
    if compared:
        parts.append(row("hidden states, of both", "4 h T for each layer that is compared", lambda _: compared))
    gathered = 2 * layer.unsharded if shape.reshard_after_forward else sum(unit.unsharded for unit in units.layers)
    head_grad, layer_grad = (unit.gradient(unit.served_bytes) for unit in (head_unit, layer))

    def received(packed: bool) -> float:
        """Bytes that gathering a layer needs beside the gathered layer."""
        return width * layer.sent(packed) if width > 1 else 0

    def forward(packed: bool) -> float:
        """Bytes of the forward when all layers are done."""
        kept = 0 if shape.reshard_after_forward else gathered
        teacher_head = 0 if teacher_units is None else teacher_units.head.unsharded
        return head_unit.unsharded + teacher_head + kept + activations(packed) + compared

    and_teacher = " + the teacher's head" if teacher is not None else ""
    and_logits = "hidden states + the larger of logits and hidden states" if compared else "logits"
    moments = [
        row(
            "at the loss",
            f"head{and_teacher} + activations + {and_logits}",
            lambda packed: forward(packed) + max(logits, compared),
        ),
        row(
            "in the backward of a layer",
            "head and its gradient + 2 layers + what is received of one + layer gradient and fp32 reduction + A_l"
            + (" + hidden states" if compared else ""),
            lambda packed: (
                head_unit.unsharded
                + head_grad
                + gathered
                + received(packed)
                + layer_grad
                + layer.gradient(4)
                + activations(packed)
                + recomputed(packed)
                + compared
            ),
        ),
        row(
            "at the end of the backward",
            "head, embedding, their gradients and fp32 reductions",
            lambda _: sum(
                unit.unsharded + unit.gradient(unit.served_bytes) + unit.gradient(4)
                for unit in (head_unit, *units.trained_embeddings)
            ),
        ),
    ]
    if teacher_units is not None:
        # What is received of a unit in bf16 is as large as the gathered unit.
        copies_of_one = 2 if width > 1 else 1
        in_flight = [copies_of_one * unit.unsharded for unit in teacher_units.embeddings]
        in_flight.append((1 + copies_of_one) * teacher_units.largest_layer.unsharded)
        formula = "head + the teacher's + activations + 2 of its layers, or its embedding, + what is received of one"
        moments.insert(0, row("in the teacher's forward", formula, lambda packed: forward(packed) + max(in_flight)))
    peak = Row(
        name="peak",
        formula="what is held + the largest moment; compare with memory/peak_gib of a run",
        bf16=sum(r.bf16 for r in memory) + max(r.bf16 for r in moments),
        packed=sum(r.packed for r in memory) + max(r.packed for r in moments),
    )

    backward_gathers = shape.micro_batches if shape.reshard_after_forward else 0
    others, copies = width - 1, shape.replicate_size
    backward = "A (W-1)" if shape.reshard_after_forward else "0: nothing is resharded after the forward;"
    wire = [
        row(
            "all-gather, forward",
            "A (W-1) x (2 n; packed 0.5625 q + 2 (n-q); embedding 4)",
            lambda packed: shape.micro_batches * others * sum(unit.sent(packed) for unit in units.all),
        ),
        row(
            "all-gather, backward",
            f"{backward} x the same without the head",
            lambda packed: (
                backward_gathers * others * sum(unit.sent(packed) for unit in (*units.layers, *units.trained_embeddings))
            ),
        ),
        row("reduce-scatter", "(W-1) 4 t, once per step", lambda _: others * 4 * trained_shard),
        row("all-reduce of copies", "2 (R-1)/R 4 t", lambda _: 2 * (copies - 1) / copies * 4 * trained_shard),
    ]
    if teacher_units is not None:
        sent = sum(unit.sent(packed=False) for unit in teacher_units.all)
        wire.append(
            row("all-gather, teacher", "A (W-1) x 2 bytes of its shards", lambda _: shape.micro_batches * others * sent)
        )
    wire_total = Row(
        name="on the wire", formula="received per GPU", bf16=sum(r.bf16 for r in wire), packed=sum(r.packed for r in wire)
    )
    return Plan(
        num_parameters=elements,
        num_quantized=sum(p.numel() for p in model.parameters() if id(p) in quantized),
        memory=memory,
        parts=parts,
        moments=moments,
        peak=peak,
        wire=wire,
        wire_total=wire_total,
    )


def _bytes_kept(statistics: Sequence[Statistic], weight: Sequence[int], shape: RunShape) -> float:
    """Bytes that one rank keeps of a weight [N, K], or [E, N, K], of which it has a shard, and of that a part beside other replicas."""
    num_own, *matrix = rows_per_rank(weight[0], shape.shard_size), *weight[1:]
    own, num_rows = ([num_own, *matrix], matrix[0]) if len(matrix) == 2 else ([weight[0], *matrix], num_own)
    return sum(statistic.bytes_kept(own, rows_per_rank(num_rows, shape.replicate_size)) for statistic in statistics)


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def plan_table(plan: Plan, shape: RunShape) -> str:
    """A printable table."""
    lines = [
        f"{plan.num_parameters:,} parameters, {plan.num_quantized:,} of them in NVFP4",
        f"{shape.world_size} GPUs: W = {shape.shard_size} share a copy of the model, R = {shape.replicate_size} copies",
        f"A = {shape.micro_batches} micro-batches per step of {shape.batch_size} x {shape.seq_len} tokens (T = {shape.tokens:,})",
        f"gradient checkpointing {_on(shape.gradient_checkpointing)}, reshard_after_forward {_on(shape.reshard_after_forward)}",
    ]
    sections = [
        ("memory per GPU, held throughout", "GiB", 2**30, plan.memory),
        ("memory per GPU, of which moments consist", "GiB", 2**30, plan.parts),
        ("memory per GPU, one of these at a time", "GiB", 2**30, plan.moments),
        ("", "", 2**30, [plan.peak]),
        ("traffic per GPU and optimizer step", "GB", 1e9, plan.wire),
        ("", "", 1e9, [plan.wire_total]),
    ]
    rows = [row for _, _, _, group in sections for row in group]
    width = max(len(title) for title, *_ in sections)
    formula_width = max(len(row.formula) for row in rows)
    for title, unit, scale, group in sections:
        if title:
            lines += [
                "",
                f"{title:<{width}}  {f'bf16 {unit}':>10}  {f'quantized {unit}':>13}  ratio  formula",
                "-" * (width + 34 + formula_width),
            ]
        for row in group:
            ratio = f"{row.packed / row.bf16:.3f}" if row.bf16 else "-"
            lines.append(
                f"{row.name:<{width}}  {row.bf16 / scale:>10.3f}  {row.packed / scale:>13.3f}  {ratio:>5}  {row.formula}"
            )
    return "\n".join([*lines, "", NOTES])
