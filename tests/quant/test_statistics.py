import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvfp4_train.kernels import reference
from nvfp4_train.kernels.reference import E4M3_MIN
from nvfp4_train.metrics import SQNR_DB
from nvfp4_train.quant import local_weight
from nvfp4_train.quant.local_weight import LocalWeight, own_rows
from nvfp4_train.quant.statistics import BlockScales, GlobalAmax, Sqnr, Statistic, sum_over_ranks

STATISTICS: list[Statistic] = [GlobalAmax(), BlockScales(), Sqnr()]


def quantized(weight: Tensor, amax: Tensor | None = None) -> LocalWeight:
    """All rows of a weight [N, K], or of experts [E, N, K] with an s2 each; `amax` is by default their own."""
    experts = weight if weight.dim() == 3 else weight.unsqueeze(0)
    amax = experts.abs().amax((1, 2)) if amax is None else amax
    s2 = reference.global_scale(amax)
    parts = [torch.ops.nvfp4.quantize(expert, scale) for expert, scale in zip(experts, s2, strict=True)]
    return LocalWeight(
        name="layer.weight",
        slots=range(len(experts)),
        master=experts,
        codes=torch.stack([codes for codes, _ in parts]),
        block_scales=torch.stack([scales.view(torch.uint8) for _, scales in parts]).view(torch.float8_e4m3fn),
        global_amax=amax,
        global_scale=s2,
    )


def rows_of(weight: LocalWeight, rows: slice) -> LocalWeight:
    parts = {name: getattr(weight, name)[:, rows] for name in ("master", "codes", "block_scales")}
    return LocalWeight(
        name=weight.name,
        slots=weight.slots,
        global_amax=weight.global_amax,
        global_scale=weight.global_scale,
        **parts,
    )


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
    assert math.isnan(values["scale_max"])
    assert math.isnan(values["sqnr_db"])


@pytest.mark.parametrize("num_ranks", [2, 3, 40])
def test_sums_of_the_parts_are_the_sums_of_the_whole(num_ranks: int) -> None:
    whole = quantized(torch.stack([awkward(), awkward(seed=1)]))
    parts = [rows_of(whole, own_rows(33, rank, num_ranks)) for rank in range(num_ranks)]
    assert torch.equal(torch.cat([part.master for part in parts], dim=1), whole.master)
    for statistic in STATISTICS:
        assert statistic.finish(sum(map(statistic.local, parts))) == pytest.approx(
            statistic.finish(statistic.local(whole)), rel=1e-13
        )
    scales = BlockScales()
    assert torch.equal(sum(map(scales.local, parts)), scales.local(whole)), "counts have no rounding"


def test_experts_are_measured_under_their_own_scales() -> None:
    experts = torch.stack([awkward(), 100 * awkward(seed=1)])
    whole, apart = quantized(experts), [quantized(expert) for expert in experts]
    for statistic in (BlockScales(), Sqnr()):
        assert torch.allclose(statistic.local(whole), sum(map(statistic.local, apart)), rtol=1e-13, atol=0)
    assert GlobalAmax().finish(GlobalAmax().local(whole)) == {"global_amax": experts.abs().max().item()}


def test_aggregates_are_those_of_all_weights_as_one() -> None:
    """Under a common s2, so that there is such a tensor."""
    weights = [awkward(), awkward(12, seed=1), awkward(6, seed=2)]
    together = torch.cat(weights)
    amax = together.abs().max().reshape(1)
    _, tables = sum_over_ranks([quantized(weight, amax) for weight in weights], STATISTICS)
    for statistic, table in zip(STATISTICS, tables, strict=True):
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
    weight = quantized(torch.randn(128, 256))
    expected = [statistic.local(weight) for statistic in STATISTICS]
    assert len(list(weight.pieces())) == 1
    monkeypatch.setattr(local_weight, "PIECE", 1024)
    assert [piece.master.shape for piece in weight.pieces()] == [(1, 4, 256)] * 32
    with Largest() as largest:
        sums = [statistic.local(weight) for statistic in STATISTICS]
    # The magnitudes of the rows, on the CPU; the rest is by block, or float64 values of a piece.
    assert largest.num_bytes <= weight.master.nbytes
    for got, wanted in zip(sums, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-13, atol=0)


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
            assert torch.allclose(table.cpu(), statistic.local(weight), rtol=1e-13, atol=0)
