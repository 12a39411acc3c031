import pytest
import torch
from torch.nn import functional as F

from nvfp4_train.losses.base import num_positions
from nvfp4_train.losses.next_token import next_token_loss


def test_a_mask_marks_the_tokens_to_be_predicted() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 16), torch.randint(0, 16, (2, 5))
    mask = torch.tensor([[True, False, True, True, False], [False, False, False, False, True]])
    marked = [(0, 2), (0, 3), (1, 4)]
    expected = sum(F.cross_entropy(logits[row, t - 1], ids[row, t]) for row, t in marked) / 3
    assert next_token_loss(logits, ids, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert num_positions({"input_ids": ids, "loss_mask": mask}) == 3


def test_with_all_tokens_marked_it_is_the_loss_without_a_mask() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 16), torch.randint(0, 16, (2, 5))
    assert next_token_loss(logits, ids, torch.ones(2, 5, dtype=torch.bool)).item() == pytest.approx(
        next_token_loss(logits, ids).item(), rel=1e-6
    )
    assert num_positions({"input_ids": ids}) == 10


def test_a_mask_without_positions_gives_0_and_gradients_of_0() -> None:
    logits = torch.randn(1, 4, 16, requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    loss = next_token_loss(logits, torch.zeros(1, 4, dtype=torch.int64), mask)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
