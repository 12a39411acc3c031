"""The wandb workspace: its sections, and that it is saved as wandb's own client saves one."""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from running import ROOT, forked_python, train_environment

from nvfp4_train.run.dashboard import QUANTIZER, STEP, listing, sections, sections_of, workspace

SECTIONS = [
    "Loss and KL", "Quantizer health", "Worst layers", "Heat maps: kinds of layers over depth", "Histograms", "Speed and memory",
]  # fmt: skip

VIEWS = {
    "lines": ("metrics", "Run History Line Plot"),
    "bars": ("metrics", "Bar Chart"),
    "images": ("mediaKeys", "Media Browser"),
}
"""By kind of panel, where wandb has its metrics, and what it calls it."""


def test_statistics_have_panels_together_or_of_their_own() -> None:
    layout = {section.name: section.panels for section in sections(["zero_share", "sqnr_db", "mine"], ["code"])}
    assert list(layout) == SECTIONS
    assert [(panel.title, panel.metrics) for panel in layout["Quantizer health"]] == [
        ("SQNR, dB", ("quant/sqnr_db",)),
        ("Underflow and zeros", ("quant/zero_share",)),
        ("mine", ("quant/mine",)),
    ]
    heat_maps = layout["Heat maps: kinds of layers over depth"]
    assert [panel.metrics for panel in heat_maps] == [("heat_maps/zero_share",), ("heat_maps/sqnr_db",), ("heat_maps/mine",)]
    assert [panel.metrics for panel in layout["Histograms"]] == [("histograms/code",), ("histograms/code_by_layer",)]
    placed = [name for names in QUANTIZER.values() for name in names]
    assert len(set(placed)) == len(placed)


def shown(*overrides: str) -> set[str]:
    layout = sections_of(ROOT, ["run_dir=x", *overrides])
    return {name for section in layout for panel in section.panels for name in panel.metrics}


def test_options_say_of_which_parts_a_loss_is_the_sum() -> None:
    of_parts = {"train/divergence", "train/hidden_error", "val/hidden_error"}
    assert not shown("loss=distillation") & of_parts
    assert of_parts <= shown("loss=distillation", "loss.hidden=1")


def test_options_say_which_statistics_there_are() -> None:
    of_scales = {"quant/scale_median", "heat_maps/scale_median", "histograms/scale_log2"}
    assert of_scales | {"quant/sqnr_db"} <= shown()
    assert shown("+callbacks.scale_stats.statistics={block_scales: null}") & (of_scales | {"quant/sqnr_db"}) == {
        "quant/sqnr_db"
    }
    assert not [
        name for name in shown("callbacks.scale_stats=null") if name.startswith(("quant/", "heat_maps/", "histograms/"))
    ]
    of_oscillation = {"quant/oscillating_share", "quant/frozen_share"}
    assert not shown() & of_oscillation
    assert shown("callbacks.oscillation.action=reset") & of_oscillation == {"quant/oscillating_share"}
    found = shown("callbacks.oscillation.action=freeze")
    assert of_oscillation <= found
    # No single layer has them.
    assert not [
        name for name in found if name.startswith("heat_maps/") and name.removeprefix("heat_maps/") in str(of_oscillation)
    ]
    with pytest.raises(ValueError, match=r"callbacks\.scale_stats\.every_n_step: no such option; did you mean every_n_steps\?"):
        sections_of(ROOT, ["run_dir=x", "+callbacks.scale_stats.every_n_step=3"])


# Of wandb-workspaces itself, where it is imported.
@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_the_workspace_has_the_panels_of_the_layout() -> None:
    layout = sections_of(ROOT, ["run_dir=x"])
    spec = json.loads(workspace(layout, "me", "models", "mine")._to_model().model_dump_json(by_alias=True, exclude_none=True))
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("me", "models", "mine")
    found = spec["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in found] == SECTIONS
    for ours, theirs in zip(layout, found, strict=True):
        assert theirs["isOpen"]
        assert (
            len(ours.panels)
            == len(theirs["panels"])
            <= theirs["flowConfig"]["columnsPerPage"] * theirs["flowConfig"]["rowsPerPage"]
        )
        for panel, of_wandb in zip(ours.panels, theirs["panels"], strict=True):
            config = of_wandb["config"]
            if panel.kind == "table":
                assert of_wandb["viewType"] == "Weave"
                assert json.dumps(config).count(json.dumps(panel.metrics[0])) == 1
                continue
            assert config["chartTitle"] == panel.title
            keys, view = VIEWS[panel.kind]
            assert (of_wandb["viewType"], config[keys]) == (view, list(panel.metrics))
            assert panel.kind != "lines" or config["xAxis"] == STEP


class Wandb(BaseHTTPRequestHandler):
    """As much of a wandb server as answers its client where it saves a workspace."""

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data: dict[str, Any] = {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if b"upsertView" in request:
            self.server.saved.append(json.loads(request)["variables"])  # type: ignore[attr-defined]
            data = {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200 if self.path == "/graphql" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    server.saved = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def dashboard(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python, of_server = forked_python()
    return subprocess.run(
        [python, str(ROOT / "launch" / "dashboard.py"), *arguments],
        capture_output=True, text=True, env=train_environment() | of_server | environment,
    )  # fmt: skip


def test_the_launcher_saves_the_layout(server: Any) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    result = dashboard("me/models", "--name", "mine", "run_dir=x", WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{url}/me/models?nw=abc\n"
    (saved,) = server.saved
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("me", "models", "mine")
    found = json.loads(saved["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in found] == SECTIONS


def test_a_dry_run_prints_the_layout() -> None:
    result = dashboard("me/models", "--dry-run", "+recipe=quickstart")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == listing(sections_of(ROOT, ["run_dir=x"])) + "\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["models"], "error: the first argument must be ENTITY/PROJECT, got 'models'"),
        (["me/models", "trainer=no"], "error: In 'train': Could not find 'trainer/no'"),
        (["me/models"], "error: No API key configured. Use `wandb login` to log in."),
    ],
)
def test_what_can_be_corrected_is_one_line(arguments: list[str], line: str, tmp_path: Any) -> None:
    result = dashboard(*arguments, HOME=str(tmp_path), WANDB_API_KEY="")
    assert result.returncode == 1
    assert result.stderr.startswith(line)
    assert len(result.stderr.splitlines()) == 1
