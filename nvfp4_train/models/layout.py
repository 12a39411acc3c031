"""Names, shapes and dtypes of a model's tensors, in memory and in a hub folder, found from the config without any weight.

In memory a tensor has its `state_dict` name; on disk it has the name that the model's authors published. Transformers maps one
to the other while it loads (Mixtral's `mlp.gate` is `block_sparse_moe.gate` on disk, a 3-D expert parameter is one matrix per
expert, and some models have q, k and v in one matrix on disk), and its own reverse of that map is used here.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from nvfp4_train.models.served_dtype import dtypes_of_plain, plain_model
from nvfp4_train.quant.served import SERVED_DTYPE


class HubLayout:
    """The tensors of the causal LM that a config describes. Raises ValueError where transformers' map cannot be reversed."""

    def __init__(self, config: PretrainedConfig):
        self.model = plain_model(config)
        """The plain transformers class, on the meta device."""
        dtypes = dtypes_of_plain(self.model)
        state = {
            name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta")
            for name, tensor in self.model.state_dict().items()
        }
        self.aliases: dict[str, str] = dict(self.model.all_tied_weights_keys)
        """Tied copies, which are not on disk: name -> name of the tensor that is."""
        self.buffers = state.keys() - dict(self.model.named_parameters(remove_duplicate=False)).keys()
        self.tensors = {name: tensor for name, tensor in state.items() if name not in self.aliases}
        """Tensors by name in memory, on the meta device, in the dtype that is served."""
        self.hub_tensors: dict[str, Tensor] = self._revert(self.tensors)
        """The same by name on disk."""
        key_of = {id(tensor): key for key, tensor in self.hub_tensors.items()}
        self._renamed = {name: key_of[id(tensor)] for name, tensor in self.tensors.items() if id(tensor) in key_of}
        self._renamed |= {alias: next(iter(self._revert({alias: state[alias]}))) for alias in self.aliases}
        self.bundles = self._find_bundles()
        """Tensors in memory -> the tensors on disk that hold them: one to one, one to several, or several to one."""
        if sorted(key for keys in self.bundles.values() for key in keys) != sorted(self.hub_tensors):
            raise ValueError(
                f"transformers does not tell how tensors of {self.architecture} are joined on disk, so they cannot be written one "
                "after the other; save its weights with save_pretrained"
            )

    @property
    def served_config(self) -> PretrainedConfig:
        """The config of the model as it is served: in bf16."""
        return self.model.config

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    def served_dtype(self, name: str) -> torch.dtype:
        """The dtype in which readers hold an unquantized parameter or buffer, by name in memory."""
        return self.tensors[self.aliases.get(name, name)].dtype

    def to_hub(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the tensors of a bundle from names in memory to names on disk, as views where transformers' map allows it."""
        if len(tensors) == 1 and (name := next(iter(tensors))) in self._renamed:
            return {self._renamed[name]: tensors[name]}
        return self._revert(dict(tensors))

    def reason_to_keep(self, name: str) -> str | None:
        """Why no folder can hold a parameter in NVFP4; None where one can."""
        if name in self.aliases or name in self.aliases.values():
            return "tied to another module"
        if not self._renamed.get(name, "").endswith(".weight"):
            return "the hub stores it in another layout"
        if self.served_dtype(name) is not SERVED_DTYPE:
            return f"transformers keeps it in {str(self.served_dtype(name)).removeprefix('torch.')}"
        return None

    def linears(self) -> dict[str, str | None]:
        """Every nn.Linear by its module name in memory -> module name on disk, None where the two weights differ in layout."""
        keys = {name: self._renamed.get(f"{name}.weight", "") for name in self._modules(nn.Linear)}
        return {name: key.removesuffix(".weight") if key.endswith(".weight") else None for name, key in keys.items()}

    def matrices_outside_linears(self) -> list[str]:
        """Module names on disk of weight matrices that are no nn.Linear here but a linear layer in a serving engine.

        Those are routers, experts, and matrices that several nn.Linear share. Embeddings and convolutions are not among them.
        """
        linears = {f"{name}.weight" for name in self._modules(nn.Linear)}
        embeddings = {f"{name}.weight" for name in self._modules(nn.Embedding)}
        known = linears & self._renamed.keys() | embeddings
        keys: list[str] = []
        for names, hub_names in self.bundles.items():
            for name in names:
                shape = self.tensors[name].shape
                is_experts = len(shape) > 2 and "experts" in name.split(".")
                is_matrix = len(shape) == 2 and name.endswith(".weight")
                if name not in known and (is_experts or is_matrix):
                    keys += hub_names
        return [key.removesuffix(".weight") for key in dict.fromkeys(keys)]

    def embeddings(self) -> list[str]:
        """Module names on disk of embeddings."""
        keys = {name: self._renamed.get(f"{name}.weight", f"{name}.weight") for name in self._modules(nn.Embedding)}
        return [key.removesuffix(".weight") for key in keys.values()]

    def _find_bundles(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        keys_of = {
            name: (self._renamed[name],) if name in self._renamed else tuple(self._revert({name: tensor}))
            for name, tensor in self.tensors.items()
        }
        names_of: dict[str, list[str]] = {}
        for name, keys in keys_of.items():
            for key in keys:
                names_of.setdefault(key, []).append(name)
        bundles = dict.fromkeys(
            tuple(dict.fromkeys(other for key in keys for other in names_of[key])) for keys in keys_of.values()
        )
        return {
            names: keys_of[names[0]] if len(names) == 1 else tuple(self._revert({name: self.tensors[name] for name in names}))
            for names in bundles
        }

    def _modules(self, *types: type[nn.Module]) -> list[str]:
        return [name for name, module in self.model.named_modules() if isinstance(module, types)]

    def _revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(revert_weight_conversion(self.model, tensors))


def shown(names: Iterable[str], limit: int = 3) -> str:
    """The first few of some names, for an error message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
