import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvfp4_train.kernels import reference, statistics_reference
from nvfp4_train.kernels.reference import E2M1_VALUES, E4M3_MIN
from nvfp4_train.kernels.scale_rules import MAX_RULE, ScaleRule
from nvfp4_train.metrics import SQNR_DB
from nvfp4_train.quant import local_weight
from nvfp4_train.quant.local_weight import LocalWeight, own_rows
from nvfp4_train.quant.statistics import (
    BlockScales,
    Codes,
    GlobalAmax,
    GlobalScale,
    SiblingAmax,
    Sqnr,
    Statistic,
    sum_over_ranks,
)

STATISTICS: list[Statistic] = [GlobalAmax(), GlobalScale(), BlockScales(), Codes(), Sqnr()]


def quantized(
    weight: Tensor, amax: Tensor | None = None, *, rule: ScaleRule = MAX_RULE, has_siblings: bool = False
) -> LocalWeight:
    """All rows of a weight [N, K], or of experts [E, N, K] with an s2 each; `amax` is by default their own."""
    experts = weight if weight.dim() == 3 else weight.unsqueeze(0)
    amax = experts.abs().amax((1, 2)) if amax is None else amax
    s2 = reference.global_scale(amax, rule)
    parts = [torch.ops.nvfp4.quantize(expert, scale, rule.block_scale) for expert, scale in zip(experts, s2, strict=True)]
    return LocalWeight(
        name="layer.weight",
        slots=range(len(experts)),
        master=experts,
        codes=torch.stack([codes for codes, _ in parts]),
        block_scales=torch.stack([scales.view(torch.uint8) for _, scales in parts]).view(torch.float8_e4m3fn),
        global_amax=amax,
        global_scale=s2,
        has_siblings=has_siblings,
    )


def rows_of(weight: LocalWeight, rows: slice) -> LocalWeight:
    parts = {name: getattr(weight, name)[:, rows] for name in ("master", "codes", "block_scales")}
    return dataclasses.replace(weight, first_row=rows.start, **parts)


def found(weight: Tensor) -> dict[str, float]:
    weights = [quantized(weight)]
    _, tables = sum_over_ranks(weights, STATISTICS)
    return {
        name: value
        for statistic, table in zip(STATISTICS, tables, strict=True)
        for name, value in statistic.finish(table[0]).items()
    }


def awkward(num_rows: int = 33, columns: int = 80, seed: int = 0) -> Tensor:
    """Rows of very different magnitudes, down to zero: scales at both ends, and an odd number of blocks."""
    weight = torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= 2.0 ** -torch.arange(num_rows).unsqueeze(1)
    weight[-1] = 0
    return weight


def test_gaussian_weights_have_the_known_sqnr() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    values = found(weight)
    assert values["sqnr_db"] == pytest.approx(20.43, abs=0.05)
    assert values["global_amax"] == weight.abs().max().item()
    assert values["scale_min"] <= values["scale_median"] <= values["scale_max"] <= 448
    assert values["scale_at_floor_share"] == values["scale_below_floor_share"] == 0


def shares_of_elements(weight: Tensor, packed: Tensor, scales: Tensor, s2: Tensor) -> dict[str, float]:
    """Element by element."""
    codes = reference.unpack(packed).flatten().tolist()
    limits = reference.divide(reference.block_amax(weight), 24.0).repeat_interleave(16, -1).flatten().tolist()
    in_steps = (weight.abs() * (1 / (scales * s2)).repeat_interleave(16, -1)).flatten().tolist()
    values = weight.flatten().tolist()
    edges = [(a + b) / 2 for a, b in itertools.pairwise(E2M1_VALUES)]
    counts = {
        "underflow_share": sum(abs(w) < limit for w, limit in zip(values, limits, strict=True)),
        "zero_share": sum(w != 0 and code in (0, 8) for w, code in zip(values, codes, strict=True)),
        "edge_share": sum(any(0.99 <= quotient / edge <= 1.01 for edge in edges) for quotient in in_steps),
    }
    return {name: count / len(values) for name, count in counts.items()}


@pytest.mark.parametrize(
    "weight", [awkward(), awkward(34), awkward(7, 16), torch.ones(1, 16)], ids=["odd", "even", "few", "one"]
)
def test_values_are_those_of_the_definitions(weight: Tensor) -> None:
    """Computed from the scales and decoded values themselves."""
    amax = weight.abs().amax()
    s2 = reference.global_scale(amax)
    codes, block_scales = reference.quantize(weight, s2)
    scales = block_scales.float()
    unrounded = reference.divide(reference.block_amax(weight), 6.0) / s2
    signal = weight.double().square().sum()
    noise = (weight.double() - reference.dequantize(codes, block_scales, s2, torch.float32)).square().sum()
    expected = {
        "global_amax": amax.item(),
        "scale_min": scales.min().item(),
        "scale_median": scales.median().item(),
        "scale_max": scales.max().item(),
        "scale_at_floor_share": (scales == E4M3_MIN).double().mean().item(),
        "scale_below_floor_share": (unrounded < E4M3_MIN).double().mean().item(),
        "scale_saturated_share": (scales == 448).double().mean().item(),
        "other_scale_share": 0.0,
        "global_scale_exponent": s2.log2().item(),
        **shares_of_elements(weight, codes, scales, s2),
    }
    values = found(weight)
    assert values.pop("sqnr_db") == pytest.approx((10 * torch.log10(signal / noise)).item(), rel=1e-13)
    assert values == expected


def test_shares_count_blocks() -> None:
    weight = torch.zeros(4, 16)
    weight[0, 0] = 2688.0  # s2 = 1, block scale 448
    weight[1, 0] = 6 * E4M3_MIN
    weight[2, 0] = 6 * E4M3_MIN * (1 - 2**-23)
    values = found(weight)
    assert values["scale_saturated_share"] == 0.25
    assert values["scale_at_floor_share"] == 0.75
    assert values["scale_below_floor_share"] == 0.5


def test_a_lossless_weight_has_infinite_sqnr() -> None:
    assert math.isinf(found(torch.tensor([[6.0, -3.0, 1.5, 0.5] * 4]))["sqnr_db"])


def test_a_nan_is_reported_as_one() -> None:
    weight = torch.ones(2, 16)
    weight[1, 3] = torch.nan
    values = found(weight)
    assert math.isnan(values["global_amax"])
    assert math.isnan(values["scale_min"])
    assert math.isnan(values["scale_max"])
    assert math.isnan(values["sqnr_db"])


@pytest.mark.parametrize("num_ranks", [2, 3, 40])
def test_sums_of_the_parts_are_the_sums_of_the_whole(num_ranks: int) -> None:
    whole = quantized(torch.stack([awkward(), awkward(seed=1)]))
    parts = [rows_of(whole, own_rows(33, rank, num_ranks)) for rank in range(num_ranks)]
    assert torch.equal(torch.cat([part.master for part in parts], dim=1), whole.master)
    for statistic in (BlockScales(), Codes(), GlobalScale(), Sqnr()):
        assert statistic.finish(sum(map(statistic.local, parts))) == pytest.approx(
            statistic.finish(statistic.local(whole)), rel=1e-13
        )
    for counted in (BlockScales(), Codes()):
        assert torch.equal(sum(map(counted.local, parts)), counted.local(whole)), "counts have no rounding"


def test_experts_are_measured_under_their_own_scales() -> None:
    experts = torch.stack([awkward(), 100 * awkward(seed=1)])
    whole, apart = quantized(experts), [quantized(expert) for expert in experts]
    for statistic in (BlockScales(), Codes(), GlobalScale(), Sqnr()):
        assert torch.allclose(statistic.local(whole), sum(map(statistic.local, apart)), rtol=1e-13, atol=0)
    assert GlobalAmax().finish(GlobalAmax().local(whole)) == {"global_amax": experts.abs().max().item()}


def test_aggregates_are_those_of_all_weights_as_one() -> None:
    """Under a common s2, so that there is such a tensor."""
    weights = [awkward(), awkward(12, seed=1), awkward(6, seed=2)]
    together = torch.cat(weights)
    amax = together.abs().max().reshape(1)
    _, tables = sum_over_ranks([quantized(weight, amax) for weight in weights], STATISTICS)
    for statistic, table in zip(STATISTICS, tables, strict=True):
        if isinstance(statistic, GlobalScale):
            continue
        expected = statistic.finish(statistic.local(quantized(together, amax)))
        assert statistic.aggregate(table) == pytest.approx(expected, rel=1e-13)


def test_the_largest_amax_of_the_layers_is_their_aggregate() -> None:
    _, (table,) = sum_over_ranks([quantized(awkward()), quantized(2 * awkward())], [GlobalAmax()])
    assert GlobalAmax().aggregate(table) == {"global_amax": 2 * awkward().abs().max().item()}


def test_the_histogram_has_every_block_in_the_bin_of_its_scale() -> None:
    weight = quantized(awkward())
    histogram = BlockScales().histograms(BlockScales().local(weight))["scale_log2"]
    counts, edges = (part.tolist() for part in histogram)
    assert len(edges) == len(counts) + 1
    assert sorted(edges) == edges
    values = weight.block_scales.double().log2().flatten().tolist()
    assert counts == [sum(low <= value < high for value in values) for low, high in zip(edges, edges[1:], strict=False)]
    assert sum(counts) == len(values)


def test_the_metric_that_others_read_has_the_statistics_name() -> None:
    assert SQNR_DB == f"quant/{Sqnr.names[0]}" == "quant/sqnr_db"


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operation gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(output.alias_info for output in func._schema.returns):
            tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            self.num_bytes = max([self.num_bytes, *(tensor.nbytes for tensor in tensors)])
        return result


def test_intermediates_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 256)
    expected = quantized(weight).measured.sums
    monkeypatch.setattr(statistics_reference, "ELEMENTS_AT_ONCE", 1024)
    again = quantized(weight)
    with Largest() as largest:
        sums = [statistic.local(again) for statistic in STATISTICS]
    # The magnitudes of the rows, for their amax; the rest is of a piece, of up to 8 bytes an element.
    assert largest.num_bytes <= again.master.nbytes
    assert torch.allclose(again.measured.sums, expected, rtol=1e-13, atol=0)
    assert sum(map(len, sums)) < 300


def test_pieces_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = dataclasses.replace(quantized(torch.stack([awkward(), awkward(seed=1)])), first_row=5)
    monkeypatch.setattr(local_weight, "PIECE", 1024)
    pieces = list(weight.pieces())
    assert [piece.first_row for piece in pieces] == [5, 17, 29] * 2
    masters = torch.cat([piece.master[0] for piece in pieces]).view(weight.master.shape)
    assert torch.equal(masters, weight.master)


def test_a_weight_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Calls(TorchDispatchMode):
        num_calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num_calls += func.namespace == "nvfp4"
            return func(*args, **(kwargs or {}))

    weight = quantized(awkward(), has_siblings=True)
    with Calls() as calls:
        for statistic in (*STATISTICS, SiblingAmax()):
            statistic.local(weight)
    assert calls.num_calls == 1


def different_weights() -> list[LocalWeight]:
    """Siblings, zeros, experts, and what ranks have that own no rows of a linear or no expert."""
    amax = 2 * awkward().abs().max().reshape(1)
    linear, experts = quantized(awkward(), amax, has_siblings=True), quantized(torch.stack([awkward(), awkward(seed=1)]))
    empty = {name: getattr(experts, name)[:0] for name in ("master", "codes", "block_scales", "global_scale")}
    return [
        linear,
        quantized(torch.zeros(2, 16), has_siblings=True),
        experts,
        quantized(awkward()),
        rows_of(linear, slice(33, None)),
        dataclasses.replace(experts, slots=range(0), **empty),
    ]


def test_all_weights_at_once_have_the_sums_of_each() -> None:
    statistics = [*STATISTICS, SiblingAmax()]
    _, tables = sum_over_ranks(different_weights(), statistics)
    for statistic, table in zip(statistics, tables, strict=True):
        for weight, sums in zip(different_weights(), table, strict=True):
            assert torch.equal(statistic.local(weight).nan_to_num(-1), sums.nan_to_num(-1)), type(statistic)
    assert tables[0].flatten().tolist() == [weight.global_amax.max().item() for weight in different_weights()]


def test_more_weights_take_no_more_operations() -> None:
    """Beside the passes over them, and views."""

    class Operations(TorchDispatchMode):
        num_operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            is_view = any(output.alias_info for output in func._schema.returns)
            self.num_operations += func.namespace != "nvfp4" and not is_view
            return func(*args, **(kwargs or {}))

    def count(num_weights: int) -> int:
        weights = [quantized(awkward(), has_siblings=True) for _ in range(num_weights)]
        with Operations() as operations:
            sum_over_ranks(weights, [*STATISTICS, SiblingAmax()])
        return operations.num_operations

    assert 0 < count(1) == count(5) < 20


@pytest.mark.parametrize("signal", [0.0, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("noise", [0.0, 3.0, math.inf, math.nan])
def test_quotients_are_those_of_tensors(signal: float, noise: float) -> None:
    sums = torch.tensor([signal, noise], dtype=torch.float64)
    of_tensors = {"sqnr_db": 10 * (sums[0] / sums[1]).log10(), "global_scale_exponent": sums[0] / sums[1]}
    expected = {name: value.item() for name, value in of_tensors.items()}
    assert Sqnr().finish(sums) | GlobalScale().finish(sums) == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_the_smallest_sibling_tells_how_much_range_is_lost() -> None:
    weight = torch.randn(8, 32)
    amax = weight.abs().max()
    members = [quantized(part * weight, amax.reshape(1), has_siblings=True) for part in (1.0, 0.25, 0.0)]
    alone = quantized(weight)
    _, (table,) = sum_over_ranks([*members, alone], [SiblingAmax()])
    found = [SiblingAmax().finish(sums) for sums in table]
    assert found == [{"sibling_amax_ratio": ratio} for ratio in (1.0, 0.25, 0.0)] + [{}]
    assert SiblingAmax().aggregate(table) == {"sibling_amax_ratio": 0.0}
    zeros = quantized(torch.zeros(2, 16), has_siblings=True)
    assert SiblingAmax().finish(SiblingAmax().local(zeros)) == {}, "0 / 0"


def test_exponents_of_exact_scales_are_fractions() -> None:
    experts = torch.stack([awkward(), 100 * awkward(seed=1)])
    for rule in (MAX_RULE, ScaleRule(global_scale="exact")):
        weight = quantized(experts, rule=rule)
        expected = weight.global_scale.double().log2()
        found = GlobalScale().finish(GlobalScale().local(weight))["global_scale_exponent"]
        assert found == pytest.approx(expected.mean().item(), abs=1e-12)
        assert found.is_integer() == (rule.is_pow2 and expected.mean().item().is_integer())
        assert expected.frac().any() == (not rule.is_pow2)
        _, (table,) = sum_over_ranks([weight, quantized(awkward(), rule=rule)], [GlobalScale()])
        of_layers = [GlobalScale().finish(sums)["global_scale_exponent"] for sums in table]
        assert GlobalScale().aggregate(table)["global_scale_exponent"] == pytest.approx(sum(of_layers) / 2, abs=1e-12)


def test_blocks_of_another_scale_are_those_where_the_rule_chose_so() -> None:
    weight, rule = torch.randn(64, 128), ScaleRule(block_scale="four_over_six")
    found = quantized(weight, rule=rule)
    s2 = found.global_scale
    by_max_rule = reference.block_scales(weight, s2, MAX_RULE)
    expected = (found.block_scales[0].float() != by_max_rule).double().mean().item()
    assert BlockScales().finish(BlockScales().local(found))["other_scale_share"] == expected
    assert 0.1 < expected < 0.9


def test_the_histogram_of_codes_has_every_element_in_the_bin_of_its_value() -> None:
    weight = quantized(awkward())
    counts, edges = (part.tolist() for part in Codes().histograms(Codes().local(weight))["code"])
    assert len(edges) == len(counts) + 1
    assert sorted(edges) == edges
    values = reference.decode(reference.unpack(weight.codes), torch.ones(weight.block_scales.shape)).flatten().tolist()
    assert counts == [sum(low <= value < high for value in values) for low, high in itertools.pairwise(edges)]
    assert sum(counts) == len(values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_on_a_gpu_are_those_of_the_cpu_and_wait_for_nothing() -> None:
    weights = [quantized(awkward()), quantized(torch.stack([awkward(seed=1), awkward(seed=2)]))]
    on_gpu = [quantized(weight.master.cuda()) for weight in weights]
    # The second time, kernels are compiled.
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sums = [[statistic.local(weight) for statistic in STATISTICS] for weight in on_gpu]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for weight, got in zip(weights, sums, strict=True):
        for statistic, table in zip(STATISTICS, got, strict=True):
            assert torch.allclose(table.cpu(), statistic.local(weight), rtol=1e-6, atol=0)
