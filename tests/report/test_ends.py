"""Every run that ends has a report, and none ends otherwise for it."""

import json
from pathlib import Path

from running import REPORTED, launch

from nvfp4_train.report import write_report


def test_ptq_over_two_ranks_has_a_report(tmp_path: Path) -> None:
    options = ("trainer=fsdp2", "trainer.accelerator=cpu")
    output = launch(tmp_path, *options, ranks=2, script="ptq.py", small=REPORTED).stdout
    assert output.count("  report          ") == 1
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"].startswith(f"torchrun --standalone --nproc-per-node 2 launch/ptq.py run_dir={tmp_path} ")
    assert record["ranks"] == sum(record["devices"].values()) == 2
    assert record["parameters"] > record["quantized_parameters"] > 0.5 * record["parameters"]
    text = (tmp_path / "report.md").read_text()
    assert "Served as W4A16, without training in NVFP4, the loss on held-out text is " in text
    assert "| PTQ minus masters |" in text
    assert "The run took no training steps" in text
    assert "2 x " in text


def test_a_report_that_cannot_be_drawn_costs_a_line(tmp_path: Path) -> None:
    """Of a run that was not quantized before its end."""
    (tmp_path / "report.html").mkdir()
    options = ("quant.enabled=false", "trainer.max_steps=2", "callbacks.export=null", "callbacks.scale_stats=null")
    output = launch(tmp_path, *options, small=REPORTED).stdout
    (line,) = [line for line in output.splitlines() if line.startswith(("warning: no report (", "  report "))]
    assert line.startswith("warning: no report (DiskError: ")
    assert line.endswith(f"; python launch/report.py {tmp_path} tries again")
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "report.html").rmdir()
    text = write_report(tmp_path).read_text()
    assert "without training in NVFP4" in text
    assert f"python launch/export.py {tmp_path / 'checkpoints' / 'last.ckpt'} FOLDER" in text
    assert "No heat maps" in text
    assert "No statistics: callbacks.scale_stats is null" in text
