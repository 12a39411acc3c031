"""The dtype in which every tensor of a model is served: that of the plain transformers class, loaded with dtype=bfloat16.

That is bf16, except for tensors that the class makes in another dtype (`torch.zeros(n, dtype=torch.float32)`) and those that it names
in `_keep_in_fp32_modules_strict`. `_keep_in_fp32_modules`, without `strict`, is about float16 alone.
"""

import copy
import re
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from nvfp4_train.models.architecture import model_class
from nvfp4_train.quant.served import SERVED_DTYPE, ServedUnit


def plain_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a reader of a bf16 folder builds, on the meta device. It takes no memory; the config is copied.

    Raises ValueError as `model_class` does.
    """
    cls, config = model_class(copy.deepcopy(config))
    with torch.device("meta"):
        # Another attention implementation changes no tensor and may not be installed here.
        return cls._from_config(config, dtype=SERVED_DTYPE, attn_implementation="eager")


def class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The transformers class of a model, under the mixins of ours and of FSDP2."""
    classes: tuple[Any, ...] = type(model).__mro__
    return next(cls for cls in classes if not issubclass(cls, ServedUnit | FSDPModule))


def served_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Dtype by name of every parameter and buffer, including unsaved buffers and tied copies.

    Reads the model's class and config alone, so the model may be in any dtype, sharded, or have modules of ours.
    """
    with torch.device("meta"):
        plain = class_of(model)._from_config(copy.deepcopy(model.config), dtype=SERVED_DTYPE, attn_implementation="eager")
    return dtypes_of_plain(plain)


def dtypes_of_plain(plain: PreTrainedModel) -> dict[str, torch.dtype]:
    """`served_dtypes` of what `plain_model` returns."""
    dtypes = {name: tensor.dtype for name, tensor in plain.named_parameters(remove_duplicate=False)}
    dtypes |= {name: tensor.dtype for name, tensor in plain.named_buffers(remove_duplicate=False)}
    # As from_pretrained does: patterns are searched in the names of saved tensors, and `*` stands for anything.
    for pattern, dtype in plain._get_dtype_plan(SERVED_DTYPE).items():
        for name in plain.state_dict():
            if re.search(pattern.replace("*", ".*"), name):
                dtypes[name] = dtype
    # A tied copy is not loaded; it is the tensor that it is tied to.
    return dtypes | {alias: dtypes[name] for alias, name in plain.all_tied_weights_keys.items()}
