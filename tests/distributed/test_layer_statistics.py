"""One report whatever the layout: each rank measures its own rows, and only sums travel."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from ranks import run_ranks
from small_runs import StopAndSave, Tokens, make_module, make_trainer
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvfp4_train.callbacks.scale_stats import ScaleStats
from nvfp4_train.drawing import DRAWERS, Drawings
from nvfp4_train.kernels import reference
from nvfp4_train.layer_table import LAYERS_FILE, read_rows
from nvfp4_train.quant.input_statistics import InputClipping
from nvfp4_train.quant.local_weight import LocalWeight
from nvfp4_train.quant.statistics import Statistic, sum_over_ranks

# After these, masters are the same bits in every layout (test_world_sizes.py).
STEPS = 3
STATISTICS = {
    "zeros": {"_target_": f"{__name__}.ZeroCodes"},
    # Rows of which the ranks of every layout have some.
    "changes": {"_target_": "nvfp4_train.quant.changes.Changes", "rows": 3},
}
LAYERS = [
    f"model.layers.{layer}.{linear}"
    for layer in range(2)
    for linear in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


EVERYWHERE = [
    "global_amax", "global_scale_exponent", "scale_min", "scale_median", "scale_max", "scale_at_floor_share",
    "scale_below_floor_share", "scale_saturated_share", "other_scale_share", "underflow_share", "zero_share", "edge_share",
    "sqnr_db", "zero_code_share", "num_values",
]  # fmt: skip
"""Of every layer at a first look, whose inputs are not quantized."""
OF_CHANGES = ["flip_rate", "oscillation_rate", "change_ratio", "global_scale_changes"]


class ZeroCodes(Statistic):
    """What someone adds: the share of values that are zero when decoded, and how many values there are."""

    names = ("zero_code_share", "num_values")

    def local(self, weight: LocalWeight) -> Tensor:
        codes = reference.unpack(weight.codes) & 7
        return torch.stack([(codes == 0).sum(), (codes >= 0).sum()]).double()

    def finish(self, sums: Tensor) -> dict[str, float]:
        zero, num_values = sums.tolist()
        return {"zero_code_share": zero / num_values, "num_values": num_values}


class Unfit(ZeroCodes):
    names = ("a b/c", "a/b")


def scale_stats(**options: Any) -> ScaleStats:
    """As a config names it, with one line for the statistic that is added."""
    config = {
        "_target_": "nvfp4_train.callbacks.scale_stats.ScaleStats",
        "statistics": {"zeros": {"_target_": f"{ZeroCodes.__module__}.ZeroCodes"}},
    }
    return instantiate(config | options, _convert_="all")


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("quant/") for name in metrics):
            self.logged.append((step or 0, dict(metrics)))


class Sent(TorchDispatchMode):
    """Collectives, with the bytes of each one's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            num_bytes = sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.collectives.append((func._opname, num_bytes))
        return func(*args, **(kwargs or {}))


def run(
    how: str,
    *,
    sharding: dict[str, Any] | None = None,
    quant: dict[str, Any] | None = None,
    stats: dict[str, Any] | None = None,
    save: tuple[int, str] | None = None,
    resume: str | None = None,
    steps: int = STEPS,
) -> tuple[Any, Any, Recorder]:
    # Equalized masters have sums of gradients that depend on their order.
    module = make_module(**({"equalize": None} | (quant or {})))
    recorder, callback = Recorder(), scale_stats(**(stats or {}))
    trainer = make_trainer(
        how,
        sharding=sharding,
        callbacks=(callback, *([StopAndSave(*save)] if save else [])),
        logger=recorder,
        max_steps=steps,
        accumulate_grad_batches=8 // distributed.get_world_size(),
    )
    trainer.fit(module, Tokens(8 * steps), ckpt_path=resume, weights_only=True)
    return module, callback, recorder


def report(how: str, run_dir: str, **options: Any) -> dict[str, Any]:
    """The metrics of the end by name, those of layers by layer and name, the sums, and what travels for them.

    Each rank has a folder of its own, in which all but the first leave nothing.
    """
    folder = Path(run_dir) / str(distributed.get_rank())
    folder.mkdir(parents=True)
    # A look at each step, so that the last one knows what changed.
    stats = {"every_n_steps": 1, "statistics": STATISTICS, "run_dir": str(folder)}
    module, callback, recorder = run(how, stats=stats, **options)
    with Sent() as sent:
        names, tables = sum_over_ranks(module.store.local_weights(), callback.statistics)
    with Sent() as sent_for_a_master:
        module.store.master(module.store.names[0])
    values = {name: value for step, metrics in recorder.logged if step == STEPS for name, value in metrics.items()}
    file = folder / LAYERS_FILE
    rows = [row for row in read_rows(file) if row.step == STEPS] if file.exists() else []
    values |= {f"{row.layer}/{statistic}": value for row in rows for statistic, value in row.values.items()}
    return {
        "values": values,
        "names": names,
        "tables": tables,
        "sent": sent.collectives,
        "sent for a master": sent_for_a_master.collectives,
        "rows": [weight.master.shape[1] for weight in module.store.local_weights()],
        "expected": definitions(module) if how == "auto" else {},
    }


def definitions(module: Any) -> dict[str, float]:
    """The metrics by their definitions, from the whole weights of one device."""
    values: dict[str, float] = {}
    store = module.store
    powers = torch.zeros(2, dtype=torch.float64)
    for name in store.names:
        slot = store.slots(name)
        master, s2 = store.master(name), store.global_scale[slot]
        codes, block_scales = reference.quantize(master, s2)
        scales = block_scales.float()
        decoded = reference.dequantize(codes, block_scales, s2, torch.float32)
        power = torch.stack([master.double().square().sum(), (master.double() - decoded).square().sum()])
        powers += power
        of_layer = {
            "global_amax": store.global_amax[slot].max(),
            "scale_min": scales.min(),
            "scale_median": scales.median(),
            "scale_max": scales.max(),
            "scale_saturated_share": (scales == 448).double().mean(),
            "sqnr_db": 10 * torch.log10(power[0] / power[1]),
        }
        layer = name.removesuffix(".weight")
        values |= {f"{layer}/{statistic}": value.item() for statistic, value in of_layer.items()}
    values["quant/sqnr_db"] = (10 * torch.log10(powers[0] / powers[1])).item()
    values["quant/global_amax"] = store.global_amax.max().item()
    return values


KEYS = ("global_amax", "siblings", "global_scale", "block_scales", "codes", "sqnr", "changes", "inputs")

INPUTS_ALONE = dict.fromkeys(set(KEYS) - {"inputs"}) | {"zeros": None, "inputs": InputClipping(every=2)}

HSDP = {"sharding": {"replicate_size": 2}}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"how": "auto"}, "fsdp2": {"how": "fsdp2"}},
    2: {"ddp": {"how": "ddp"}, "fsdp2": {"how": "fsdp2"}, "as bf16": {"how": "fsdp2", "quant": {"gather": "bf16"}}},
    4: {
        "ddp": {"how": "ddp"},
        "hsdp": {"how": "fsdp2", **HSDP},
        "hsdp as bf16": {"how": "fsdp2", "quant": {"gather": "bf16"}, **HSDP},
    },
}


def reports(world_size: int, folder: str) -> dict[str, Any]:
    return {name: report(run_dir=f"{folder}/{world_size}/{name}", **options) for name, options in LAYOUTS[world_size].items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """By number of ranks and layout, one report per rank."""
    folder = str(tmp_path_factory.mktemp("reports"))
    runs = {world_size: run_ranks(world_size, reports, world_size, folder) for world_size in LAYOUTS}
    return {(size, name): [rank[name] for rank in ranks] for size, ranks in runs.items() for name in ranks[0]}


def test_one_device_reports_the_definitions(found: Any) -> None:
    (one,) = found[1, "one"]
    for name, value in one["expected"].items():
        assert one["values"][name] == pytest.approx(value, rel=1e-13), name


def test_every_layer_has_every_statistic(found: Any) -> None:
    of_all = [*EVERYWHERE, *OF_CHANGES]
    statistics = [*of_all, "sibling_amax_ratio"]
    expected = {f"{layer}/{statistic}" for layer in LAYERS for statistic in of_all}
    expected |= {f"{layer}/sibling_amax_ratio" for layer in LAYERS if not layer.endswith(("o_proj", "down_proj"))}
    for layout, (first, *others) in found.items():
        layers = {name.removesuffix(".weight") for name in first["names"]}
        assert len(layers) == len(first["names"]) == len(LAYERS), layout
        assert first["values"].keys() == expected | {f"quant/{statistic}" for statistic in statistics}, layout
        assert all(not other["values"] for other in others), "the first rank reports"
    (one,) = found[1, "one"]
    assert one["values"]["quant/num_values"] == sum(one["values"][f"{layer}/num_values"] for layer in LAYERS)
    assert 0 < one["values"]["quant/zero_code_share"] < 0.5


def test_every_layout_has_the_sums_of_one_device(found: Any) -> None:
    (one,) = found[1, "one"]
    for layout, ranks in found.items():
        for rank in ranks:
            by_name = dict(zip(rank["names"], zip(*rank["tables"], strict=True), strict=True))
            expected = dict(zip(one["names"], zip(*one["tables"], strict=True), strict=True))
            assert by_name.keys() == expected.keys()
            for name, (amax, siblings, exponent, scales, codes, powers, changes, _, zeros) in by_name.items():
                of_one = expected[name]
                assert torch.equal(amax, of_one[0]), (layout, name)
                # An entry for every rank.
                assert siblings.max() == of_one[1].max(), (layout, name)
                assert exponent[0] / exponent[1] == of_one[2][0], (layout, name)
                assert torch.equal(scales, of_one[3]), (layout, name)
                assert torch.equal(codes, of_one[4]), (layout, name)
                assert torch.allclose(powers, of_one[5], rtol=1e-13, atol=0), (layout, name)
                assert torch.equal(changes, of_one[6]), (layout, name)
                assert torch.equal(zeros, of_one[8]), (layout, name)


def test_every_layout_sees_the_same_changes(found: Any) -> None:
    (one,) = found[1, "one"]
    for layout, (first, *_) in found.items():
        for name in first["values"]:
            if name.endswith(tuple(OF_CHANGES)):
                assert first["values"][name] == pytest.approx(one["values"][name], rel=1e-12), (layout, name)
    values = {statistic: one["values"][f"quant/{statistic}"] for statistic in OF_CHANGES}
    assert 0 < values["oscillation_rate"] <= values["flip_rate"] < 0.5, values
    assert values["change_ratio"] > 0


def test_ranks_share_the_rows(found: Any) -> None:
    whole = found[1, "one"][0]["rows"]
    for (world_size, name), ranks in found.items():
        rows = torch.tensor([rank["rows"] for rank in ranks])
        assert rows.sum(0).tolist() == whole, name
        # All sizes of this model are multiples of 16.
        assert (rows * world_size == torch.tensor(whole)).all(), name


def test_one_collective_of_sums_is_all_that_travels(found: Any) -> None:
    """No master is gathered, which this would see."""
    entries = {"amax, exponent, SQNR": 1 + 2 + 2, "scales": 258, "codes": 19, "changes": 7, "inputs": 2, "zeros": 2}
    for (_, name), ranks in found.items():
        for rank in ranks:
            assert rank["sent"] == [("allreduce_", 8 * len(LAYERS) * (sum(entries.values()) + len(ranks)))], name
            if len(ranks) > 1 and name != "ddp":
                assert any(num_bytes >= 4 * 32 * 32 // len(ranks) for _, num_bytes in rank["sent for a master"])


def schedules(path: str) -> dict[str, dict[str, list[Any]]]:
    """Step and number of metrics of each report, and by step the rows of the table of layers."""
    runs: dict[str, dict[str, Any]] = {
        "every 2 of 4": {"stats": {"every_n_steps": 2}},
        "every 3 of 4": {"stats": {"every_n_steps": 3}},
        "from step 3 on": {"stats": {"every_n_steps": 1}, "quant": {"start_step": 3}},
        "without quantization": {"stats": {"every_n_steps": 1}, "quant": {"enabled": False}},
        "aggregates alone": {"stats": {"per_layer": False}},
        "fewer": {"stats": {"per_layer": False, "statistics": dict.fromkeys(set(KEYS) - {"sqnr"})}},
        "saved": {"stats": {"every_n_steps": 4}, "save": (2, path)},
        "resumed": {"stats": {"every_n_steps": 1}, "resume": path},
        "quantized inputs": {
            "stats": {"every_n_steps": 1, "per_layer": False, "statistics": INPUTS_ALONE},
            "quant": {"activations": "nvfp4"},
        },
        "from the last step": {"stats": {"every_n_steps": 100}, "resume": path, "steps": 2},
    }
    found = {}
    for name, options in runs.items():
        folder = Path(path).parent / name
        folder.mkdir()
        stats = options["stats"] | {"run_dir": str(folder)}
        logged = run("auto", **({"steps": 4} | options | {"stats": stats}))[2].logged
        file = folder / LAYERS_FILE
        found[name] = {
            "logged": [(step, len(metrics)) for step, metrics in logged],
            "rows": [(row.step, row.layer) for row in read_rows(file)] if file.exists() else [],
        }
    return found


def test_reports_come_when_they_are_due(tmp_path: Path) -> None:
    (found,) = run_ranks(1, schedules, f"{tmp_path}/saved.ckpt")
    both = len(EVERYWHERE) + 1
    later = both + len(OF_CHANGES)
    steps = {
        "every 2 of 4": [(2, both), (4, later)],
        "every 3 of 4": [(3, both), (4, later)],
        "from step 3 on": [(3, both), (4, later)],
        # The end quantizes, to say what that would cost.
        "without quantization": [(4, both)],
        # No checkpoint has the memory.
        "resumed": [(3, both), (4, later)],
        "from the last step": [(2, both)],
    }
    for name, of_reports in steps.items():
        assert found[name]["logged"] == of_reports, name
        assert found[name]["rows"] == [(step, layer) for step, _ in of_reports for layer in LAYERS], name
    assert found["aggregates alone"] == {"logged": [(4, both)], "rows": []}
    assert found["fewer"] == {"logged": [(4, 1)], "rows": []}
    assert found["quantized inputs"] == {"logged": [(1, 1), (3, 1)], "rows": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"draw_every": -1}, "draw_every must be at least 0, got -1"),
        ({"statistics": {"zeros": 3}}, r"statistics\.zeros must be null or a Statistic \(give its _target_\), got 3"),
        (
            {"statistics": {"zeros": ZeroCodes(), "again": ZeroCodes()}},
            "must have names of their own, got zero_code_share, num_values more than once",
        ),
        ({"statistics": {"codes": ZeroCodes(), "unfit": Unfit()}}, r"without / and spaces, got 'a b/c', 'a/b'$"),
        ({"statistics": dict.fromkeys(KEYS)}, "at least one, got none"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleStats(**options)


class Rare(Statistic):
    """Known at the first look alone."""

    names = ("rare",)
    looks = 0

    def local(self, weight: LocalWeight) -> Tensor:
        return torch.zeros(1, dtype=torch.float64)

    def finish(self, sums: Tensor) -> dict[str, float]:
        return {"rare": 0.5} if self.looks == 0 else {}


def drawings() -> list[tuple[int, set[str], set[str]]]:
    """Of each look of a run, its step, its pictures, and the columns of its tables."""
    rare, drawn = Rare(), []

    def drawer(logger: Logger, drawings: Drawings, step: int) -> None:
        rare.looks += 1
        drawn.append((step, set(drawings.images), {name for table in drawings.tables.values() for name in table.columns}))

    DRAWERS[Recorder] = drawer
    run("auto", stats={"every_n_steps": 1, "draw_every": 3, "statistics": {"rare": rare}}, steps=4)
    return drawn


def test_what_is_not_measured_at_each_look_is_drawn_as_it_was_last() -> None:
    (found,) = run_ranks(1, drawings)
    # The first look, the third and the last one.
    assert [(step, bool(images), bool(columns)) for step, images, columns in found] == [
        (step, step != 2, step != 2) for step in (1, 2, 3, 4)
    ]
    drawn = [(images, columns) for _, images, columns in found if images]
    assert all({"heat_maps/rare", "heat_maps/sqnr_db"} <= images and "rare" in columns for images, columns in drawn)
