"""Sizes that a plan counts with: of what FSDP2 gathers, and of what a decoder layer saves for its backward."""

import math
from collections.abc import Collection, Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from nvfp4_train.models.sharding import FsdpUnit
from nvfp4_train.quant.local_weight import rows_per_rank

PACKED_BYTES = 0.5625
"""Bytes of a quantized weight: 4 bits of code, and 8 bits of scale for every 16 weights."""


class UnitSizes:
    """The sizes of what FSDP2 gathers together."""

    def __init__(
        self, unit: FsdpUnit, gathered: set[int], quantized: Collection[int], shard_size: int, quantized_bytes: float
    ) -> None:
        """`gathered` holds the ids of other units' parameters; this unit adds its own."""
        parameters = {id(p): p for module in unit.modules for p in module.parameters() if id(p) not in gathered}
        gathered.update(parameters)
        self.shard_size = shard_size
        self.is_called = unit.is_called
        self.quantized_bytes = quantized_bytes
        """Bytes of a quantized element, gathered."""
        self.served_bytes = 4 if unit.in_fp32 else 2
        """Bytes of an element that is not quantized, gathered."""
        self.elements = sum(p.numel() for p in parameters.values())
        self.trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        shards = [(p, rows_per_rank(p.shape[0], shard_size) * p[0].numel()) for p in parameters.values()]
        self.shard = sum(size for _, size in shards)
        """Elements of this rank, padded."""
        self.trained_shard = sum(size for p, size in shards if p.requires_grad)
        self.quantized_shard = sum(size for p, size in shards if id(p) in quantized)
        self.unsharded = self.served_bytes * self.shard * shard_size if unit.is_called else 0
        """Bytes of the gathered unit."""

    def sent(self, packed: bool) -> float:
        """Bytes that this rank contributes to one gathering."""
        if not self.is_called:
            return 0
        if not packed:
            return self.served_bytes * self.shard
        return self.quantized_bytes * self.quantized_shard + self.served_bytes * (self.shard - self.quantized_shard)

    def gradient(self, num_bytes: int) -> int:
        """Bytes of the gathered unit's gradient at so many bytes an element."""
        return num_bytes * self.trained_shard * self.shard_size

    def kept(self) -> float:
        """Bytes that the sharded store keeps of what this rank sends: all of it, if anything in it is quantized."""
        return self.sent(packed=True) if self.quantized_shard else 0.0


class ModelSizes:
    """The units of a model, in the order in which FSDP2 gathers them, and what each kind of them is."""

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[FsdpUnit],
        shard_size: int,
        quantized: Collection[int] = (),
        quantized_bytes: float = PACKED_BYTES,
    ) -> None:
        """`quantized` has the ids of quantized parameters, `quantized_bytes` is what an element of theirs takes when it is gathered."""
        embedding, gathered = model.get_input_embeddings(), set[int]()
        self.all = [UnitSizes(unit, gathered, quantized, shard_size, quantized_bytes) for unit in units]
        self.head = self.all[-1]
        self.embeddings = [own for own, unit in zip(self.all, units, strict=True) if unit.modules == [embedding]]
        self.layers = [unit for unit in self.all if unit.is_called and unit is not self.head and unit not in self.embeddings]
        self.largest_layer = max(self.layers, key=lambda unit: unit.unsharded)
        # A frozen embedding takes no part in the backward.
        self.trained_embeddings = [unit for unit in self.embeddings if unit.trained]
        self.modules_of_layers = [m for unit in units if unit.is_layer for m in unit.modules if m is not embedding]


def layer_activation_bytes(config: PretrainedConfig, layer: nn.Module, *, packs_inputs: bool = False) -> float:
    """Bytes per token that one decoder layer saves for its backward, see `plan.NOTES`. Raises ValueError for a layer it does not know.

    With `packs_inputs` the inputs of quantized weights are saved packed (W4A4).
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    num_bytes: float = 16 * hidden + 4 * queries + 4 * keys + 4 * heads
    # Beside the packed output of attention its plain one stays, which attention itself saves.
    attention_input = PACKED_BYTES * queries + (PACKED_BYTES - 2) * hidden if packs_inputs else 0
    num_bytes += attention_input
    names = [name for name, _ in layer.named_modules()]
    if any(name.endswith("q_norm") for name in names):
        num_bytes += 8 * (queries + keys)
    experts = {n: p for n, p in layer.named_parameters() if "experts" in n.split(".") and not n.endswith("_bias")}
    if not experts:
        mlp_inputs = (PACKED_BYTES - 2) * (hidden + config.intermediate_size) if packs_inputs else 0
        return num_bytes + mlp_inputs + 8 * config.intermediate_size
    shapes = {name.rpartition(".")[2]: tuple(p.shape) for name, p in experts.items() if not name.endswith("_bias")}
    if set(shapes) != {"gate_up_proj", "down_proj"} or any("shared_expert" in name for name in names):
        raise ValueError(
            "the plan knows layers with one dense MLP, and layers of routed experts alone that are held as two 3-D parameters, "
            f"gate_up_proj and down_proj; got {type(layer).__name__} with {', '.join(names[-4:])}"
        )
    num_experts = shapes["down_proj"][0]
    width = math.prod(shapes["down_proj"]) // (num_experts * hidden)
    return num_bytes + config.num_experts_per_tok * (4 * hidden + 8 * width + 44) + 4 * num_experts
