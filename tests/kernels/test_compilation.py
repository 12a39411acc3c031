"""Without a GPU: every kernel compiles for every architecture, spills nothing, moves its stream in 16-byte accesses."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

CAPABILITIES = (80, 89, 90, 100, 120)


@functools.cache
def _compiled() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = pathlib.Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), *map(str, CAPABILITIES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability):
    kernels = [entry for entry in _compiled() if entry["capability"] == capability]
    assert len(kernels) == 12
    for entry in kernels:
        assert entry["stack"] == 0, entry
        assert entry["local"] == 0, entry
        assert entry["registers"] <= 128, entry


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_streams_move_in_16_byte_accesses(capability):
    """The larger stream of each kernel: what it reads, and what it writes unless that is packed codes."""
    for entry in _compiled():
        if entry["capability"] != capability or entry["kernel"] in ("static_scales", "max"):
            continue
        if not entry["kernel"].startswith("dequantize"):
            assert entry["LDG"].get("128", 0) > 0, entry
        if "fake_quant" in entry["kernel"] or entry["kernel"].startswith("dequantize"):
            assert set(entry["STG"]) == {"128"}, entry
