"""Compile every kernel for every supported architecture, without a GPU, and print what came out as JSON.

A program of its own because Triton compiles nothing in a process that runs its interpreter: `python compile_kernels.py 80 90`.
One line per kernel and architecture: registers, stack and local bytes, widths of global accesses, from `cuobjdump` and `nvdisasm`;
and how many kernels a launch would compile over shapes.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from nvfp4_train.kernels import code_history, code_history_kernel, input_kernels, multi_tensor_kernels, statistics_kernels
from nvfp4_train.kernels import triton_kernels as kernels
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES

TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
CUOBJDUMP, NVDISASM = TOOLS / "cuobjdump", TOOLS / "nvdisasm"
INSTRUCTION_BYTES = 16
FLOAT, BF16, HALF, INT, LONG, BYTES, STEPS = "*fp32", "*bf16", "*fp16", "*i32", "*i64", "*u8", "*i8"
DOUBLE = "*fp64"
TORCH_DTYPES = {
    FLOAT: torch.float32, BF16: torch.bfloat16, HALF: torch.float16, INT: torch.int32, LONG: torch.int64, BYTES: torch.uint8,
    STEPS: torch.int8, DOUBLE: torch.float64,
}  # fmt: skip
SIZES = {
    "blocks_per_row": "i32", "num_chunks": "i32", "num_tiles": "i32", "num_slots": "i32", "programs_per_slot": "i32",
    "is_new_window": "i32", "min_reversals": "i32",
}  # fmt: skip
"""Scalars that are not int64."""
OPTIONAL = ("steps_ptr",)
"""Pointers that are None unless a kernel is given a type for them."""
UNALIGNED = ("s2_ptr", "global_amax_ptr", "input_scale_ptr", "now_codes_ptr", "now_scales_ptr")

TO_PACKED = {"s2_ptr": FLOAT, "packed_ptr": BYTES, "scales_ptr": BYTES}
SEARCH = {"s2_ptr": FLOAT, "hessian_ptr": FLOAT, "steps_ptr": STEPS}
STATIC = {"amax_ptr": FLOAT, "global_amax_ptr": FLOAT}
TABLES = {"table_ptr": LONG, "measured_ptr": INT, "scales_ptr": FLOAT, "is_moved_ptr": INT}
SLOTS = {"measured_ptr": INT, "amax_ptr": FLOAT, "scales_ptr": FLOAT, "is_moved_ptr": INT}
SHARDS = {"received_ptr": BYTES, "table_ptr": LONG, "s2_ptr": FLOAT, "out_ptr": BF16}
IS_STATIC = {"IS_QUANTIZED": True, "IS_PRODUCT": True}
ONCE = {"IS_MEASURED": True, "IS_QUANTIZED": True, "ONLY_MOVED": False}
MOVED = {"IS_MEASURED": False, "IS_QUANTIZED": True, "ONLY_MOVED": True}
FIRST_OF_TWO = {"IS_MEASURED": True, "IS_QUANTIZED": False, "ONLY_MOVED": False}
SECOND_OF_TWO = {"IS_MEASURED": False, "IS_QUANTIZED": True, "ONLY_MOVED": False}
MAX, FOUR_OVER_SIX, MSE, HESSIAN = (
    {"FACTORS": BLOCK_SCALE_RULES[name].factors, "STEPS": BLOCK_SCALE_RULES[name].steps}
    for name in ("max", "four_over_six", "mse", "hessian")
)
SEARCHED = {"STEPS": HESSIAN["STEPS"], "ROWS": kernels.SEARCH_ROWS, "COLUMNS": kernels.SEARCH_COLUMNS}
TO_BF16 = {"SOURCE": tl.float32, "DECODED": tl.bfloat16, "IS_PACKED": False, "IS_FITTED": False, **MAX}
TO_CODES = {"SOURCE": tl.float32, "DECODED": None, "IS_PACKED": True, "IS_FITTED": False, **MAX}
TO_BOTH = {"SOURCE": tl.float32, "DECODED": tl.bfloat16, "IS_PACKED": True, "IS_FITTED": False, **MAX}
BF16_TO_BF16 = {"SOURCE": tl.bfloat16, "DECODED": tl.bfloat16, "IS_PACKED": False, "IS_FITTED": False, **MAX}
PASS = (multi_tensor_kernels.TILE, multi_tensor_kernels.NUM_WARPS)
INPUT = (input_kernels.TILE, input_kernels.NUM_WARPS)
INPUT_OF_BF16 = {"x_ptr": BF16, "input_scale_ptr": FLOAT, "out_ptr": BF16}
INPUT_OF_FLOAT = {"x_ptr": FLOAT, "input_scale_ptr": FLOAT, "out_ptr": FLOAT}
HISTORY = {"history_ptr": BYTES, "master_ptr": FLOAT, "counts_ptr": LONG}
FOLLOW = (code_history_kernel.TILE, code_history_kernel.NUM_WARPS)
CODES = {"packed_ptr": BYTES, "scales_ptr": BYTES}
TILES = kernels.TILES
STATISTICS = (statistics_kernels.TILE, statistics_kernels.NUM_WARPS)
SUMS = {"codes_ptr": BYTES, "scales_ptr": BYTES, "s2_ptr": FLOAT, "sums_ptr": DOUBLE, "amax_ptr": FLOAT}
CHANGES = {
    "now_codes_ptr": BYTES, "now_scales_ptr": BYTES, "s2_ptr": FLOAT, "last_codes_ptr": BYTES, "last_scales_ptr": BYTES,
    "last_s2_ptr": FLOAT, "before_ptr": BYTES, "sums_ptr": DOUBLE,
}  # fmt: skip

KERNELS = {
    "block_amax": (kernels.block_amax_kernel, TILES["block_amax"], {"x_ptr": BF16, "amax_ptr": FLOAT}, {}),
    "fake_quant_bf16": (
        kernels.fake_quant_kernel, TILES["fake_quant"], {"x_ptr": BF16, "s2_ptr": FLOAT, "out_ptr": BF16}, MAX,
    ),
    "fake_quant_fp16": (
        kernels.fake_quant_kernel, TILES["fake_quant"], {"x_ptr": HALF, "s2_ptr": FLOAT, "out_ptr": HALF}, MAX,
    ),
    "fake_quant_fp32": (
        kernels.fake_quant_kernel, TILES["fake_quant"], {"x_ptr": FLOAT, "s2_ptr": FLOAT, "out_ptr": BF16}, MAX,
    ),
    "fake_quant_bf16_four_over_six": (
        kernels.fake_quant_kernel, TILES["fake_quant"], {"x_ptr": BF16, "s2_ptr": FLOAT, "out_ptr": BF16}, FOUR_OVER_SIX,
    ),
    "quantize_fp32_mse": (kernels.quantize_kernel, TILES["quantize"], {"x_ptr": FLOAT, **TO_PACKED}, MSE),
    "search_fp32": (kernels.choose_steps_kernel, TILES["choose_steps"], {"x_ptr": FLOAT, **SEARCH}, SEARCHED),
    "quantize_bf16": (kernels.quantize_kernel, TILES["quantize"], {"x_ptr": BF16, **TO_PACKED}, MAX),
    "quantize_fp32": (kernels.quantize_kernel, TILES["quantize"], {"x_ptr": FLOAT, **TO_PACKED}, MAX),
    "static_scales": (kernels.static_scales_kernel, TILES["static_scales"], {**STATIC, "scales_ptr": FLOAT}, IS_STATIC),
    "static_fake_quant": (
        kernels.static_fake_quant_kernel, TILES["static_fake_quant"], {"x_ptr": BF16, **STATIC, "out_ptr": BF16}, IS_STATIC,
    ),
    "static_fake_quant_octets": (
        kernels.static_fake_quant_octets_kernel,
        TILES["static_fake_quant_octets"],
        {"x_ptr": BF16, **STATIC, "out_ptr": BF16},
        {"OCTETS_PER_SCALE": 1, **IS_STATIC},
    ),
    "dequantize": (
        kernels.dequantize_kernel,
        TILES["dequantize"],
        {**TO_PACKED, "out_ptr": BF16},
        {"WORDS_PER_SCALE": 2, "IS_E4M3": True},
    ),
    "dequantize_shards": (multi_tensor_kernels.decode_shards_kernel, TILES["dequantize"], SHARDS, {}),
    "whole_model_to_bf16": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_BF16, **ONCE}),
    "whole_model_to_codes": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_CODES, **ONCE}),
    "whole_model_to_bf16_mse": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_BF16, **ONCE, **MSE}),
    "whole_model_to_codes_four_over_six": (
        multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_CODES, **ONCE, **FOUR_OVER_SIX},
    ),
    "whole_model_moved": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_BF16, **MOVED}),
    "whole_model_search": (
        multi_tensor_kernels.choose_steps_kernel,
        TILES["choose_steps"],
        {"table_ptr": LONG, "scales_ptr": FLOAT},
        {"SOURCE": tl.float32, "STEPS": HESSIAN["STEPS"]},
    ),
    "whole_model_fitted": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_BF16, **ONCE, **HESSIAN, "IS_FITTED": True}),
    "update_scales": (multi_tensor_kernels.update_scales_kernel, (256, 4), SLOTS, {"DIVISOR": 2688.0, "IS_POW2": True}),
    "quantize_input": (input_kernels.quantize_input_kernel, INPUT, {**INPUT_OF_BF16, **CODES}, {}),
    "fake_quant_input": (input_kernels.fake_quant_input_kernel, INPUT, INPUT_OF_BF16, {}),
    "follow_codes": (code_history_kernel.follow_codes_kernel, FOLLOW, {**TO_PACKED, **HISTORY}, {"ACTION": code_history.COUNT}),
    "weight_sums": (statistics_kernels.weight_sums_kernel, STATISTICS, {"master_ptr": FLOAT, **SUMS}, {}),
    "weight_changes": (
        statistics_kernels.weight_changes_kernel,
        STATISTICS,
        {"now_master_ptr": FLOAT, "last_master_ptr": FLOAT, **CHANGES},
        {},
    ),
}  # fmt: skip
VARIANTS = {
    "search_bf16": (kernels.choose_steps_kernel, TILES["choose_steps"], {"x_ptr": BF16, **SEARCH}, SEARCHED),
    "fake_quant_fp32_fitted": (
        kernels.fake_quant_kernel, TILES["fake_quant"], {"x_ptr": FLOAT, **SEARCH, "out_ptr": BF16}, HESSIAN,
    ),
    "quantize_fp32_fitted": (kernels.quantize_kernel, TILES["quantize"], {"x_ptr": FLOAT, **TO_PACKED, "steps_ptr": STEPS}, HESSIAN),
    "fake_quant_fp32_to_fp32": (
        kernels.fake_quant_kernel, TILES["fake_quant"], {"x_ptr": FLOAT, "s2_ptr": FLOAT, "out_ptr": FLOAT}, MAX,
    ),
    "fake_quant_bf16_mse": (
        kernels.fake_quant_kernel, TILES["fake_quant"], {"x_ptr": BF16, "s2_ptr": FLOAT, "out_ptr": BF16}, MSE,
    ),
    "static_fake_quant_fp32": (
        kernels.static_fake_quant_kernel, TILES["static_fake_quant"], {"x_ptr": FLOAT, **STATIC, "out_ptr": FLOAT}, IS_STATIC,
    ),
    "static_fake_quant_octets_fp32_blocks_of_24": (
        kernels.static_fake_quant_octets_kernel,
        TILES["static_fake_quant_octets"],
        {"x_ptr": FLOAT, **STATIC, "out_ptr": FLOAT},
        {"OCTETS_PER_SCALE": 3, **IS_STATIC},
    ),
    "dequantize_blocks_of_128": (
        kernels.dequantize_kernel,
        TILES["dequantize"],
        {**TO_PACKED, "out_ptr": BF16},
        {"WORDS_PER_SCALE": 16, "IS_E4M3": True},
    ),
    "dequantize_fp32_scales_to_fp32": (
        kernels.dequantize_kernel,
        TILES["dequantize"],
        {**TO_PACKED, "scales_ptr": FLOAT, "out_ptr": FLOAT},
        {"WORDS_PER_SCALE": 2, "IS_E4M3": False},
    ),
    "whole_model_to_both": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_BOTH, **ONCE}),
    "whole_model_bf16_to_bf16": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**BF16_TO_BF16, **ONCE}),
    "whole_model_measured": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_BF16, **FIRST_OF_TWO}),
    "whole_model_quantized": (multi_tensor_kernels.pass_kernel, PASS, TABLES, {**TO_BF16, **SECOND_OF_TWO}),
    "quantize_input_fp32": (input_kernels.quantize_input_kernel, INPUT, {**INPUT_OF_FLOAT, **CODES}, {}),
    "fake_quant_input_fp32": (input_kernels.fake_quant_input_kernel, INPUT, INPUT_OF_FLOAT, {}),
    "follow_codes_and_freeze": (
        code_history_kernel.follow_codes_kernel, FOLLOW, {**TO_PACKED, **HISTORY}, {"ACTION": code_history.FREEZE},
    ),
    "update_scales_exact": (multi_tensor_kernels.update_scales_kernel, (256, 4), SLOTS, {"DIVISOR": 2688.0, "IS_POW2": False}),
}  # fmt: skip
"""Kernels of other dtypes and options, compiled for CAPABILITIES_OF_VARIANTS alone."""
CAPABILITIES_OF_VARIANTS = (80, 90, 100)


def compile_kernel(kernel, tiles: tuple[int, int], pointers: dict[str, str], constants: dict, target: GPUTarget) -> bytes:
    """The cubin, from the signature that a launch with 16-byte aligned tensors has."""
    tile, num_warps = tiles
    names = kernel.arg_names
    constants = {**constants, "TILE": tile, **{name: None for name in OPTIONAL if name in names and name not in pointers}}
    signature = {n: "constexpr" if n in constants else pointers.get(n, SIZES.get(n, "i64")) for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers and n not in UNALIGNED},
    )
    most_registers = kernels.SEARCH_REGISTERS if kernel.__name__ == "choose_steps_kernel" else None
    options = {"num_warps": num_warps, "enable_fp_fusion": False, "maxnreg": most_registers}
    return triton.compile(source, target=target, options=options).asm["cubin"]


@dataclasses.dataclass
class Memory:
    """Stands for a tensor: Triton looks at its dtype and address alone."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def count_specializations(kernel, pointers: dict[str, str], constants: dict, target: GPUTarget) -> int:
    """How many kernels Triton would compile for launches that differ in sizes and in the alignment of s2."""
    constants = {**constants, "TILE": 64}
    # `triton_kernels.launch` passes the constants last.
    assert set(kernel.arg_names[len(kernel.arg_names) - len(constants) :]) == set(constants), kernel.arg_names
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    found = set()
    for size, offset in itertools.product((1, 2, 3, 16, 17, 2**31 - 16, 2**31, 2**33 + 1), (0, 4)):
        values = {name: Memory(TORCH_DTYPES[kind], 1024 + offset * (name in UNALIGNED)) for name, kind in pointers.items()}
        values |= {name: None for name in OPTIONAL if name not in pointers}
        arguments = [
            values.get(n, min(size, 2**31 - 16) if n in SIZES else size) for n in kernel.arg_names if n not in constants
        ]
        found.add(str(bind(*arguments, **constants)[1]))
    return len(found)


def read_cubins(cubins: list[bytes], capability: int) -> list[dict]:
    """What kernels compiled for an architecture take and move. They are disassembled together: to start takes longer than a kernel."""
    codes = [code_of(cubin) for cubin in cubins]
    architecture = f"SM{capability}{'a' if capability >= 90 else ''}"
    lines = iter(re.findall(r"/\*[0-9a-f]{4,}\*/ +(\S.*);", run_on_file([NVDISASM, "--binary", architecture], b"".join(codes))))
    found = []
    for cubin, code in zip(cubins, codes, strict=True):
        instructions = list(itertools.islice(lines, len(code) // INSTRUCTION_BYTES))
        assert len(instructions) == len(code) // INSTRUCTION_BYTES
        usage = run_on_file([CUOBJDUMP, "-res-usage"], cubin)
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        accesses = {}
        for kind in ("LDG", "STG"):
            names = (match[0] for match in map(re.compile(rf"{kind}\.[\w.]+").search, instructions) if match)
            widths = (re.search(r"\.(128|64|U16|U8|S8)\b", name) for name in names)
            accesses[kind] = collections.Counter(width[1] if width else "32" for width in widths)
        stores = [place for place, instruction in enumerate(instructions) if "STG.E.128" in instruction]
        gaps = [second - first for first, second in zip(stores[::2], stores[1::2], strict=False)]
        found.append({"registers": registers, "stack": stack, "local": local, "gaps": gaps, **accesses})
    assert next(lines, None) is None
    return found


def code_of(cubin: bytes) -> bytes:
    """The instructions: the one section whose name begins with .text., in an ELF of 64 bits."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + size * index) for index in range(number)]
    (code,) = (header for header in headers if cubin.startswith(b".text.", headers[names][4] + header[0]))
    return cubin[code[4] : code[4] + code[5]]


def run_on_file(command: list, content: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        chosen: dict[str, Any] = KERNELS | VARIANTS if capability in CAPABILITIES_OF_VARIANTS else KERNELS
        cubins = [compile_kernel(*kernel, target) for kernel in chosen.values()]
        for (name, (kernel, _, pointers, constants)), entry in zip(
            chosen.items(), read_cubins(cubins, capability), strict=True
        ):
            entry["specializations"] = count_specializations(kernel, pointers, constants, target)
            print(json.dumps({"kernel": name, "capability": capability, **entry}))


if __name__ == "__main__":
    main()
