"""How fast an exported folder is verified, against how fast its files are read, by number of threads.

python benchmarks/verify.py [--layers 8] [--folder DIR]

A random Llama with matrices of 2048 x 8192 is exported once. What is timed is the check of the folder against the expected weights,
which are in memory, and the reading of the same files in as many threads: from the disk ("cold"), and from the memory in which the
system keeps them ("warm"). The ratio is that of the times to verify, and to read from the disk.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nvfp4_train import parallel
from nvfp4_train.export import export_model, verify_export
from nvfp4_train.export.masters import FromMasters
from nvfp4_train.models.layout import HubLayout
from nvfp4_train.quant.policy import QuantConfig, select

PIECE = 1 << 24


def best(function: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read(files: list[Path]) -> None:
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, PIECE)]
    for _ in parallel.in_threads(lambda piece: np.fromfile(piece[0], np.uint8, PIECE, offset=piece[1]).size, pieces):
        pass


def forget(files: list[Path]) -> None:
    """Let the system keep nothing of the files in memory."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to read from; default: a temporary folder")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    manifest = select(model, QuantConfig(), HubLayout(config)).manifest
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        served = FromMasters(dict(model.state_dict()), manifest, config)
        report = export_model(Path(folder) / "out", served).verified
        expected = {name: served[name] for name in served}
        files = sorted((Path(folder) / "out").glob("*.safetensors"))
        cores = parallel.usable_cores()
        print(
            f"{platform.processor() or platform.machine()}, {cores} cores; NumPy {np.__version__}, Python {platform.python_version()}"
        )
        print(f"{report.bytes / 1e6:,.0f} MB, {report.quantized_parameters:,} quantized parameters")
        print(
            "\n| threads | verified, M elements/s | MB/s | read cold, MB/s | read warm, MB/s | ratio |\n|---|---|---|---|---|---|"
        )
        for threads in sorted({1, 2, *(2**power for power in range(2, 8) if 2**power < cores), cores}):
            with mock.patch.object(parallel, "usable_cores", lambda threads=threads: threads):
                verifying = best(lambda: verify_export(Path(folder) / "out", expected))
                warm = best(lambda: read(files))
                forget(files)
                cold = best(lambda: read(files), times=1)
            print(
                f"| {threads} | {report.quantized_parameters / verifying / 1e6:,.0f} | {report.bytes / verifying / 1e6:,.0f} "
                f"| {report.bytes / cold / 1e6:,.0f} | {report.bytes / warm / 1e6:,.0f} | {verifying / cold:.1f} |"
            )


if __name__ == "__main__":
    main()
