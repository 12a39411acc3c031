"""The dtype in which every tensor of a model is served: that of the plain transformers class, loaded with dtype=bfloat16.

That is bf16, except for tensors that the class makes in another dtype (`torch.zeros(n, dtype=torch.float32)`) and those that it names
in `_keep_in_fp32_modules_strict`. `_keep_in_fp32_modules`, without `strict`, is about float16 alone.
"""

import copy
import re

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def plain_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal LM that a reader of a bf16 folder builds, on the meta device. It takes no memory; the config is copied."""
    with torch.device("meta"):
        # Another attention implementation changes no tensor and may not be installed here.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager")


def served_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Dtype by name of every parameter and buffer, including unsaved buffers and tied copies.

    Reads the model's config alone, so the model may be in any dtype, sharded, or have modules of ours.
    """
    return dtypes_of_plain(plain_model(model.config))


def dtypes_of_plain(plain: PreTrainedModel) -> dict[str, torch.dtype]:
    """`served_dtypes` of what `plain_model` returns."""
    dtypes = {name: tensor.dtype for name, tensor in plain.named_parameters(remove_duplicate=False)}
    dtypes |= {name: tensor.dtype for name, tensor in plain.named_buffers(remove_duplicate=False)}
    # As from_pretrained does: patterns are searched in the names of saved tensors, and `*` stands for anything.
    for pattern, dtype in plain._get_dtype_plan(torch.bfloat16).items():
        for name in plain.state_dict():
            if re.search(pattern.replace("*", ".*"), name):
                dtypes[name] = dtype
    # A tied copy is not loaded; it is the tensor that it is tied to.
    return dtypes | {alias: dtypes[name] for alias, name in plain.all_tied_weights_keys.items()}
