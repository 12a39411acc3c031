"""Proves that a model keeps the documents of a row apart: that nothing of one reaches the logits of the next.

Attention does by its mask, where the attention kernel takes one; a state that goes from token to token (Mamba, linear attention, a
convolution) does not know where a document begins.
"""

import torch
from torch import Tensor, nn

from nvfp4_train.models.causal_lm import compute_logits
from nvfp4_train.quant.undisturbed import undisturbed

LENGTHS = ((7, 9, 8), (10, 6, 8))
"""Of the documents in each row of the probe. Both rows are needed: some kernels know documents in a single row alone."""
TOLERANCE = 8
"""Largest change of a later document's logits, in changes by other tokens in another row: experts multiply their tokens in another
order when others get other tokens. Without experts neither changes anything."""


@torch.no_grad()
def check_isolation(model: nn.Module, device: torch.device, *, name: str = "the model") -> None:
    """Raise ValueError where other tokens in the first document of a row change the logits of those behind it.

    `model` is a transformers causal LM, which comes back as it was. Under FSDP2 call it on every rank.
    """
    config = model.config.get_text_config()  # type: ignore
    generator = torch.Generator().manual_seed(0)
    shape = len(LENGTHS), sum(LENGTHS[0])
    # Lightning builds models with the GPU as the default device.
    first, second = (torch.randint(config.vocab_size, shape, generator=generator, device="cpu") for _ in range(2))
    is_first = torch.stack([torch.arange(shape[1], device="cpu") < lengths[0] for lengths in LENGTHS])
    in_another_row = torch.cat((first[:1], second[1:]))
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS]).to(device)

    def logits(ids: Tensor) -> Tensor:
        return compute_logits(model, ids.to(device), positions).double()

    with undisturbed(model):
        try:
            before, after = logits(first), logits(torch.where(is_first, second, first))
        except TypeError as error:
            raise ValueError(_refusal(name, model, f"its forward takes no position_ids ({error})")) from error
        control = (logits(in_another_row) - before)[0].abs().max().item()
    change = (after - before)[~is_first.to(device)].abs().max().item()
    if not change <= TOLERANCE * control:
        raise ValueError(
            _refusal(name, model, f"other tokens in one document change the logits of the next by up to {change:.3g}")
        )


def _refusal(name: str, model: nn.Module, reason: str) -> str:
    kernel = model.config._attn_implementation  # type: ignore
    return (
        f"data.isolate_documents=true needs a model that keeps documents apart, and {name} ({type(model).__name__}, attention "
        f"{kernel}) does not: {reason}. Set data.isolate_documents=false, or model.attn_implementation=sdpa if that is not what it has"
    )
