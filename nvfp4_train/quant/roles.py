"""Linears that choose or weigh what others make: routers and gates. Serving engines keep them in bf16, and so do we."""

import re
from typing import Any

from torch import nn

from nvfp4_train.quant.experts import ExpertWeight

ROUTER_PARTS = re.compile(r"gate|.*router.*")
"""Parts of names, of a linear or of a module that it is in."""

HIDDEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last parts of names of linears that make hidden values, however few."""

ROUTER_CLASSES = re.compile(r".*(Router|Gating)")


class Roles:
    """Tells routers and gates of a model from its other linears, by what they are for and not by the names of families."""

    def __init__(self, model: nn.Module, experts: dict[str, ExpertWeight]) -> None:
        self._modules = dict(model.named_modules())
        self._num_choices: dict[str, set[int]] = {}
        """Numbers of outputs of a router, by the name of the block that it serves."""
        config: Any = getattr(model, "config", None)
        fields = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else {}
        # Some blocks have experts that do nothing, and choose among these, too.
        num_idle = fields.get("zero_expert_num") or 0
        for weight in experts.values():
            block = weight.module_name.rpartition(".")[0]
            self._num_choices.setdefault(block, set()).update((weight.num_experts, weight.num_experts + num_idle))
        for name, module in self._modules.items():
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
                self._num_choices.setdefault(name.rpartition(".")[0], set()).update((len(module), len(module) + num_idle))
        # The indexer of sparse attention has heads of its own.
        self._num_gates = {of_index: _num_gates(fields, of_index) for of_index in (False, True)}

    def role_of(self, name: str, linear: nn.Linear) -> str | None:
        """`router` or `gate`, and None for a linear that is neither. `name` is that of the module."""
        parts = name.split(".")
        ancestors = [".".join(parts[:length]) for length in range(len(parts))]
        if any(ROUTER_PARTS.fullmatch(part) for part in parts):
            return "router"
        if any(ROUTER_CLASSES.fullmatch(type(self._modules[ancestor]).__name__) for ancestor in ancestors):
            return "router"
        blocks = [ancestor for ancestor in ancestors if ancestor in self._num_choices]
        # A layer may hold its experts itself.
        is_in_block = bool(blocks) and "experts" not in parts and len(parts) - len(blocks[-1].split(".")) <= 2
        if is_in_block and parts[-1] not in HIDDEN_PROJECTIONS and linear.out_features in self._num_choices[blocks[-1]]:
            return "router"
        is_gate = parts[-1] not in HIDDEN_PROJECTIONS and linear.out_features in self._num_gates["indexer" in parts]
        return "gate with one output per head" if is_gate else None


def _num_gates(fields: dict[str, Any], of_index: bool) -> set[int]:
    """One or two for every head, unless that is as many as a head is wide; and one for a whole token."""
    own = {key: value for key, value in fields.items() if "head" in key and ("index" in key) == of_index and _is_size(value)}
    widths = {value for key, value in own.items() if _is_width(key)}
    heads = {value for key, value in own.items() if not _is_width(key)}
    return {1} | ({count * number for count in heads for number in (1, 2)} - widths)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_width(key: str) -> bool:
    return any(part in key for part in ("dim", "size", "d_head"))
