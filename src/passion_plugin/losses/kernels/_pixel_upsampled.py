"""Official pixel distillation of coarse logits on a GPU: probabilities are interpolated in registers.

The coarse voxels span cells: a fine voxel lies in the cell of the coarse voxel at or before it on each axis, between
the 8 corners of that cell (4 of them doubled in 2-D, where there is a single plane). Forward takes a cell per thread.
Backward takes a coarse voxel per thread and gathers from the 8 cells around it, so nothing is written twice. On an axis
of C coarse and F fine voxels, the fine one i lies at i (C - 1) / (F - 1), which integers tell exactly.
"""

# The parameters of kernels are pointers and numbers of Triton's own; only launchers are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from passion_plugin.losses._common import MIN_PROBABILITY, empty_gradient, flatten_voxels
from passion_plugin.losses.kernels import launch, with_strides

_CLAMP = tl.constexpr(MIN_PROBABILITY)

_BLOCK = 128


@triton.jit
def _corner(cell, bit, coarse):
    """Coarse index (8, v) of the corners of cells on one axis."""
    return tl.minimum(tl.maximum(cell, 0)[None, :] + bit, coarse - 1)


@triton.jit
def _corners(pointers, stride_k, classes, rate, inside):
    """What makes probabilities of logits: their largest, and 1 over the sum of exponentials, (8, v) each."""
    largest = tl.full(pointers.shape, float("-inf"), tl.float32)
    total = tl.zeros(pointers.shape, tl.float32)
    for _ in range(classes):
        a = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * rate
        larger = tl.maximum(largest, a)
        total = total * tl.exp(largest - larger) + tl.exp(a - larger)
        largest = larger
        pointers += stride_k  # step by step: k stride_k could overflow 32 bits
    return largest, 1.0 / total


@triton.jit
def _over_cells(
    pointers_s, pointers_t, largest_s, largest_t, scale_s, scale_t, rate, inside, d, h, w,
    D, H, W, fine_d, fine_h, fine_w, steps_d, steps_h, steps_w, side, SLOPE: tl.constexpr,
):  # fmt: skip
    """Sum over the fine voxels of each cell (v,) for one class.

    Of the divergence, or (``SLOPE``) of minus its derivative for the probability at the corner ``side``. One long
    function because Triton's interpreter takes milliseconds for each call of another.
    """
    q_s = tl.exp(tl.load(pointers_s, mask=inside, other=0.0).to(tl.float32) * rate - largest_s) * scale_s
    q_t = tl.exp(tl.load(pointers_t, mask=inside, other=0.0).to(tl.float32) * rate - largest_t) * scale_t
    corner = tl.arange(0, 8)[:, None]
    span_d, span_h, span_w = tl.maximum(fine_d - 1, 1), tl.maximum(fine_h - 1, 1), tl.maximum(fine_w - 1, 1)
    # The first fine index in each cell.
    first_d = (d * (fine_d - 1) + tl.maximum(D - 2, 0)) // tl.maximum(D - 1, 1)
    first_h = (h * (fine_h - 1) + tl.maximum(H - 2, 0)) // tl.maximum(H - 1, 1)
    first_w = (w * (fine_w - 1) + tl.maximum(W - 2, 0)) // tl.maximum(W - 1, 1)
    total = tl.zeros(d.shape, tl.float32)
    for i in range(steps_d):
        # How far the fine index lies in the cell, in units of 1 / span.
        ahead = (first_d + i) * (D - 1) - d * (fine_d - 1)
        valid_d = (first_d + i < fine_d) & (ahead < span_d)
        part = (ahead.to(tl.float32) / span_d)[None, :]
        weights_d = tl.where(corner // 4 == 1, part, 1.0 - part)
        for j in range(steps_h):
            ahead = (first_h + j) * (H - 1) - h * (fine_h - 1)
            valid_h = valid_d & (first_h + j < fine_h) & (ahead < span_h)
            part = (ahead.to(tl.float32) / span_h)[None, :]
            weights_h = weights_d * tl.where(corner // 2 % 2 == 1, part, 1.0 - part)
            for n in range(steps_w):
                ahead = (first_w + n) * (W - 1) - w * (fine_w - 1)
                valid = valid_h & (first_w + n < fine_w) & (ahead < span_w)
                part = (ahead.to(tl.float32) / span_w)[None, :]
                weights = weights_h * tl.where(corner % 2 == 1, part, 1.0 - part)
                p_s = tl.sum(weights * q_s, axis=0)
                c_s, c_t = tl.maximum(p_s, _CLAMP), tl.maximum(tl.sum(weights * q_t, axis=0), _CLAMP)
                if SLOPE:
                    weight = tl.sum(tl.where(corner == side, weights, 0.0), axis=0)
                    total += tl.where(valid & (p_s >= _CLAMP), weight * c_t / c_s, 0.0)
                else:
                    total += tl.where(valid, c_t * tl.log(c_t / c_s), 0.0)
    return total


@triton.jit
def _divergence(
    student, s_b, s_k, s_v, teacher, t_b, t_k, t_v, partial,
    D, H, W, fine_d, fine_h, fine_w, steps_d, steps_h, steps_w, classes, rate, BLOCK: tl.constexpr,
):  # fmt: skip
    """The divergence in a block of cells, to partial (B, blocks)."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    v = block * BLOCK + tl.arange(0, BLOCK)
    existing = v // W // H < D
    d, h, w = (v // W // H).to(tl.int32), (v // W % H).to(tl.int32), (v % W).to(tl.int32)
    corner = tl.arange(0, 8)[:, None]
    bit_d, bit_h, bit_w = corner // 4, corner // 2 % 2, corner % 2
    at = (_corner(d, bit_d, D).to(tl.int64) * H + _corner(h, bit_h, H)) * W + _corner(w, bit_w, W)
    pointers_s = student + b * s_b + at * s_v
    pointers_t = teacher + b * t_b + at * t_v
    inside = existing[None, :] & (corner < 8)
    largest_s, scale_s = _corners(pointers_s, s_k, classes, rate, inside)
    largest_t, scale_t = _corners(pointers_t, t_k, classes, rate, inside)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(classes):
        total += _over_cells(
            pointers_s, pointers_t, largest_s, largest_t, scale_s, scale_t, rate, inside, d, h, w,
            D, H, W, fine_d, fine_h, fine_w, steps_d, steps_h, steps_w, 0, SLOPE=False,
        )  # fmt: skip
        pointers_s += s_k
        pointers_t += t_k
    total = tl.where(existing, total, 0.0)
    tl.store(partial + b * tl.num_programs(0) + block, tl.sum(total))


@triton.jit
def _gradient(
    student, s_b, s_k, s_v, teacher, t_b, t_k, t_v, result, r_b, r_k, r_v, scale,
    D, H, W, fine_d, fine_h, fine_w, steps_d, steps_h, steps_w, classes, rate, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of coarse voxels; ``scale`` (B,) holds what all of a sample are multiplied by."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    v = block * BLOCK + tl.arange(0, BLOCK)
    existing = v // W // H < D
    d, h, w = (v // W // H).to(tl.int32), (v // W % H).to(tl.int32), (v % W).to(tl.int32)
    corner = tl.arange(0, 8)[:, None]
    bit_d, bit_h, bit_w = corner // 4, corner // 2 % 2, corner % 2
    every_k = tl.arange(0, K).to(tl.int64)[:, None]
    slope = tl.zeros((K, BLOCK), tl.float32)
    for side in range(8):
        # The voxel is this corner of the cell.
        cell_d, cell_h, cell_w = d - side // 4, h - side // 2 % 2, w - side % 2
        real = existing & (cell_d >= 0) & (cell_h >= 0) & (cell_w >= 0)
        at = (_corner(cell_d, bit_d, D).to(tl.int64) * H + _corner(cell_h, bit_h, H)) * W + _corner(cell_w, bit_w, W)
        pointers_s = student + b * s_b + at * s_v
        pointers_t = teacher + b * t_b + at * t_v
        inside = real[None, :] & (corner < 8)
        largest_s, scale_s = _corners(pointers_s, s_k, classes, rate, inside)
        largest_t, scale_t = _corners(pointers_t, t_k, classes, rate, inside)
        for k in range(classes):
            pull = _over_cells(
                pointers_s, pointers_t, largest_s, largest_t, scale_s, scale_t, rate, inside, cell_d, cell_h, cell_w,
                D, H, W, fine_d, fine_h, fine_w, steps_d, steps_h, steps_w, side, SLOPE=True,
            )  # fmt: skip
            pull = tl.where(real, pull, 0.0)
            pointers_s += s_k
            pointers_t += t_k
            slope -= tl.where(every_k == k, pull[None, :], 0.0)
    inside = existing[None, :] & (every_k < classes)
    offsets = b * s_b + every_k * s_k + v[None, :] * s_v
    a = tl.load(student + offsets, mask=inside, other=0.0).to(tl.float32) * rate
    a = tl.where(every_k < classes, a, float("-inf"))
    e = tl.exp(a - tl.max(a, axis=0)[None, :])
    q = e / tl.sum(e, axis=0)[None, :]
    slope = tl.load(scale + b) * q * (slope - tl.sum(q * slope, axis=0)[None, :])
    offsets = b * r_b + every_k * r_k + v[None, :] * r_v
    tl.store(result + offsets, slope.to(result.dtype.element_ty), mask=inside)


def divergence(student: Tensor, teacher: Tensor, temperature: float, scale_factor: int) -> Tensor:
    """The clamped divergence (B,) of up-sampled probabilities, in float32."""
    zs, zt = flatten_voxels(student), flatten_voxels(teacher)
    batch, classes, voxels = zs.shape
    partial = torch.empty(batch, triton.cdiv(voxels, _BLOCK), dtype=torch.float32, device=zs.device)
    geometry, fine_voxels = _geometry(student, scale_factor)
    maps = (*with_strides(zs), *with_strides(zt))
    grid = (partial.shape[1], batch)
    launch(_divergence, grid, *maps, partial, *geometry, classes, 1 / temperature, BLOCK=_BLOCK)
    return partial.sum(1) * (temperature**2 / (classes * fine_voxels))


def gradient(upstream: Tensor, student: Tensor, teacher: Tensor, temperature: float, scale_factor: int) -> Tensor:
    """Gradient of the student's logits, in their dtype, computed in float32."""
    zs, zt, result = flatten_voxels(student), flatten_voxels(teacher), empty_gradient(student)
    batch, classes, voxels = zs.shape
    geometry, fine_voxels = _geometry(student, scale_factor)
    scale = upstream.to(torch.float32) * (temperature / (classes * fine_voxels))
    maps = (*with_strides(zs), *with_strides(zt), *with_strides(flatten_voxels(result)))
    grid = (triton.cdiv(voxels, _BLOCK), batch)
    padded = triton.next_power_of_2(classes)
    launch(_gradient, grid, *maps, scale, *geometry, classes, 1 / temperature, K=padded, BLOCK=_BLOCK)
    return result


def _geometry(student: Tensor, scale_factor: int) -> tuple[tuple[int, ...], int]:
    """Coarse sizes, fine sizes, how many fine planes a cell has at most, on three axes; number of fine voxels."""
    coarse = tuple(student.shape[2:])
    fine = tuple(size * scale_factor for size in coarse)
    if len(coarse) == 2:
        coarse, fine = (1, *coarse), (1, *fine)
    steps = (f if c == 1 else -((f - 1) // (1 - c)) for c, f in zip(coarse, fine, strict=True))
    return (*coarse, *fine, *steps), math.prod(fine)
