"""Heat maps and the table of worst layers, from statistics by layer and name."""

import math

import numpy as np
import torch

from nvfp4_train.layer_pictures import heat_maps, histograms_by_layer, worst_table

ROWS = {
    "model.layers.0.self_attn.q_proj": {"sqnr_db": 20.0, "global_amax": 1.0},
    "model.layers.0.mlp.experts.0.w1": {"sqnr_db": 18.0},
    "model.layers.0.mlp.experts.1.w1": {"sqnr_db": 19.0},
    "model.layers.10.self_attn.q_proj": {"sqnr_db": math.inf, "zero_share": math.nan},
    "model.layers.2.self_attn.q_proj": {"sqnr_db": 21.0},
    "model.projector": {"sqnr_db": 17.0},
}


def test_a_heat_map_has_a_row_for_each_kind_and_a_column_for_each_depth() -> None:
    figures = dict(heat_maps(ROWS))
    assert figures.keys() == {"sqnr_db", "global_amax"}, "one without a finite value has nothing to show"
    axes = figures["sqnr_db"].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["self_attn.q_proj", "mlp.experts.*.w1", "model.projector"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2", "other"]
    shown = axes.images[0].get_array().filled(math.nan)
    missing = math.nan
    expected = [[20, 21, missing], [18.5, missing, missing], [missing, missing, 17]]
    assert np.array_equal(shown, expected, equal_nan=True)


def test_histograms_of_layers_are_rows_by_kind_and_depth() -> None:
    edges = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    counts = {
        "model.layers.10.mlp.up_proj": [0, 2, 2, 0],
        "model.layers.0.self_attn.q_proj": [0, 1, 3, 0],
        "model.layers.2.mlp.up_proj": [0, 4, 0, 0],
        "model.projector": [0, 0, 0, 0],
    }
    histograms = {layer: (torch.tensor(found, dtype=torch.float64), edges) for layer, found in counts.items()}
    axes = histograms_by_layer("code", histograms).axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["mlp.up_proj 2", "mlp.up_proj 10", "self_attn.q_proj 0", "model.projector other"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"], "bins that no layer uses are left out"
    assert axes.images[0].get_array().tolist() == [[1, 0], [0.5, 0.5], [0.25, 0.75], [0, 0]]


def test_many_rows_have_no_numbers_and_some_of_their_names() -> None:
    edges = torch.arange(4, dtype=torch.float64)
    histograms = {f"model.layers.{at}.mlp.up_proj": (torch.ones(3, dtype=torch.float64), edges) for at in range(100)}
    axes = histograms_by_layer("code", histograms).axes[0]
    assert not axes.texts
    assert len(axes.get_yticklabels()) == 25


def test_the_table_has_all_that_is_known_of_the_worst_layers() -> None:
    columns, rows = worst_table(ROWS)
    assert columns == ["layer", "depth", "kind", "sqnr_db", "hint", "global_amax", "zero_share"]
    assert [row[:4] for row in rows[:2]] == [
        ["model.projector", None, "model.projector", 17.0],
        ["model.layers.0.mlp.experts.0.w1", 0, "mlp.experts.*.w1", 18.0],
    ]
    assert all(isinstance(row[4], str) for row in rows)
    assert [row[5] for row in rows] == [None, None, None, 1.0, None, None]
