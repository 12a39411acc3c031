"""Triton's interpreter, with the arithmetic of a GPU, and faster. Import it before kernels run.

The interpreter rounds `fma` twice, truncates float32 to bfloat16, and gets subnormal bfloat16 values wrong; a GPU does not.
It spends half its time in searches through triton.language for what it has to replace there, and a tenth on tables of dtypes.
"""

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _fma(self, x, y, z):
    with np.errstate(all="ignore"):
        # The product is exact in float64. The sum is rounded to odd there, so that rounding it to float32 rounds the exact sum.
        product, addend = x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(np.float64)
        total = product + addend
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        is_inexact = (total.view(np.int64) & 1 == 0) & (error != 0) & np.isfinite(error)
        total = np.where(is_inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
        return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


def _convert_float(data, source, target, rounding_mode):
    if source.name == "fp32" and target.name == "bf16":
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if source.name == "bf16" and target.name == "fp32":
        return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
    return _original_convert_float(data, source, target, rounding_mode)


def _generic_reduce(self, inputs):
    """The NaN-propagating maximum by NumPy. The interpreter would fold it element by element, in Python."""
    assert self.combine_fn.fn.__name__ == "larger"
    (values,) = inputs
    return [self.to_tensor(np.maximum.reduce(values.handle.data, axis=self.axis, keepdims=self.keep_dims), values.dtype)]


def _call(self, *args, **kwargs):
    """A function that a kernel calls. What it uses of triton.language was replaced when the kernel started, or below."""
    return self.rewrite()(*args, **kwargs)


def _get_np_dtype(dtype):
    """The interpreter would make a table of all dtypes each time."""
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _dtype_of_scalar(dtype.scalar)


_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)
_original_convert_float = interpreter._convert_float
interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_fma = _fma
interpreter.ReduceOps.generic_reduce = _generic_reduce
# Its own functions, such as `sum`, use triton.language.core, which a kernel's start leaves as it is.
interpreter._patch_lang(tl.sum.fn)
interpreter.InterpretedFunction.__call__ = _call
interpreter._get_np_dtype = _get_np_dtype
