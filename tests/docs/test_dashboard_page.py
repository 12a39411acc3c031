"""docs/dashboard.md has a row for every statistic, and its table of known distributions is what the kernels give."""

import re

import pytest
import torch
from pages import DOCS

from nvfp4_train.callbacks.scale_stats import ScaleStats
from nvfp4_train.kernels.fp4_kernel import nvfp4_block_amax, nvfp4_global_scale, nvfp4_quantize
from nvfp4_train.kernels.reference import BLOCK_SIZE
from nvfp4_train.kernels.scale_rules import ScaleRule

PAGE = (DOCS / "dashboard.md").read_text()
EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where codes of E2M1 change."""
DISTRIBUTIONS = {"Gaussian": torch.distributions.Normal(0.0, 0.02), "Laplace": torch.distributions.Laplace(0.0, 0.02)}


def rows_of(header: str) -> list[list[str]]:
    """The cells of the rows of every table whose header begins so."""
    tables = re.findall(rf"^\| {re.escape(header)} \|.*\n\| --- .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for table in tables for line in table.splitlines()]


def test_every_statistic_has_one_row() -> None:
    named = [name for row in rows_of("name") for name in re.findall("`(.*?)`", row[0])]
    logged = [name for statistic in ScaleStats().statistics for name in statistic.names]
    assert set(logged) <= set(named)
    assert len(named) == len(set(named))
    assert all(len(row) in (3, 4) and all(row) for row in rows_of("name"))


@pytest.mark.parametrize("row", rows_of("weights"), ids=lambda row: f"{row[0]} {row[1]}")
def test_known_distributions_give_the_values_of_the_table(row: list[str]) -> None:
    distribution, rule = row[0], ScaleRule(block_scale=row[1].strip("`"))
    torch.manual_seed(0)
    w = DISTRIBUTIONS[distribution].sample((128, 1024))
    s2 = nvfp4_global_scale(w.abs().max(), rule)
    packed, scales = nvfp4_quantize(w, s2, rule)
    codes = torch.stack((packed & 7, (packed >> 4) & 7), -1).flatten(-2).long()
    amax = nvfp4_block_amax(w)
    scale = (scales.float() * s2).repeat_interleave(BLOCK_SIZE, -1)
    magnitude = w.abs()
    decoded = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))[codes] * scale
    is_near = torch.stack([(magnitude / scale - edge).abs() <= 0.01 * edge for edge in EDGES]).any(0)
    found = (
        10 * (magnitude.square().sum() / (magnitude - decoded).square().sum()).log10(),
        (magnitude < (amax / 24).repeat_interleave(BLOCK_SIZE, -1)).float().mean(),
        (codes == 0).float().mean(),
        (scales.float() != (amax / 6 / s2).to(torch.float8_e4m3fn).float()).float().mean(),
        is_near.float().mean(),
    )
    for cell, value, tolerance in zip(row[2:], found, (0.1, 0.003, 0.003, 0.02, 0.006), strict=True):
        assert float(cell) == pytest.approx(value.item(), abs=tolerance)


def test_the_ranges_end_where_hints_begin() -> None:
    from nvfp4_train import worst_layers

    rows = {name: row for row in rows_of("name") for name in re.findall("`(.*?)`", row[0])}
    begins = {
        "sqnr_db": worst_layers.BELOW_ITS_KIND,
        "input_clipped_share": worst_layers.CLIPPED,
        "scale_at_floor_share": worst_layers.AT_FLOOR,
        "sibling_amax_ratio": worst_layers.SMALL_AMONG_SIBLINGS,
        "oscillation_rate": worst_layers.OSCILLATING,
        "flip_rate": worst_layers.FLIPPING,
    }
    for name, value in begins.items():
        assert re.search(rf"(?<![\d.]){value:g}(?![\d.]\d)", " ".join(rows[name][2:])), name


def test_there_is_a_row_for_each_rule_that_needs_no_data() -> None:
    assert {(row[0], row[1]) for row in rows_of("weights")} == {
        (name, f"`{rule}`") for name in DISTRIBUTIONS for rule in ("max", "four_over_six", "mse")
    }
