"""Without a GPU: the divergence kernel compiles for every architecture, spills nothing, and moves 16 bytes at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

CAPABILITIES = ("80", "89", "90", "100", "120")
REGISTERS = {"forward_kl": 64, "capped": 64, "reverse_kl": 80, "jsd": 80, "mix": 80}
"""At most 64 let four programs of eight warps share a multiprocessor, which the default objective needs for one wave of a chunk."""


def test_the_kernel_compiles_without_spills_and_in_wide_accesses() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_divergence.py")
    result = subprocess.run([sys.executable, script, *CAPABILITIES], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    assert {entry["objective"] for entry in entries} == REGISTERS.keys()
    assert {str(entry["capability"]) for entry in entries} == set(CAPABILITIES)
    for entry in entries:
        assert entry["stack"] == entry["local"] == 0, entry
        assert entry["registers"] <= REGISTERS[entry["objective"]], entry
        # A row has single values: two weights, its target and the logit of that, and two losses in either of two places.
        assert entry["LDG"].keys() <= {"128", "64", "32"}, entry
        assert entry["LDG"].get("64", 0) + entry["LDG"]["32"] <= 4, entry
        assert entry["STG"].keys() == {"128", "32"}, entry
        assert entry["STG"]["32"] == 4, entry
