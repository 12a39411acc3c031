"""`divergence.row_losses` as one Triton kernel: the path of CUDA tensors.

A program takes a row. It reads the row twice: first for the largest logits, the sums of exponentials and, of a KL divergence, its
value, all updated from tile to tile; then for the gradient. The Jensen-Shannon divergence needs a third reading in between, since
its value is of both normalized distributions.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_train.losses.divergence import Objective, Positions

TILE, NUM_WARPS = 4096, 8
"""Logits of each model that a program holds at once: 16 a thread, so that four programs fit a multiprocessor."""

FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NUMBERS = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "jsd": JSD}


@triton.jit
def _map(x, SCALE: tl.constexpr, CAP: tl.constexpr):
    """`LogitMap`; a CAP of 0 is none."""
    z = x.to(tl.float32) * SCALE
    if CAP > 0:
        # tanh(a) is 1 - 2 / (1 + exp(2 a)), at both infinities too.
        z = CAP - 2 * CAP / (1 + tl.exp(z * (2 / CAP)))
    return z


@triton.jit
def _load(row_ptr, columns, num_columns, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Logits of a tile; minus infinity behind the last one."""
    is_column = columns < num_columns
    z = _map(tl.load(row_ptr + columns, mask=is_column, other=0.0), SCALE, CAP)
    return tl.where(is_column, z, float("-inf"))


@triton.jit
def _product(probability, x):
    """0 where the probability is, whatever x is."""
    return tl.where(probability > 0, probability * x, 0.0)


@triton.jit
def _log_share(of, other):
    """Of two log-probabilities, log of the first probability over the mean of both."""
    difference = other - of
    # log((1 + exp(d)) / 2), without overflow.
    return 0.6931471805599453 - tl.maximum(difference, 0.0) - tl.log(1 + tl.exp(-tl.abs(difference)))


@triton.jit
def divergence_kernel(
    student_ptr,
    teacher_ptr,
    targets_ptr,
    weights_ptr,
    target_weights_ptr,
    gradient_ptr,
    losses_ptr,
    num_rows,
    num_columns,
    DIVERGENCE: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Losses [2, num_rows] and the gradient of contiguous rows [num_rows, num_columns]."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * num_columns
    student_ptr += start
    teacher_ptr += start
    gradient_ptr += start
    losses_ptr += row
    columns = tl.arange(0, TILE)
    weight, target_weight = tl.load(weights_ptr + row), tl.load(target_weights_ptr + row)
    if (weight == 0) & (target_weight == 0):
        zeros = tl.zeros((TILE,), dtype=gradient_ptr.dtype.element_ty)
        for first in range(0, num_columns, TILE):
            tl.store(gradient_ptr + first + columns, zeros, mask=first + columns < num_columns)
        tl.store(losses_ptr, 0.0)
        tl.store(losses_ptr + num_rows, 0.0)
        return

    # u and v are the logits of student and teacher over the temperature. `total` is that of p (v - u), or of q (u - v), unnormalized.
    # The largest ones begin below every logit, but finite, since their differences are taken.
    lowest = tl.full((), -1e38, tl.float32)
    largest_u, largest_v, largest_x = lowest, lowest, lowest
    sum_u, sum_v, sum_x, total = 0.0, 0.0, 0.0, 0.0
    for first in range(0, num_columns, TILE):
        x = _load(student_ptr, first + columns, num_columns, STUDENT_SCALE, STUDENT_CAP)
        v = _load(teacher_ptr, first + columns, num_columns, TEACHER_SCALE, TEACHER_CAP) * (1 / TEMPERATURE)
        u = x * (1 / TEMPERATURE)
        new_u, new_v = tl.maximum(largest_u, tl.max(u, 0)), tl.maximum(largest_v, tl.max(v, 0))
        exp_u, exp_v = tl.exp(u - new_u), tl.exp(v - new_v)
        shrink_u, shrink_v = tl.exp(largest_u - new_u), tl.exp(largest_v - new_v)
        sum_u, sum_v = sum_u * shrink_u + tl.sum(exp_u, 0), sum_v * shrink_v + tl.sum(exp_v, 0)
        if DIVERGENCE == FORWARD_KL:
            total = total * shrink_v + tl.sum(_product(exp_v, v - u), 0)
        if DIVERGENCE == REVERSE_KL:
            total = total * shrink_u + tl.sum(_product(exp_u, u - v), 0)
        largest_u, largest_v = new_u, new_v
        # The cross-entropy is of the student's own logits.
        if CROSS_ENTROPY > 0 and TEMPERATURE != 1:
            new_x = tl.maximum(largest_x, tl.max(x, 0))
            sum_x = sum_x * tl.exp(largest_x - new_x) + tl.sum(tl.exp(x - new_x), 0)
            largest_x = new_x
    log_sum_u, log_sum_v = largest_u + tl.log(sum_u), largest_v + tl.log(sum_v)
    log_sum_x = log_sum_u if TEMPERATURE == 1 else largest_x + tl.log(sum_x)

    of_q = 0.0
    if DIVERGENCE == FORWARD_KL:
        divergence = total / sum_v + log_sum_u - log_sum_v
    elif DIVERGENCE == REVERSE_KL:
        divergence = total / sum_u + log_sum_v - log_sum_u
        of_q = divergence
    else:
        of_p = 0.0
        for first in range(0, num_columns, TILE):
            x = _load(student_ptr, first + columns, num_columns, STUDENT_SCALE, STUDENT_CAP)
            v = _load(teacher_ptr, first + columns, num_columns, TEACHER_SCALE, TEACHER_CAP) * (1 / TEMPERATURE)
            log_q, log_p = x * (1 / TEMPERATURE) - log_sum_u, v - log_sum_v
            of_p += tl.sum(_product(tl.exp(log_p), _log_share(log_p, log_q)), 0)
            of_q += tl.sum(_product(tl.exp(log_q), _log_share(log_q, log_p)), 0)
        divergence = (of_p + of_q) / 2
    tl.store(losses_ptr, TEMPERATURE * TEMPERATURE * weight * divergence)

    target = tl.load(targets_ptr + row)
    if CROSS_ENTROPY > 0:
        of_target = _map(tl.load(student_ptr + target), STUDENT_SCALE, STUDENT_CAP)
        tl.store(losses_ptr + num_rows, target_weight * (log_sum_x - of_target))
    else:
        tl.store(losses_ptr + num_rows, 0.0)

    weight *= (1 - CROSS_ENTROPY) * TEMPERATURE
    target_weight *= CROSS_ENTROPY
    for first in range(0, num_columns, TILE):
        x = _load(student_ptr, first + columns, num_columns, STUDENT_SCALE, STUDENT_CAP)
        v = _load(teacher_ptr, first + columns, num_columns, TEACHER_SCALE, TEACHER_CAP) * (1 / TEMPERATURE)
        log_q, log_p = x * (1 / TEMPERATURE) - log_sum_u, v - log_sum_v
        q = tl.exp(log_q)
        if DIVERGENCE == FORWARD_KL:
            slope = q - tl.exp(log_p)
        elif DIVERGENCE == REVERSE_KL:
            slope = _product(q, log_q - log_p - of_q)
        else:
            slope = _product(q, _log_share(log_q, log_p) - of_q) / 2
        slope *= weight
        if CROSS_ENTROPY > 0:
            is_target = first + columns == target
            slope += target_weight * (tl.exp(x - log_sum_x) - tl.where(is_target, 1.0, 0.0))
        if STUDENT_CAP > 0:
            slope *= 1 - (x / STUDENT_CAP) * (x / STUDENT_CAP)
        slope *= STUDENT_SCALE
        tl.store(gradient_ptr + first + columns, slope.to(gradient_ptr.dtype.element_ty), mask=first + columns < num_columns)


def constants(objective: Objective) -> dict[str, Any]:
    student, teacher = objective.student_map, objective.teacher_map
    return {
        "DIVERGENCE": _NUMBERS[objective.divergence],
        "TEMPERATURE": objective.temperature,
        "CROSS_ENTROPY": objective.cross_entropy,
        "STUDENT_SCALE": student.scale,
        "STUDENT_CAP": student.cap or 0.0,
        "TEACHER_SCALE": teacher.scale,
        "TEACHER_CAP": teacher.cap or 0.0,
        "TILE": TILE,
    }


def row_losses(student: Tensor, teacher: Tensor, positions: Positions, objective: Objective, gradient: Tensor) -> Tensor:
    """`divergence.row_losses`. All tensors are contiguous and on one device. The cross-entropy is 0 where the objective has none."""
    num_rows, num_columns = student.shape
    losses = torch.empty(2, num_rows, dtype=torch.float32, device=student.device)
    tensors = student, teacher, positions.targets, positions.weights, positions.target_weights, gradient, losses
    with torch.cuda.device(student.device) if student.is_cuda else contextlib.nullcontext():
        divergence_kernel[(num_rows,)](*tensors, num_rows, num_columns, **constants(objective), num_warps=NUM_WARPS)
    return losses
