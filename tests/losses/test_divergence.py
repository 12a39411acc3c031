"""The arithmetic of `divergence`, against autograd, and the kernel against it: in Triton's interpreter where there is no GPU."""

import itertools
import math

import pytest
import repaired_interpreter  # noqa: F401  (changes what it imports)
import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4_train.losses import divergence_kernel
from nvfp4_train.losses.divergence import DIVERGENCES, Objective, Positions, row_losses, row_metrics
from nvfp4_train.models.logits import LogitMap

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBJECTIVES = [
    Objective(divergence=divergence, temperature=temperature, cross_entropy=cross_entropy)
    for divergence, temperature, cross_entropy in itertools.product(DIVERGENCES, (1.0, 2.5), (0.0, 0.3))
]
MAPPED = Objective(divergence="jsd", cross_entropy=0.3, student_map=LogitMap(0.5, 4.0), teacher_map=LogitMap(1.0, 8.0))


def name_of(objective: Objective) -> str:
    return f"{objective.divergence}-{objective.temperature}-{objective.cross_entropy}-{objective.student_map.cap}"


def rows(num_rows: int = 6, num_columns: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Positions]:
    """Logits of student and teacher, and positions of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, num_rows, num_columns, generator=generator)
    ids = torch.randint(0, num_columns, (2, num_rows // 2), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 1] = False
    return student, teacher, Positions.of({"input_ids": ids, "loss_mask": mask})


def by_definition(student: Tensor, teacher: Tensor, positions: Positions, objective: Objective) -> Tensor:
    """The objective, of probabilities in float64."""
    student = objective.student_map(student.double())
    temperature = objective.temperature
    q, p = (student / temperature).softmax(-1), (objective.teacher_map(teacher.double()) / temperature).softmax(-1)
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[objective.divergence]
    cross_entropy = F.cross_entropy(student, positions.targets, reduction="none")
    return objective.mix(temperature**2 * (positions.weights * value).sum(), (positions.target_weights * cross_entropy).sum())


@pytest.mark.parametrize("objective", [*OBJECTIVES, MAPPED], ids=name_of)
def test_values_and_gradients_are_those_of_the_definition(objective: Objective) -> None:
    student, teacher, positions = rows()
    leaf = student.double().requires_grad_()
    expected = by_definition(leaf, teacher, positions, objective)
    (slope,) = torch.autograd.grad(expected, leaf)
    gradient = torch.full_like(student, math.nan)
    losses = row_losses(student, teacher, positions, objective, gradient)
    torch.testing.assert_close(objective.mix(*losses.sum(1)).double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", [*OBJECTIVES, MAPPED], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_computes_the_same(objective: Objective, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several tiles, the last of which is not full."""
    monkeypatch.setattr(divergence_kernel, "TILE", 16)
    student, teacher, positions = rows()
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = torch.empty_like(student, dtype=torch.float32)
    losses = row_losses(student, teacher, positions, objective, expected)
    if not objective.cross_entropy:
        losses[1] = 0
    gradient = torch.full_like(student, math.nan, device=DEVICE)
    on_device = Positions(**{name: tensor.to(DEVICE) for name, tensor in vars(positions).items()})
    found = divergence_kernel.row_losses(student.to(DEVICE), teacher.to(DEVICE), on_device, objective, gradient)
    torch.testing.assert_close(found.cpu(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.float().cpu(), expected, rtol=1e-4 if dtype is torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize("function", ["plain", "kernel"])
def test_equal_logits_and_logits_of_any_size_are_no_edge(
    objective: Objective, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of minus infinity, which models give tokens that do not exist, and those of which exponentials overflow."""
    monkeypatch.setattr(divergence_kernel, "TILE", 16)
    compute = row_losses if function == "plain" else divergence_kernel.row_losses
    device = "cpu" if function == "plain" else DEVICE
    student, _, positions = rows()
    student[:, -20:] = -math.inf
    student[2:] *= 100
    student[4:] += 1e4
    positions = Positions(
        **{name: t.to(device) for name, t in vars(positions).items()} | {"targets": torch.zeros(6).long().to(device)}
    )
    student = student.to(device)
    gradient = torch.empty_like(student)
    losses = compute(student, student.clone(), positions, objective, gradient)
    assert losses.isfinite().all()
    assert losses[0].abs().max() < 1e-2 * objective.temperature**2
    assert gradient.isfinite().all()
    assert gradient[:, -20:].abs().max() == 0
    # Far teachers: the divergence is finite where the student's distribution covers the teacher's.
    teacher = student.flip(0).clone()
    losses = compute(student, teacher, positions, objective, gradient)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    if objective.divergence == "jsd":
        assert (losses[0] <= objective.temperature**2 * math.log(2) * positions.weights + 1e-5).all()


def test_rows_that_do_not_count_add_nothing_whatever_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_kernel, "TILE", 16)
    student, teacher, _ = (x.to(DEVICE) if isinstance(x, Tensor) else x for x in rows())
    student[0] = math.nan
    weights = torch.tensor([0.0, *[0.2] * 5], device=DEVICE)
    positions = Positions(targets=torch.zeros(6, dtype=torch.int64, device=DEVICE), weights=weights, target_weights=weights)
    gradient = torch.full_like(student, math.nan)
    losses = divergence_kernel.row_losses(student, teacher, positions, Objective(), gradient)
    assert losses[:, 0].tolist() == [0, 0]
    assert not gradient[0].any()
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def test_without_a_mask_all_positions_count_and_the_last_of_a_sequence_has_no_target() -> None:
    positions = Positions.of({"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])})
    assert positions.targets.tolist() == [2, 3, 0, 5, 6, 0]
    assert positions.weights.tolist() == pytest.approx([1 / 6] * 6)
    assert positions.target_weights.tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0]


def test_with_a_mask_those_before_a_marked_token_count() -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    positions = Positions.of({"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "loss_mask": mask})
    assert positions.weights.tolist() == positions.target_weights.tolist() == [0, 0.5, 0, 0.5, 0, 0]
    empty = Positions.of({"input_ids": torch.tensor([[1, 2, 3]]), "loss_mask": torch.tensor([[True, False, False]])})
    assert empty.weights.tolist() == empty.target_weights.tolist() == [0, 0, 0]


def test_metrics_are_at_temperature_1_whatever_is_minimized() -> None:
    student, teacher, positions = rows()
    found = row_metrics(student, teacher, positions, Objective(divergence="reverse_kl", temperature=3.0, cross_entropy=0.5))
    expected = by_definition(student, teacher, positions, Objective())
    assert found["kl"].sum().item() == pytest.approx(expected.item(), rel=1e-5)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).float()
    assert found["top1_agreement"].sum().item() == pytest.approx((positions.weights * agreement).sum().item())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"divergence": "kl"}, "loss.divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"temperature": 0.0}, "loss.temperature must be above 0 and finite, got 0.0"),
        ({"temperature": math.nan}, "loss.temperature must be above 0 and finite, got nan"),
        ({"cross_entropy": 1.0}, "loss.cross_entropy must be at least 0 and below 1, got 1.0"),
        ({"cross_entropy": -0.1}, "loss.cross_entropy must be at least 0 and below 1, got -0.1"),
    ],
)
def test_an_option_out_of_range_is_an_error_that_names_it(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**option)
