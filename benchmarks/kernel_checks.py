"""Whether the kernels give the bits of `reference` on a device, over far more input than the tests have time for.

A check returns what it has covered, in words, or raises AssertionError. `ops` is `torch.ops.nvfp4`, or a module with the same
functions. `whole_model_checks` has the checks of the passes over whole models, and of every kernel on small tensors.
"""

import collections
import itertools
import math

import peers
import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.kernels import fp4_kernel, reference, triton_arithmetic
from nvfp4_train.kernels.scale_rules import BLOCK_SCALE_RULES, MAX_RULE, ScaleRule

BF16 = torch.bfloat16
DTYPES = (torch.float32, BF16, torch.float16)
EXACT_RULE = ScaleRule(global_scale="exact")
FITTED_RULE = ScaleRule(block_scale="hessian")
SEARCHING = [name for name, rule in BLOCK_SCALE_RULES.items() if not rule.is_fitted and name != "max"]
BLOCK_SIZES = (1, 4, 8, 10, 12, 24, 32, 48, 64, 96, 120, 128, 480)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bit by bit, so that -0.0 differs from 0.0."""
    is_other = bits_differ(actual, expected)
    assert not is_other.any(), f"{what}: {int(is_other.sum())} of {is_other.numel()} differ from the reference"


def bits_differ(a: Tensor, b: Tensor) -> Tensor:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.contiguous().view(integer) != b.contiguous().view(integer)


def check_ops(ops, x: Tensor, s2: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Every operation of x and s2 alone, under the rule max. Returns the codes and scales of the reference."""
    assert_same(ops.block_amax(x), reference.block_amax(x), f"block_amax, {what}")
    packed, scales, x_hat = check_rule(ops, x, s2, "max", what)
    assert_same(ops.dequantize(packed, scales, s2, x.dtype), x_hat, f"dequantize, {what}")
    return packed, scales


def check_rule(
    ops, x: Tensor, s2: Tensor, block_scale: str, what: str, steps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both operations that choose block scales. Returns codes, scales and decoded values of the reference."""
    rule, what = ScaleRule(block_scale=block_scale), f"{block_scale}, {what}"
    packed, scales = ops.quantize(x, s2, block_scale, steps)
    expected = reference.quantize(x, s2, rule, steps)
    assert_same(scales, expected[1], f"scales, {what}")
    assert_same(packed, expected[0], f"codes, {what}")
    x_hat = reference.fake_quant(x, s2, x.dtype, rule, steps)
    assert_same(ops.fake_quant(x, s2, x.dtype, block_scale, steps), x_hat, f"fake_quant, {what}")
    return *expected, x_hat


def check_static_ops(ops, x: Tensor, amax: Tensor, global_amax: Tensor, is_quantized: bool, what: str) -> Tensor:
    """Both static operations, for blocks of x.numel() // amax.numel() elements. Returns the scales of the reference."""
    scales = reference.static_scales(amax, global_amax, is_quantized)
    assert_same(ops.static_scales(amax, global_amax, is_quantized), scales, f"static_scales, {what}")
    x_hat = ops.static_fake_quant(x, amax, global_amax, is_quantized, x.dtype)
    assert_same(x_hat, reference.static_fake_quant(x, scales, x.dtype), f"static_fake_quant, {what}")
    return scales


@triton.jit
def _division_kernel(wrong_ptr, TILE: tl.constexpr):
    """Count disagreements of the fast division with IEEE division next to every place where a rounding could turn.

    Divisors have every significand. Quotients are every tie of E2M1 and E4M3, and neighbours of it.
    """
    b = triton_arithmetic.from_bits(0x3F800000 + tl.program_id(0) * TILE + tl.arange(0, TILE))
    one_over = triton_arithmetic.reciprocal(b)
    wrong = (one_over != tl.div_rn(1.0, b)).to(tl.int32)
    for sixteenths in range(16, 32):
        at = triton_arithmetic.to_bits(b * (sixteenths / 16.0))
        for neighbour in range(-4, 5):
            a = triton_arithmetic.from_bits(at + neighbour)
            wrong += (triton_arithmetic.divide(a, b, one_over) != tl.div_rn(a, b)).to(tl.int32)
    tl.atomic_add(wrong_ptr, tl.sum(wrong, 0))


def check_division(num_divisors: int = 2**23, device: str = "cuda") -> str:
    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    _division_kernel[(num_divisors // 1024,)](wrong, TILE=1024, enable_fp_fusion=False)
    assert wrong.item() == 0, f"{wrong.item()} quotients differ from IEEE division"
    return (
        f"{num_divisors * 145:.1e} quotients by IEEE division: every significand of the divisor, all ties of E2M1 and E4M3, "
        "4 neighbours on each side"
    )


class RandomInput:
    """Tensors and global scales over the whole range of exponents."""

    def __init__(self, num_elements: int, device: str) -> None:
        self.shape = num_elements // 16, 16
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def draw(self, index: int) -> tuple[Tensor, Tensor, str]:
        """x, s2 and what they are: blocks spread around an exponent, with few or many significand bits, so that ties occur."""
        dtype = DTYPES[index % 3]
        spread = (0, 0, 4, 20, 130)[index // 3 % 5]
        bits = (2, 4, 7, 10, 23)[index // 15 % 5]
        centre = int(self.integers(-22, 14, 1) if dtype == torch.float16 else self.integers(-140, 116, 1))
        significand = (1 + self.integers(0, 2**bits, *self.shape) / 2**bits) * (1 - 2 * self.integers(0, 2, *self.shape))
        exponent = centre + self.integers(-spread, spread + 1, self.shape[0], 1) + self.integers(-6, 1, *self.shape)
        x = significand.double() * torch.exp2(exponent.clamp(-149, 127).double())
        x = x.to(dtype).nan_to_num(1.0, 1.0, -1.0)
        is_pow2 = bool(self.integers(0, 2, 1))
        if self.integers(0, 2, 1):
            kind = "of the largest amax"
            s2 = reference.global_scale(reference.block_amax(x).amax(), MAX_RULE if is_pow2 else EXACT_RULE)
        else:
            kind = "of its own"
            mantissa = 1.0 if is_pow2 else 1 + int(self.integers(1, 2**23, 1)) / 2**23
            exponent_of_s2 = min(max(centre + int(self.integers(-20, 3, 1)), -128), 117)
            s2 = torch.tensor(mantissa * 2.0**exponent_of_s2, device=self.device)
        return x, s2, f"{x.dtype} around 2^{centre}, spread {spread}, {bits} bits, s2 {kind} {float(s2)}"


def check_random(num_elements: float = 1e9, chunk: int = 2**22, device: str = "cuda", ops=torch.ops.nvfp4) -> str:
    source = RandomInput(chunk, device)
    num_chunks = -(-int(num_elements) // chunk)
    branches: collections.Counter[str] = collections.Counter()
    num_subnormal = torch.zeros((), dtype=torch.int64, device=device)
    num_subnormal_sixths = torch.zeros((), dtype=torch.int64, device=device)
    for index in range(num_chunks):
        x, s2, what = source.draw(index)
        packed, scales = check_ops(ops, x, s2, what)
        amax = reference.block_amax(x)
        # The amax of these values, and stale ones, which most blocks exceed.
        for factor in (1.0, 0.3):
            check_static_ops(ops, x, amax * factor, amax.amax() * factor, index % 2 == 0, f"{what}, amax times {factor}")
        is_subnormal = x.abs().float() < torch.finfo(x.dtype).smallest_normal
        num_subnormal += (is_subnormal & (reference.unpack(packed) & 7 > 0)).sum()
        num_subnormal_sixths += ((amax < 6 * 2.0**-126) & (scales.float().flatten() > reference.E4M3_MIN).view_as(amax)).sum()
        value = float(s2)
        if 2.0**-60 < value < 2.0**60 and value.hex().startswith("0x1.0000000000000p"):
            branches["a power of two amid the range"] += 1
        else:
            branches["below 2^-50" if value < 2.0**-50 else "above 2^50" if value > 2.0**50 else "another amid the range"] += 1
    assert num_subnormal > 0
    assert num_subnormal_sixths > 0
    assert len(branches) == 4, f"s2 was never in a branch: {branches}"
    by_branch = ", ".join(f"{count / num_chunks:.0%} {name}" for name, count in sorted(branches.items()))
    return (
        f"{num_chunks * chunk:.2e} random elements around 2^-140 to 2^115, every operation; s2: {by_branch}; "
        f"{int(num_subnormal):.1e} subnormals with a code above 0; {int(num_subnormal_sixths):.1e} scales of a subnormal amax / 6"
    )


def check_rules(num_elements: float = 2e8, chunk: int = 2**22, device: str = "cuda", ops=torch.ops.nvfp4) -> str:
    """The rules that search among several scales, on input as in `check_random`."""
    source = RandomInput(chunk, device)
    num_chunks = -(-int(num_elements) // chunk)
    num_other = torch.zeros((), dtype=torch.int64, device=device)
    for index in range(num_chunks):
        x, s2, what = source.draw(index)
        largest = reference.block_scales(x, s2)
        for block_scale in SEARCHING:
            _, scales, _ = check_rule(ops, x, s2, block_scale, what)
            num_other += (scales.float() != largest).sum()
    assert num_other > 0
    return (
        f"{num_chunks * chunk:.2e} random elements under each of {', '.join(SEARCHING)}, quantize and fake_quant; "
        f"{int(num_other):.1e} block scales other than that of max"
    )


def random_hessians(num_blocks: int, source: RandomInput) -> Tensor:
    """Second moments of 24 inputs whose channels differ by factors up to 2^20; some channels are dead."""
    inputs = torch.randn(num_blocks, 24, 16, generator=source.generator, device=source.device)
    inputs *= torch.exp2(source.integers(-10, 11, num_blocks, 1, 16).float()) * source.integers(0, 32, num_blocks, 1, 16).clamp(
        max=1
    )
    return inputs.mT @ inputs / 24


def check_choose_steps(
    num_elements: float = 1e8,
    chunk: int = 2**22,
    columns: int = 8,
    num_on_cpu: int = 4,
    device: str = "cuda",
    ops=torch.ops.nvfp4,
) -> str:
    """The search of a fitted rule and the operations that take its steps, on input as in `check_random`.

    The first chunks are compared with the reference on the CPU, too.
    """
    source = RandomInput(chunk, device)
    num_chunks = -(-int(num_elements) // chunk)
    rule = FITTED_RULE
    counts = torch.zeros(len(rule.steps), dtype=torch.int64, device=device)
    for index in range(num_chunks):
        x, s2, what = source.draw(index)
        x = x.view(-1, 16 * columns)
        hessians = random_hessians(columns, source)
        steps = ops.choose_steps(x, s2, hessians, rule.block_scale)
        assert_same(steps, reference.choose_steps(x, s2, hessians, rule), f"choose_steps, {what}")
        if index < num_on_cpu:
            on_cpu = reference.choose_steps(x.cpu(), s2.cpu(), hessians.cpu(), rule)
            assert_same(steps.cpu(), on_cpu, f"choose_steps, the CPU, {what}")
        check_rule(ops, x, s2, rule.block_scale, what, steps)
        counts += torch.stack([(steps == step).sum() for step in rule.steps])
    assert counts.min() > 0, f"a step was never chosen: {dict(zip(rule.steps, counts.tolist(), strict=True))}"
    num_blocks = chunk / 16
    return (
        f"{num_chunks * num_blocks:.2e} blocks whose steps a Hessian chose, {min(num_on_cpu, num_chunks) * num_blocks:.2e} of "
        "them on the CPU too, and quantize and fake_quant under these steps"
    )


def check_block_sizes(num_elements: int = 480 * 128 * 64, device: str = "cuda", ops=torch.ops.nvfp4) -> str:
    """Static operations and dequantize, whose blocks may have any size."""
    source = RandomInput(num_elements, device)
    for index, (block_size, dtype) in enumerate(itertools.product(BLOCK_SIZES, DTYPES)):
        columns = math.lcm(block_size, 2, 16)
        x = torch.randn(num_elements // columns, columns, generator=source.generator, device=device).to(dtype)
        x[0], x[1, ::2] = 0.0, -0.0
        amax = x.unflatten(-1, (-1, block_size)).abs().amax(-1)
        what = f"blocks of {block_size}, {dtype}"
        for factor in (1.0, 0.3):
            check_static_ops(ops, x, amax * factor, amax.amax() * factor, index % 2 == 0, f"{what}, amax times {factor}")
        packed = source.integers(0, 256, x.shape[0], columns // 2).to(torch.uint8)
        s2 = amax.amax().float()
        for scales in (amax, amax.float().clamp(max=448).to(torch.float8_e4m3fn)):
            decoded = ops.dequantize(packed, scales, s2, dtype)
            assert_same(decoded, reference.dequantize(packed, scales, s2, dtype), f"dequantize, {what}, scales {scales.dtype}")
    return f"static operations and dequantize in blocks of {', '.join(map(str, BLOCK_SIZES))}, {num_elements:.1e} elements each"


def check_subnormal_sixths(num_significands: int = 64, device: str = "cuda", ops=torch.ops.nvfp4) -> str:
    """Block scales where amax / 6 is subnormal, so that two roundings would differ from one."""
    values = torch.arange(127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).double()
    midpoints = (values[2:] + values[1:-1]) / 2
    count = 0
    for significand in torch.linspace(1, 2, num_significands + 1).double().tolist()[:-1]:
        for exponent in range(-126, -117):
            s2 = torch.tensor(significand * 2.0**exponent, device=device)
            units = (midpoints * s2.double() * 6 / 2.0**-149).round().unsqueeze(-1) + torch.arange(-64, 65, device=device)
            amax = (units[units < 2**26] * 2.0**-149).float().unsqueeze(-1)
            x = torch.nn.functional.pad(amax, (3, 12))
            expected = reference.block_scales(x, s2).to(torch.float8_e4m3fn)
            assert_same(ops.quantize(x, s2)[1], expected, f"scales of subnormal amax / 6 under s2 {float(s2)}")
            count += amax.numel()
    return f"{count:.1e} scales next to a tie of E4M3 with amax / 6 subnormal or little above"


GLOBAL_SCALES = (1.0, 2.0**-9, 2.0**-40, 2.0**40, 2.0**-126, 2.0**-100, 2.0**100, 1.37 * 2.0**-9, 1.9 * 2.0**-55, 1.2 * 2.0**60)


def check_every_bf16(
    scales=GLOBAL_SCALES, num_static: int = 4096, stride: int = 1, device: str = "cuda", ops=torch.ops.nvfp4
) -> str:
    """Every finite bf16 value, or every so many, under every block scale, and under many static scales."""
    values = torch.arange(2**16, device=device).to(torch.int16).view(BF16)
    values = values[values.isfinite()]
    # Values of nearly equal magnitude share a block. The 16th element gives the block its scale, where no other is larger.
    values = values[values.abs().argsort(stable=True)][::stride].view(-1, 15)
    bytes_of_scales = torch.arange(8, 127, dtype=torch.uint8, device=device)
    tops = 6 * bytes_of_scales.view(torch.float8_e4m3fn).float()
    for s2 in scales:
        s2_on_device = torch.tensor(s2, device=device)
        top = (tops * s2_on_device).to(BF16)
        x = torch.cat((values.expand(len(tops), -1, -1), top.view(-1, 1, 1).expand(-1, len(values), 1)), dim=-1)
        block_scales = check_ops(ops, x, s2_on_device, f"every bf16 value under s2 {s2}")[1].view(torch.uint8)
        assert s2 < 2.0**-120 or set(bytes_of_scales.tolist()) <= set(block_scales.unique().tolist())
    num_values = values.numel()
    # A static scale may be any float32.
    values = values.flatten()[: num_values // 16 * 16]
    amax = torch.exp2(torch.linspace(-14, 14, num_static, device=device))
    seen = []
    for index, part in enumerate(amax.split(64)):
        x = values.repeat(len(part), 1)
        block_amax = part.unsqueeze(1).expand(-1, values.numel() // 16).contiguous()
        for is_quantized in (True, False):
            # Each part has a global amax of its own, so that quantized scales differ too.
            static = check_static_ops(ops, x, block_amax, part.max() * (1 + index / 64), is_quantized, "every bf16 value")
            seen.append(static[:, 0])
    num_seen = torch.cat(seen).unique().numel()
    assert num_seen > num_static
    return (
        f"{num_values} of 65280 finite bf16 values under all {len(tops)} block scales and {len(scales)} global scales, "
        f"by every operation, and under {num_seen} static scales"
    )


def check_inputs(
    num_elements: float = 1e9, chunk: int = 2**22, stride: int = 1, device: str = "cuda", ops=torch.ops.nvfp4
) -> str:
    """The chain of linears' inputs: random values, and every finite bf16, or every so many, under scales of the whole range."""

    def check(x: Tensor, exponent: int, what: str) -> Tensor:
        input_scale = torch.tensor(2.0 ** min(max(exponent, -100), 100), device=device)
        packed, scales = reference.quantize_input(x, input_scale)
        x_hat = reference.dequantize(packed, scales, input_scale, x.dtype)
        wanted = ("values", x_hat), ("codes", packed), ("scales", scales)
        for (name, tensor), actual in zip(wanted, ops.quantize_input(x, input_scale), strict=True):
            assert_same(actual, tensor, f"{name} of an input, {what}")
        assert_same(ops.fake_quant_input(x, input_scale), x_hat, f"fake_quant_input, {what}")
        return scales

    source = RandomInput(chunk, device)
    num_chunks = -(-int(num_elements) // chunk)
    kinds = torch.zeros(3, dtype=torch.int64, device=device)
    for index in range(num_chunks):
        x, _, what = source.draw(index)
        exponent = int(x.abs().amax().float().clamp(2.0**-100, 2.0**100).log2()) - int(source.integers(0, 16, 1))
        scales = check(x, exponent, what).float()
        kinds += torch.stack([(scales == 0).sum(), ((scales > 0) & (scales < 2.0**-6)).sum(), (scales == 448).sum()])
    assert (kinds > 0).all(), kinds
    values = torch.arange(2**16, device=device).to(torch.int16).view(BF16)
    values = values[values.isfinite()]
    values = values[values.abs().argsort(stable=True)][::stride]
    values = values[: len(values) // 16 * 16].view(-1, 16)
    exponents = range(-100, 101, 4)
    for exponent in exponents:
        check(values, exponent, f"every bf16 under 2^{exponent}")
    return (
        f"inputs of linears: {num_chunks * chunk:.2e} random elements, with {', '.join(f'{int(n):.1e}' for n in kinds)} block scales "
        f"of 0, subnormal and 448; {values.numel()} of 65280 bf16 values under {len(exponents)} input scales"
    )


def check_large(num_rows: int = 2**20 + 64, device: str = "cuda", ops=torch.ops.nvfp4) -> str:
    x = torch.randn(num_rows, 2048, device=device, dtype=BF16)
    x[-1, -1] = 300.0
    parts = [slice(0, 64), slice(num_rows // 2, num_rows // 2 + 64), slice(num_rows - 64, None)]
    for source in (x, x.float()):
        for s2 in torch.tensor([2.0**-9, 0.0023], device=device):
            packed, scales = ops.quantize(source, s2)
            x_hat = ops.fake_quant(source, s2, BF16)
            assert_same(ops.dequantize(packed, scales, s2, BF16), x_hat, "dequantize of a large tensor")
            for rows in parts:
                expected = reference.quantize(source[rows], s2)
                assert_same(packed[rows], expected[0], "codes of a large tensor")
                assert_same(scales[rows], expected[1], "scales of a large tensor")
                assert_same(x_hat[rows], reference.fake_quant(source[rows], s2, BF16), "fake_quant of a large tensor")
    del source
    amax = ops.block_amax(x)
    global_amax = amax.max()
    assert float(global_amax) == 300.0
    static_scales = ops.static_scales(amax, global_amax, True)
    static = ops.static_fake_quant(x, amax, global_amax, True, BF16)
    for rows in parts:
        assert_same(amax[rows], reference.block_amax(x[rows]), "amax of a large tensor")
        expected_scales = reference.static_scales(amax[rows], global_amax)
        assert_same(static_scales[rows], expected_scales, "static scales of a large tensor")
        assert_same(
            static[rows], reference.static_fake_quant(x[rows], expected_scales, BF16), "static values of a large tensor"
        )
    return f"{x.numel():.3e} elements in one tensor, every operation, its first, middle and last rows; in bf16 and fp32, two s2"


def check_model_optimizer() -> str:
    if not peers.has_model_optimizer():
        return "Model Optimizer: not installed, not compared"
    peer = peers.model_optimizer_functions()
    count = num_other = num_zeros = 0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device="cuda")
    for dtype in DTYPES:
        for magnitude in (1.0, 1e-3, 30.0):
            x = (torch.randn(4096, 4096, device="cuda") * magnitude).to(dtype)
            x[0, :64] = 0.0
            x[0, :32] *= -1
            amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
            amax[1, :8] = torch.tensor([0, 1e-6, 6, 6.375, 1e-4, 3, 2.0**-14, 448], device="cuda").to(dtype)
            for is_quantized in (True, False):
                for factor in (None, 1.0, 0.3, 4.0, 0.0):
                    arguments = amax, None if factor is None else amax.max().float() * factor, is_quantized
                    scales = fp4_kernel.compute_fp4_scales(*arguments)
                    assert_same(peer.compute_fp4_scales(*arguments), scales, "compute_fp4_scales of Model Optimizer")
                    ours = fp4_kernel.static_blockwise_fp4_fake_quant(x, *arguments)
                    theirs = peer.static_blockwise_fp4_fake_quant(x, *arguments)
                    is_other = bits_differ(ours, theirs)
                    is_other_zero = is_other & (ours == theirs)
                    num_zeros += int(is_other_zero.sum())
                    is_other &= ~is_other_zero
                    num_other += int(is_other.sum())
                    quotients = (
                        x.float().abs()[is_other] / scales.unsqueeze(-1).expand(*amax.shape, 16).reshape(x.shape)[is_other]
                    )
                    assert ((quotients.unsqueeze(-1) / ties - 1).abs().amin(-1) < 2.0**-21).all()
                    count += x.numel()
    return (
        f"compute_fp4_scales of Model Optimizer, bit for bit. Its static_blockwise_fp4_fake_quant MISSED: {num_other} of "
        f"{count:.1e} values differ, {num_zeros} zeros in sign. All values that differ are within 4 ulp of a tie of two codes, "
        "where its approximate division goes astray; ours is IEEE division"
    )
