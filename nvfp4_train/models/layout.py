"""Names, shapes and dtypes of a model's tensors, in memory and in a hub folder, found from the config without any weight.

In memory a tensor has its `state_dict` name; on disk it has the name that the model's authors published. Transformers maps one
to the other while it loads (Mixtral's `mlp.gate` is `block_sparse_moe.gate` on disk, a 3-D expert parameter is one matrix per
expert, and some models have q, k and v in one matrix on disk), and its own reverse of that map is used here.

Readers of packed folders know matrices alone, so quantized experts are always one matrix for each expert and projection on disk, also
where the authors published one tensor for all of them: as `experts.N.gate_proj`, `up_proj` and `down_proj` beside the place of that
tensor, which is how serving engines ask for them.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from nvfp4_train.errors import one_line
from nvfp4_train.models.architecture import OUTSIDE, parameters_outside
from nvfp4_train.models.served_dtype import dtypes_of_plain, plain_model
from nvfp4_train.quant.experts import ExpertWeight, find_experts
from nvfp4_train.quant.served import SERVED_DTYPE


@dataclass(frozen=True, kw_only=True)
class HubMatrix:
    """A matrix on disk that is a quantized parameter, or some of its rows."""

    module: str
    """Name of its module on disk: the matrix is `module.weight`."""
    expert: int | None = None
    """Which of the parameter's matrices it belongs to; None where the parameter is one matrix."""
    rows: slice | None = None
    """Its rows in that matrix; None for all."""

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor [N, ...], or [E, N, ...] of experts: a view."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix if self.rows is None else matrix[self.rows]


class HubLayout:
    """The tensors of the model that a config describes. Raises ValueError where transformers' map cannot be reversed."""

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
        self.outside = parameters_outside(self.model)
        """Parameters that are not the language model's."""
        self.buffers = state.keys() - dict(self.model.named_parameters(remove_duplicate=False)).keys()
        self.tensors = {name: tensor for name, tensor in state.items() if name not in self.aliases}
        """Tensors by name in memory, on the meta device, in the dtype that is served."""
        self.hub_tensors: dict[str, Tensor] = self._revert(self.tensors)
        """The same by name on disk."""
        self.not_built: dict[str, Tensor] = {}
        """Tensors of the folder by name on disk, on the meta device, that no module here holds. Whoever knows of any sets them."""
        key_of = {id(tensor): key for key, tensor in self.hub_tensors.items()}
        self._renamed = {name: key_of[id(tensor)] for name, tensor in self.tensors.items() if id(tensor) in key_of}
        self._matrices: dict[str, list[HubMatrix]] = {}
        self._parts: dict[str, dict[str, HubMatrix]] = {}
        """Of quantized experts and their biases: the matrices and vectors on disk, by name there."""
        self._renamed |= {alias: next(iter(self._revert({alias: state[alias]}))) for alias in self.aliases}
        self.experts: dict[str, ExpertWeight] = find_experts(self.model)
        """The parameters of experts by name."""
        self.quantized_experts: frozenset[str] = frozenset()
        """Those that `with_quantized` has made matrices on disk. In memory they are [E, N, K]."""
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
        if len(tensors) == 1 and (parts := self._parts.get(next(iter(tensors)))):
            (tensor,) = tensors.values()
            return {key: matrix.of(tensor) for key, matrix in parts.items()}
        if len(tensors) == 1 and (name := next(iter(tensors))) in self._renamed:
            return {self._renamed[name]: tensors[name]}
        return self._revert(dict(tensors))

    def reason_to_keep(self, name: str) -> str | None:
        """Why no folder can hold a parameter in NVFP4; None where one can."""
        if name in self.outside:
            return OUTSIDE
        if name in self.aliases or name in self.aliases.values():
            return "tied to another module"
        if name in self.experts:
            if not self.matrices(name):
                return "the hub stores it in another layout"
        elif not self._renamed.get(name, "").endswith(".weight"):
            return "the hub stores it in another layout"
        if self.served_dtype(name) is not SERVED_DTYPE:
            return f"transformers keeps it in {str(self.served_dtype(name)).removeprefix('torch.')}"
        return None

    def with_quantized(self, names: Collection[str]) -> "HubLayout":
        """The layout of a folder in which the parameters of these names are quantized: its experts among them are matrices on disk."""
        layout = copy.copy(self)
        layout.quantized_experts = frozenset(name for name in names if name in self.experts)
        layout._parts = {}
        for name in layout.quantized_experts:
            matrices = self.matrices(name)
            layout._parts[name] = {f"{matrix.module}.weight": matrix for matrix in matrices}
            if self.experts[name].is_transposed:
                layout.tensors = layout.tensors | {name: self.tensors[name].mT.contiguous()}
            bias = f"{name}_bias"
            if bias in self._renamed and not self._rows_of_keys(name):
                layout._parts[bias] = {f"{matrix.module}.bias": matrix for matrix in matrices}
        layout.bundles = {}
        layout.hub_tensors = {}
        for bundle, keys in self.bundles.items():
            name = bundle[0]
            if len(bundle) == 1 and name in layout._parts:
                on_disk = layout.to_hub({name: layout.tensors[name]})
            else:
                on_disk = {key: self.hub_tensors[key] for key in keys}
            layout.bundles[bundle] = tuple(on_disk)
            layout.hub_tensors |= on_disk
        return layout

    def matrices(self, name: str) -> list[HubMatrix]:
        """The matrices on disk of a parameter that can be quantized; none where the hub stores it in a way that is not known."""
        if name not in self._matrices:
            self._matrices[name] = self._find_matrices(name)
        return self._matrices[name]

    def _find_matrices(self, name: str) -> list[HubMatrix]:
        if name not in self.experts:
            key = self._renamed.get(name, "")
            return [HubMatrix(module=key.removesuffix(".weight"))] if key.endswith(".weight") else []
        weight, keys = self.experts[name], self._keys_of(name)
        if keys is None:
            return []
        rows_of_key = self._rows_of_keys(name)
        if not rows_of_key and any(self.hub_tensors[key].dim() != 3 for key in keys):
            return []
        if not rows_of_key:
            block = keys[0].removesuffix(".weight").rpartition(".")[0]
            experts = block if block.rpartition(".")[2] == "experts" else f"{block}.experts"
            rows_of_key = {f"{experts}.0.{leaf}.weight": weight.rows(leaf) for leaf in weight.projections}
        # The number of the layer stands before that of the expert.
        split = [(key.removesuffix(".weight").rsplit(".0.", 1), rows) for key, rows in rows_of_key.items()]
        return [
            HubMatrix(module=f"{before}.{expert}.{after}", expert=expert, rows=rows)
            for expert in range(weight.num_experts)
            for (before, after), rows in split
        ]

    def _keys_of(self, name: str) -> tuple[str, ...] | None:
        """The tensors on disk that hold a parameter and nothing else."""
        keys = (self._renamed[name],) if name in self._renamed else tuple(self._revert({name: self.tensors[name]}))
        others = {key for other, key in self._renamed.items() if other != name}
        return None if others.intersection(keys) else keys

    def _rows_of_keys(self, name: str) -> dict[str, slice]:
        """The rows of the matrices of expert 0, by name on disk, as authors publish them that have one for each expert and projection;
        none where they have one tensor for all experts, or rows in another order.
        """
        weight = self.experts[name]
        # Transformers rearranges the numbers of rows as it would the rows: of two columns here, because 5.17 drops dimensions of one.
        numbers = torch.arange(weight.num_outputs, dtype=torch.int32).view(1, -1, 1).expand(1, -1, 2)
        numbers = numbers.mT if weight.is_transposed else numbers
        found = {}
        for key, part in self._revert({name: numbers}).items():
            if ".0." not in key or not key.endswith(".weight") or part.dim() != 2 or part.shape[1] != 2:
                return {}
            rows = part[:, 0].tolist()
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            if rows != list(range(rows[0], rows[-1] + 1, step)):
                return {}
            found[key] = slice(rows[0], rows[-1] + 1, step)
        return found

    def hub_names(self) -> dict[str, str]:
        """Names on disk of the tensors that are the same there, by name in memory."""
        return dict(self._renamed)

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
        known = linears & self._renamed.keys() | embeddings | self.quantized_experts
        keys: list[str] = []
        for names, hub_names in self.bundles.items():
            for name in names:
                shape = self.tensors[name].shape
                is_experts = len(shape) > 2 and "experts" in name.split(".")
                is_matrix = len(shape) == 2 and name.endswith(".weight")
                if name not in known and (is_experts or is_matrix):
                    keys += hub_names
        keys += [key for key, tensor in self.not_built.items() if tensor.dim() > 1 and key.endswith(".weight")]
        return [key.removesuffix(".weight") for key in dict.fromkeys(keys)]

    def has_names_of_transformers(self) -> bool:
        """Whether transformers looks for the tensors of this folder one by one, and joins or splits none of them."""
        # Of some experts it makes matrices where a folder is quantized.
        classes = {type(weight.module).__name__ for weight in self.experts.values()}
        known = self.quantized_experts if classes <= MODULES_TO_PATCH_FOR_QUANTIZATION.keys() else frozenset()
        return all(len(names) == len(keys) == 1 or known.issuperset(names) for names, keys in self.bundles.items())

    def unquantized_experts(self) -> list[str]:
        """Module names on disk of the experts that stay as they are, as serving engines ask for them."""
        found: dict[str, None] = {}
        for name, weight in self.experts.items():
            if name not in self.quantized_experts:
                matrices = self.matrices(name)
                found[matrices[0].module.rsplit(".", 2)[0] if matrices else weight.module_name] = None
        return list(found)

    def quantized_expert_modules(self) -> set[str]:
        """Module names on disk of the matrices of quantized experts."""
        return {matrix.module for name in self.quantized_experts for matrix in self.matrices(name)}

    def blocks_not_built(self) -> list[str]:
        """Names on disk of the blocks of modules that no class builds, such as `mtp`: whatever is in them stays unquantized."""
        return prefixes(self.not_built)

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
        try:
            return dict(revert_weight_conversion(self.model, tensors))
        except ValueError as error:
            raise ValueError(
                f"transformers does not tell how tensors of {self.architecture} are joined on disk, one after the other, so they "
                f"cannot be written: {one_line(error)[:200]}"
            ) from error


def prefixes(names: Iterable[str]) -> list[str]:
    """The blocks that tensors of no module belong to: names up to the number of a layer of the model, or their first parts.

    `mtp.layers.0.mlp.up_proj.weight` is of `mtp`, `model.layers.61.eh_proj.weight` of `model.layers.61`, and `model.visual.norm.bias`
    of `model.visual`.
    """
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        length = 0
        while length < len(parts) and parts[length] in ("model", "language_model"):
            length += 1
        is_layer = parts[length : length + 1] == ["layers"]
        found[".".join(parts[: length + (2 if is_layer else 1)])] = None
    return list(found)


def shown(names: Iterable[str], limit: int = 3) -> str:
    """The first few of some names, for an error message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
