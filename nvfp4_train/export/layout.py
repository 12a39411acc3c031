"""Names and shapes of a model's tensors, in memory and in a hub folder, found from the config without any weight.

In memory a tensor has its `state_dict` name; on disk it has the name that the model's authors published. Transformers maps one
to the other while it loads (Mixtral's `mlp.gate` is `block_sparse_moe.gate` on disk, a 3-D expert parameter is one matrix per
expert), and its own reverse of that map is used here.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion


class HubLayout:
    """The tensors of the causal LM that a config describes. `shapes` is by name in memory, `hub_shapes` by name on disk."""

    def __init__(self, config: PretrainedConfig):
        with torch.device("meta"):
            # Another attention implementation changes no tensor and may not be installed here.
            self._model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager"
            )
        state = self._model.state_dict()
        self.aliases: dict[str, str] = dict(self._model.all_tied_weights_keys)
        self.shapes = {name: tensor.shape for name, tensor in state.items() if name not in self.aliases}
        self.buffers = state.keys() - dict(self._model.named_parameters(remove_duplicate=False)).keys()

        self.hub_shapes: dict[str, torch.Size] = {}
        self._hub_names: dict[str, tuple[str, ...]] = {}
        self._renamed: dict[str, str] = {}
        for name, tensor in state.items():
            on_disk = self._revert(name, tensor)
            if len(on_disk) == 1 and next(iter(on_disk.values())) is tensor:
                self._renamed[name] = next(iter(on_disk))
            if name not in self.aliases:
                self._hub_names[name] = tuple(on_disk)
                self.hub_shapes.update({key: value.shape for key, value in on_disk.items()})
        unaliased = {name: tensor for name, tensor in state.items() if name not in self.aliases}
        if revert_weight_conversion(self._model, unaliased).keys() != self.hub_shapes.keys():
            raise ValueError(
                f"{self.architecture} stores several of its tensors joined into one, which the exporter cannot write; save its "
                "weights with save_pretrained"
            )

    @property
    def served_config(self) -> PretrainedConfig:
        """The config of the model as it is served: in bf16."""
        return self._model.config

    @property
    def architecture(self) -> str:
        return type(self._model).__name__

    def hub_names(self, name: str) -> tuple[str, ...]:
        """Names on disk of one tensor in memory."""
        return self._hub_names[name]

    def to_hub(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One tensor in memory -> its tensors on disk, as views where transformers' map allows it."""
        return {self._renamed[name]: tensor} if name in self._renamed else self._revert(name, tensor)

    def linears(self) -> dict[str, str | None]:
        """Every nn.Linear by its module name in memory -> module name on disk, None where the two weights differ in layout."""
        names = {name: self._renamed.get(f"{name}.weight") for name in self._modules(nn.Linear)}
        return {name: hub and hub.removesuffix(".weight") for name, hub in names.items()}

    def matrices_outside_linears(self) -> list[str]:
        """Module names on disk of weight matrices that are no nn.Linear here but a linear layer in a serving engine.

        Those are routers and experts. Embeddings and convolutions are not among them.
        """
        known = {f"{name}.weight" for name in self._modules(nn.Linear, nn.Embedding)}
        names = []
        for name, shape in self.shapes.items():
            is_experts = len(shape) > 2 and "experts" in name.split(".")
            is_matrix = len(shape) == 2 and name.endswith(".weight")
            if name not in known and (is_experts or is_matrix):
                names += [key.removesuffix(".weight") for key in self._hub_names[name]]
        return names

    def _modules(self, *types: type[nn.Module]) -> list[str]:
        return [name for name, module in self._model.named_modules() if isinstance(module, types)]

    def _revert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return revert_weight_conversion(self._model, {name: tensor})


def shown(names: Iterable[str], limit: int = 3) -> str:
    """The first few of some names, for an error message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
