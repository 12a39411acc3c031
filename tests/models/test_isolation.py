"""Documents of a row that must not see each other."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from nvfp4_train.models.causal_lm import compute_logits, load_model
from nvfp4_train.models.isolation import check_isolation
from nvfp4_train.models.logits import hidden_states
from nvfp4_train.models.quirks import take_rows_for_single_sequences

CPU = torch.device("cpu")
LENGTHS = (5, 9, 10)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)
IDS = torch.randint(64, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gemma3_text", "sdpa"), ("mixtral", "sdpa")],
)
def test_a_document_in_a_row_has_the_logits_that_it_has_alone(family: str, attention: str) -> None:
    """Windows of attention and positions are those of the document, too."""
    model = load_model(tiny_config(family, attn_implementation=attention), torch.float32).eval()
    with torch.no_grad():
        together, start = compute_logits(model, IDS, POSITIONS), 0
        for length in LENGTHS:
            own = slice(start, start + length)
            torch.testing.assert_close(together[:, own], compute_logits(model, IDS[:, own]), rtol=1e-4, atol=1e-5)
            start += length
        assert not torch.allclose(compute_logits(model, IDS)[:, -1], together[:, -1])
    check_isolation(model, CPU)


def test_a_documents_loss_has_no_gradient_by_the_embeddings_of_another() -> None:
    model = load_model(tiny_config("llama"), torch.float32)
    outputs: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: outputs.append(output) or output.retain_grad()
    )
    compute_logits(model, IDS, POSITIONS)[:, LENGTHS[0] : LENGTHS[0] + LENGTHS[1]].logsumexp(-1).sum().backward()
    by_token = outputs[0].grad.abs().amax(-1)
    inside = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    assert (by_token[:, inside] > 0).all()
    by_token[:, inside] = 0
    assert not by_token.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "zamba2", "falcon_h1"])
def test_a_model_whose_state_goes_on_is_refused(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    with pytest.raises(
        ValueError, match="data.isolate_documents=true needs a model that keeps documents apart, and the teacher"
    ):
        check_isolation(model, CPU, name="the teacher")
    assert model.training, "the mode is restored"


def test_rows_are_single_sequences_where_no_positions_are_given() -> None:
    """Also behind a forward that had some."""
    take_rows_for_single_sequences()
    model = tiny_model("llama", torch.float32).eval()
    with torch.no_grad():
        before = compute_logits(model, IDS)
        compute_logits(model, IDS, POSITIONS)
        assert torch.equal(compute_logits(model, IDS), before)
        torch.testing.assert_close(model.lm_head(hidden_states(model, IDS, POSITIONS)), compute_logits(model, IDS, POSITIONS))
