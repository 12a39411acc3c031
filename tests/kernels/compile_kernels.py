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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_train.kernels import multi_tensor_kernels
from nvfp4_train.kernels import triton_kernels as kernels

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
UNALIGNED = ("s2_ptr", "global_amax_ptr")

FLOAT, BF16, HALF, INT, BYTES = "*fp32", "*bf16", "*fp16", "*i32", "*u8"
X_TO_AMAX = {"amax_ptr": FLOAT, "partial_ptr": FLOAT}
TO_PACKED = {"s2_ptr": FLOAT, "packed_ptr": BYTES, "scales_ptr": BYTES}
STATIC = {"amax_ptr": FLOAT, "global_amax_ptr": FLOAT}
TABLES = {"table_ptr": "*i64", "measured_ptr": INT, "scales_ptr": FLOAT, "is_moved_ptr": INT}
SHARDS = {"received_ptr": BYTES, "table_ptr": "*i64", "s2_ptr": FLOAT, "out_ptr": BF16}
IS_STATIC = {"IS_QUANTIZED": True, "IS_PRODUCT": True}
ONCE = {"IS_MEASURED": True, "IS_QUANTIZED": True, "ONLY_MOVED": False}
MOVED = {"IS_MEASURED": False, "IS_QUANTIZED": True, "ONLY_MOVED": True}
TO_BF16 = {"SOURCE": tl.float32, "DECODED": tl.bfloat16, "IS_PACKED": False}
TO_CODES = {"SOURCE": tl.float32, "DECODED": None, "IS_PACKED": True}

KERNELS = {
    "block_amax": (kernels.block_amax_kernel, {"x_ptr": BF16, "amax_ptr": FLOAT}, {}),
    "amax_bf16": (kernels.amax_kernel, {"x_ptr": BF16, **X_TO_AMAX}, {}),
    "amax_fp32": (kernels.amax_kernel, {"x_ptr": FLOAT, **X_TO_AMAX}, {}),
    "max": (kernels.max_kernel, {"values_ptr": FLOAT, "max_ptr": FLOAT}, {}),
    "fake_quant_bf16": (kernels.fake_quant_kernel, {"x_ptr": BF16, "s2_ptr": FLOAT, "out_ptr": BF16}, {}),
    "fake_quant_fp16": (kernels.fake_quant_kernel, {"x_ptr": HALF, "s2_ptr": FLOAT, "out_ptr": HALF}, {}),
    "fake_quant_fp32": (kernels.fake_quant_kernel, {"x_ptr": FLOAT, "s2_ptr": FLOAT, "out_ptr": BF16}, {}),
    "quantize_bf16": (kernels.quantize_kernel, {"x_ptr": BF16, **TO_PACKED}, {}),
    "quantize_fp32": (kernels.quantize_kernel, {"x_ptr": FLOAT, **TO_PACKED}, {}),
    "static_scales": (kernels.static_scales_kernel, {**STATIC, "scales_ptr": FLOAT}, IS_STATIC),
    "static_fake_quant": (kernels.static_fake_quant_kernel, {"x_ptr": BF16, **STATIC, "out_ptr": BF16}, IS_STATIC),
    "dequantize": (kernels.dequantize_kernel, {**TO_PACKED, "out_ptr": BF16}, {"WORDS_PER_SCALE": 2, "IS_E4M3": True}),
    "whole_model_to_bf16": (multi_tensor_kernels.pass_kernel, TABLES, {**TO_BF16, **ONCE}),
    "whole_model_to_codes": (multi_tensor_kernels.pass_kernel, TABLES, {**TO_CODES, **ONCE}),
    "whole_model_moved": (multi_tensor_kernels.pass_kernel, TABLES, {**TO_BF16, **MOVED}),
    "dequantize_shards": (multi_tensor_kernels.decode_shards_kernel, SHARDS, {}),
}


def compile_kernel(name: str, kernel, pointers: dict[str, str], constants: dict, capability: int) -> bytes:
    """The cubin, from the signature that a launch with 16-byte aligned tensors has."""
    operation = name.removesuffix("_bf16").removesuffix("_fp16").removesuffix("_fp32").removesuffix("_shards")
    tile, num_warps = kernels.TILES.get(operation, (multi_tensor_kernels.TILE, multi_tensor_kernels.NUM_WARPS))
    constants = {**constants, "TILE": tile}
    names = kernel.arg_names
    sizes = {"num_chunks": "i32", "num_tiles": "i32"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, sizes.get(n, "i64")) for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers and n not in UNALIGNED},
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
        for name, (kernel, pointers, constants) in KERNELS.items():
            cubin = compile_kernel(name, kernel, pointers, constants, capability)
            print(json.dumps({"kernel": name, "capability": capability, **read_cubin(cubin)}))


if __name__ == "__main__":
    main()
