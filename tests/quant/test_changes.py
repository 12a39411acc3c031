"""Flips, oscillations and moved distances, on sequences of weights whose answers are known."""

import dataclasses

import pytest
import torch
from test_statistics import awkward, quantized, rows_of
from torch import Tensor

from nvfp4_train.kernels import reference
from nvfp4_train.quant.changes import Changes
from nvfp4_train.quant.local_weight import LocalWeight, own_rows


def looks(changes: Changes, weights: list[LocalWeight]) -> list[dict[str, float]]:
    return [changes.finish(changes.local(weight)) for weight in weights]


def of_values(values: list[float]) -> LocalWeight:
    """One block under s2 = 1 and the block scale 1, so that values are in units of the grid."""
    assert max(values) == 6.0
    return quantized(torch.tensor([[*values, *[0.0] * (16 - len(values))]]), torch.tensor([2688.0]))


def test_the_first_look_has_nothing_to_compare() -> None:
    changes = Changes()
    assert looks(changes, [quantized(awkward())] * 2) == [
        {},
        {"flip_rate": 0.0, "oscillation_rate": 0.0, "global_scale_changes": 0.0},
    ]


def test_flips_oscillations_and_distances_are_those_of_the_sequence() -> None:
    # The second value flips up, back and up again; the third moves on and on; the fourth stays near.
    sequence = [[6.0, 1.0, 0.5, 1.5], [6.0, 1.3, 1.0, 1.6], [6.0, 1.2, 1.5, 1.4], [6.0, 1.3, 2.0, 1.4]]
    decoded = [[1.0, 0.5, 1.5], [1.5, 1.0, 1.5], [1.0, 1.5, 1.5], [1.5, 2.0, 1.5]]
    first, *found = looks(Changes(rows=1), [of_values(values) for values in sequence])
    assert first == {}
    for index, values in enumerate(found):
        assert values["flip_rate"] == 2 / 16
        assert values["oscillation_rate"] == (0 if index == 0 else 1) / 16
        of_quantized = sum(abs(a - b) for a, b in zip(decoded[index], decoded[index + 1], strict=True))
        of_master = sum(abs(a - b) for a, b in zip(sequence[index], sequence[index + 1], strict=True))
        assert values["change_ratio"] == pytest.approx(of_quantized / of_master, rel=1e-6)


def test_a_new_window_forgets_earlier_flips() -> None:
    up_and_down = [of_values([6.0, value]) for value in (1.0, 1.5) * 5]
    found = [values.get("oscillation_rate") for values in looks(Changes(rows=1, window=4), up_and_down)]
    # Looks 0 to 3, 4 to 7, 8 and 9: the first flip of each has none before it.
    assert found == [None, 0, 1 / 16, 1 / 16, 0, 1 / 16, 1 / 16, 1 / 16, 0, 1 / 16]


def test_zeros_of_either_sign_are_one_value() -> None:
    found = looks(Changes(rows=1), [of_values([6.0, value]) for value in (0.1, -0.1, 0.1, -1.0, 0.1, -0.1)])
    assert [values["flip_rate"] * 16 for values in found[1:]] == [0, 0, 1, 1, 0]
    assert [values["oscillation_rate"] * 16 for values in found[1:]] == [0, 0, 0, 1, 0]


def test_a_change_of_the_global_scale_is_counted() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    found = looks(Changes(rows=1), [quantized(factor * weight) for factor in (1.0, 2.0, 2.0)])
    assert [values["global_scale_changes"] for values in found[1:]] == [1.0, 0.0]
    assert found[1]["flip_rate"] == 0, "powers of two change no code"
    assert found[1]["change_ratio"] == pytest.approx(1, abs=0.1)
    experts = torch.stack([weight, 3 * weight])
    changes = Changes(rows=1)
    found = looks(changes, [quantized(experts), quantized(experts * torch.tensor([1.0, 4.0]).view(2, 1, 1))])
    assert found[1]["global_scale_changes"] == 0.5


def test_what_moves_without_the_masters_has_an_infinite_ratio() -> None:
    weight = quantized(awkward())
    moved = dataclasses.replace(weight, codes=weight.codes ^ 1)
    assert looks(Changes(rows=1), [weight, moved])[1]["change_ratio"] == float("inf")


def brute_force(weights: list[LocalWeight], rows: int, window: int) -> list[tuple[int, int]]:
    """Flips and oscillations of every look but the first, element by element."""
    counts, history = [], {}
    values = [
        reference.decode(reference.unpack(weight.codes), torch.ones(weight.block_scales.shape))[:, ::rows].flatten().tolist()
        for weight in weights
    ]
    for look in range(1, len(values)):
        if look % window == 0:
            history = {}
        flips = oscillations = 0
        for index, (now, last) in enumerate(zip(values[look], values[look - 1], strict=True)):
            if now != last:
                flips += 1
                oscillations += history.get(index) == now
                history[index] = last
        counts.append((flips, oscillations))
    return counts


def random_walk(num_looks: int, shape: tuple[int, ...] = (2, 7, 48)) -> list[LocalWeight]:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    return [quantized(weight + 0.3 * torch.randn(shape)) for _ in range(num_looks)]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_counts_are_those_of_brute_force(rows: int) -> None:
    walk, changes = random_walk(9), Changes(rows=rows, window=4)
    tables = [changes.local(weight) for weight in walk]
    assert [(int(table[0]), int(table[1])) for table in tables[1:]] == brute_force(walk, rows, 4)
    assert all(table[4] == 2 * -(-7 // rows) * 48 for table in tables[1:])


@pytest.mark.parametrize("num_ranks", [2, 3, 9])
def test_the_sample_is_the_same_whatever_the_sharding(num_ranks: int) -> None:
    walk = random_walk(4)
    whole = Changes(rows=3)
    ranks = [Changes(rows=3) for _ in range(num_ranks)]
    for weight in walk:
        parts = []
        for rank, changes in enumerate(ranks):
            own = own_rows(7, rank, num_ranks)
            parts.append(changes.local(rows_of(weight, own)))
        together, expected = sum(parts), whole.local(weight)
        assert torch.equal(together[[0, 1, 4, 5, 6]], expected[[0, 1, 4, 5, 6]]), "counts have no rounding"
        assert torch.allclose(together, expected, rtol=1e-13, atol=0)


def test_memory_is_bounded_and_what_the_plan_counts() -> None:
    shapes = [(2, 100, 256), (1, 33, 512), (4, 16, 128)]
    changes, planned, num_weights = Changes(), 0.0, 0
    for index, shape in enumerate(shapes):
        weight = dataclasses.replace(quantized(torch.randn(shape)), name=f"{index}.weight")
        changes.local(weight)
        planned += changes.bytes_kept(shape if len(weight.slots) > 1 else shape[1:], shape[1])
        num_weights += weight.master.numel()
    held: list[Tensor] = [tensor for last in changes._last.values() for tensor in last.kept]
    kept = sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert kept - 4 * sum(shape[0] for shape in shapes) == planned, "but for s2"
    # 33 and 100 rows are no multiple of 16.
    assert kept / num_weights < 0.5
    assert Changes(rows=16).bytes_kept((4096, 4096), 4096) / 4096**2 == pytest.approx(0.3164, abs=1e-4)


def test_replaced_rows_begin_anew() -> None:
    changes, walk = Changes(rows=1), random_walk(2)
    assert looks(changes, [*walk, rows_of(walk[0], slice(0, 3))])[2] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": 0}, "rows must be at least 1, .* got 0"), ({"window": 1}, "window must be at least 2 looks, .* got 1")],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Changes(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_changes_on_a_gpu_are_those_of_the_cpu_and_wait_for_nothing() -> None:
    walk = random_walk(6, (2, 70, 256))
    on_gpu = [quantized(weight.master.cuda()) for weight in walk]
    of_cpu, of_gpu = Changes(rows=3, window=3), Changes(rows=3, window=3)
    for look, (weight, on_device) in enumerate(zip(walk, on_gpu, strict=True)):
        # At the second look kernels are compiled.
        torch.cuda.set_sync_debug_mode("error" if look > 1 else "default")
        try:
            found = of_gpu.local(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = of_cpu.local(weight)
        assert torch.equal(found.cpu()[[0, 1, 4, 5, 6]], expected[[0, 1, 4, 5, 6]])
        assert torch.allclose(found.cpu(), expected, rtol=1e-6, atol=0)


def test_the_walk_of_the_tests_oscillates() -> None:
    assert all(oscillations > 10 for _, oscillations in brute_force(random_walk(4), 1, 10)[1:])
