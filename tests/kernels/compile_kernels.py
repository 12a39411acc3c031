"""Compile every kernel for every supported architecture, without a GPU, and print what came out as JSON.

A program of its own because Triton compiles nothing in a process that runs its interpreter: `python compile_kernels.py 80 90`.
One line per kernel and architecture: registers, stack and local bytes, widths of global accesses, from `cuobjdump`.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_train.kernels import triton_kernels as kernels

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
UNALIGNED = ("s2_ptr", "global_amax_ptr")

X, OUT, FLOAT = "*bf16", "*bf16", "*fp32"
FAKE_QUANT = ("fake_quant", kernels.fake_quant_kernel, {})
QUANTIZE = ("quantize", kernels.quantize_kernel, {})
AMAX = ("amax", kernels.amax_kernel, {"NUM_TILES": kernels.AMAX_TILES_PER_PROGRAM})
STATIC = ("static_fake_quant", kernels.static_fake_quant_kernel, {"IS_QUANTIZED": True, "IS_PRODUCT": True})
DEQUANTIZE = ("dequantize", kernels.dequantize_kernel, {"WORDS_PER_SCALE": 2, "IS_E4M3": True})

KERNELS = {
    "block_amax": (("block_amax", kernels.block_amax_kernel, {}), {"x_ptr": X, "amax_ptr": FLOAT}),
    "amax_bf16": (AMAX, {"x_ptr": X, "amax_ptr": FLOAT, "partial_ptr": FLOAT}),
    "amax_fp32": (AMAX, {"x_ptr": FLOAT, "amax_ptr": FLOAT, "partial_ptr": FLOAT}),
    "max": (("max", kernels.max_kernel, {}), {"values_ptr": FLOAT, "max_ptr": FLOAT}),
    "fake_quant_bf16": (FAKE_QUANT, {"x_ptr": X, "s2_ptr": FLOAT, "out_ptr": OUT}),
    "fake_quant_fp16": (FAKE_QUANT, {"x_ptr": "*fp16", "s2_ptr": FLOAT, "out_ptr": "*fp16"}),
    "fake_quant_fp32_to_bf16": (FAKE_QUANT, {"x_ptr": FLOAT, "s2_ptr": FLOAT, "out_ptr": OUT}),
    "quantize_bf16": (QUANTIZE, {"x_ptr": X, "s2_ptr": FLOAT, "words_ptr": "*i32", "scales_ptr": "*u8"}),
    "quantize_fp32": (QUANTIZE, {"x_ptr": FLOAT, "s2_ptr": FLOAT, "words_ptr": "*i32", "scales_ptr": "*u8"}),
    "static_scales": (
        ("static_scales", kernels.static_scales_kernel, {"IS_QUANTIZED": True, "IS_PRODUCT": True}),
        {"amax_ptr": FLOAT, "global_amax_ptr": FLOAT, "scales_ptr": FLOAT},
    ),
    "static_fake_quant": (STATIC, {"x_ptr": X, "amax_ptr": FLOAT, "global_amax_ptr": FLOAT, "out_ptr": OUT}),
    "dequantize": (DEQUANTIZE, {"words_ptr": "*i32", "scales_ptr": "*u8", "s2_ptr": FLOAT, "out_ptr": OUT}),
}


def compile_kernel(operation: str, kernel, constants: dict, pointers: dict[str, str], capability: int) -> bytes:
    """The cubin, from the signature that a launch with 16-byte aligned tensors has."""
    tile, num_warps = kernels.TILES[operation]
    constants = {**constants, "TILE": tile}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i64") for name in names}
    aligned = [(i,) for i, name in enumerate(names) if name in pointers and name not in UNALIGNED]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def read_cubin(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    accesses = {}
    for kind in ("LDG", "STG"):
        widths = (re.search(r"\.(128|64|U16|U8|S8)\b", access) for access in re.findall(rf"{kind}\.[\w.]+", sass))
        accesses[kind] = collections.Counter(width[1] if width else "32" for width in widths)
    return {"registers": registers, "stack": stack, "local": local, **accesses}


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for name, ((operation, kernel, constants), pointers) in KERNELS.items():
            cubin = compile_kernel(operation, kernel, constants, pointers, capability)
            print(json.dumps({"kernel": name, "capability": capability, **read_cubin(cubin)}))


if __name__ == "__main__":
    main()
