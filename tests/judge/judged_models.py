"""Small models to judge."""

from pathlib import Path
from typing import Any

import torch
from chat_data import VOCABULARY, chat_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM


def save_model(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """A small Llama with weights that tell tokens apart, and its tokenizer."""
    torch.manual_seed(seed)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama",
        **small | {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": VOCABULARY} | fields,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    model.to(torch.bfloat16).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
