"""A sample of the checks that `benchmarks/kernels.py` makes on a GPU; without one the kernels run in the interpreter."""

import functools

import kernel_checks
import pytest
import whole_model_checks
from kernel_cases import DEVICE, TRITON, TritonQuantizer

from nvfp4_train.kernels import input_kernels, multi_tensor_kernels, triton_kernels

on_device = {"device": DEVICE, "ops": TRITON}
SAMPLES = {
    "division": functools.partial(kernel_checks.check_division, 4096, DEVICE),
    "rules": functools.partial(kernel_checks.check_rules, 6 * 1024, 1024, **on_device),
    "choose steps": functools.partial(kernel_checks.check_choose_steps, 3 * 2048, 2048, 2, **on_device),
    "block sizes": functools.partial(kernel_checks.check_block_sizes, 480 * 4, **on_device),
    # Chunks of each dtype and spread of exponents, with three numbers of significand bits.
    "random": functools.partial(kernel_checks.check_random, 45 * 1024, 1024, **on_device),
    "every bf16": functools.partial(kernel_checks.check_every_bf16, (1.0, 1.37 * 2.0**-9), 64, 16 * 17, **on_device),
    "inputs": functools.partial(
        kernel_checks.check_inputs, 15 * 1024, 1024, 16 * 17, DEVICE, TRITON if DEVICE == "cuda" else input_kernels
    ),
    "small": functools.partial(
        whole_model_checks.check_small,
        decode_shards=multi_tensor_kernels.decode_shards,
        quantizer_class=TritonQuantizer,
        **on_device,
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_of_the_checks_on_a_gpu(name):
    assert SAMPLES[name]()


def test_the_check_of_large_tensors_on_a_smaller_one(monkeypatch):
    """It has as many tiles per program as the large one."""
    monkeypatch.setattr(triton_kernels, "TILES_PER_PROGRAM", {"quantize": (4, 1)})
    assert kernel_checks.check_large(66, **on_device)
