"""Without a GPU: every kernel compiles for every architecture, spills nothing, moves its stream in 16-byte accesses."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

CAPABILITIES = (80, 89, 90, 100, 120)
PROCESSES = ((80, 89, 90), (100, 120))


@functools.cache
def _compiled() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(pathlib.Path(__file__).with_name("compile_kernels.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, *map(str, capabilities)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capabilities in PROCESSES
    ]
    entries = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        entries += [json.loads(line) for line in output.splitlines()]
    return entries


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability):
    kernels = [entry for entry in _compiled() if entry["capability"] == capability]
    assert len(kernels) == 16
    for entry in kernels:
        assert entry["stack"] == 0, entry
        assert entry["local"] == 0, entry
        assert entry["registers"] <= 96, entry


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_streams_move_in_16_byte_accesses(capability):
    """All that is read but packed codes and tables; all that is written but packed codes, scales and amax."""
    for entry in _compiled():
        name = entry["kernel"]
        if entry["capability"] != capability or name in ("static_scales", "max"):
            continue
        if not name.startswith("dequantize"):
            assert entry["LDG"].get("128", 0) >= 2, entry
        if "fake_quant" in name or name.startswith("dequantize") or name in ("whole_model_to_bf16", "whole_model_moved"):
            assert set(entry["STG"]) == {"128"}, entry
        if name.startswith("quantize") or name == "whole_model_to_codes":
            assert set(entry["STG"]) == {"64", "U8"}, entry
