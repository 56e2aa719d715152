"""Pixel distillation on a GPU: a program holds all classes of a block of voxels and reads each logit once.

Every block writes one partial sum and PyTorch adds them up, so nothing depends on the order of programs.
"""

# The parameters of kernels are pointers and numbers of Triton's own; only launchers are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from passion_plugin.losses._common import MIN_PROBABILITY, empty_gradient, flatten_voxels
from passion_plugin.losses.kernels import _pixel_upsampled, launch, with_strides

_CLAMP = tl.constexpr(MIN_PROBABILITY)

# Finite, so that the difference of two paddings is 0 and no NaN.
_PADDING = tl.constexpr(-1e38)


@triton.jit
def _load(pointer, b, k, v, stride_b, stride_k, stride_v, classes, voxels, rate):
    """Logits (k, v) over T in float32; 0 beyond the last voxel, where student and teacher so agree."""
    offsets = b * stride_b + k[:, None] * stride_k + v[None, :] * stride_v
    inside = (k[:, None] < classes) & (v[None, :] < voxels)
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32) * rate


@triton.jit
def _powers(a, k, classes):
    """``a - max a``, its exponential, and the sum of that over the classes (1, v)."""
    a = tl.where(k[:, None] < classes, a, _PADDING)
    a = a - tl.max(a, axis=0)[None, :]
    e = tl.exp(a)
    return a, e, tl.sum(e, axis=0)[None, :]


@triton.jit
def _log1p(x):
    """log(1 + x) to the last digits of a small x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _divergence(
    student, s_b, s_k, s_v, teacher, t_b, t_k, t_v, partial, classes, voxels, rate,
    KIND: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The divergence of a block of voxels, to partial (B, blocks)."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k, v = tl.arange(0, K).to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)
    a_s = _load(student, b, k, v, s_b, s_k, s_v, classes, voxels, rate)
    a_t = _load(teacher, b, k, v, t_b, t_k, t_v, classes, voxels, rate)
    if KIND == "sigmoid":
        e_s, e_t = tl.exp(-tl.abs(a_s)), tl.exp(-tl.abs(a_t))
        gap = tl.sigmoid(a_t) * (a_t - a_s) + (tl.maximum(a_s, 0.0) - tl.maximum(a_t, 0.0))
        total = tl.sum(gap + _log1p((e_s - e_t) / (1.0 + e_t)))
    else:
        a_s, e_s, total_s = _powers(a_s, k, classes)
        a_t, e_t, total_t = _powers(a_t, k, classes)
        if KIND == "softmax":
            weighted = tl.sum(e_t * (a_t - a_s), axis=0)[None, :] / total_t
            total = tl.sum(weighted + tl.log(total_s / total_t))
        else:
            q_s, q_t = tl.maximum(e_s / total_s, _CLAMP), tl.maximum(e_t / total_t, _CLAMP)
            total = tl.sum(q_t * tl.log(q_t / q_s))
    tl.store(partial + b * tl.num_programs(0) + block, total)


@triton.jit
def _gradient(
    student, s_b, s_k, s_v, teacher, t_b, t_k, t_v, result, r_b, r_k, r_v, scale, classes, voxels, rate,
    KIND: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of voxels; ``scale`` (B,) holds what all of a sample are multiplied by."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k, v = tl.arange(0, K).to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)
    a_s = _load(student, b, k, v, s_b, s_k, s_v, classes, voxels, rate)
    a_t = _load(teacher, b, k, v, t_b, t_k, t_v, classes, voxels, rate)
    if KIND == "sigmoid":
        slope = tl.sigmoid(a_s) - tl.sigmoid(a_t)
    else:
        a_s, e_s, total_s = _powers(a_s, k, classes)
        a_t, e_t, total_t = _powers(a_t, k, classes)
        q_s, q_t = e_s / total_s, e_t / total_t
        if KIND == "softmax":
            slope = q_s - q_t
        else:
            # q h = -c(q_t) where the student is not clamped: there c(q_s) = q_s.
            pulled = tl.where(q_s >= _CLAMP, tl.maximum(q_t, _CLAMP), 0.0)
            slope = q_s * tl.sum(pulled, axis=0)[None, :] - pulled
    offsets = b * r_b + k[:, None] * r_k + v[None, :] * r_v
    inside = (k[:, None] < classes) & (v[None, :] < voxels)
    tl.store(result + offsets, (tl.load(scale + b) * slope).to(result.dtype.element_ty), mask=inside)


def divergence(student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int) -> Tensor:
    """Divergence (B,) in float32."""
    if scale_factor > 1:
        return _pixel_upsampled.divergence(student, teacher, temperature, scale_factor)
    zs, zt = flatten_voxels(student), flatten_voxels(teacher)
    batch, classes, voxels = zs.shape
    padded, block = _tile(classes)
    partial = torch.empty(batch, triton.cdiv(voxels, block), dtype=torch.float32, device=zs.device)
    maps = (*with_strides(zs), *with_strides(zt))
    settings = {"KIND": kind, "K": padded, "BLOCK": block}
    launch(_divergence, (partial.shape[1], batch), *maps, partial, classes, voxels, 1 / temperature, **settings)
    return partial.sum(1) * (temperature**2 / (classes * voxels))


def gradient(
    upstream: Tensor, student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int
) -> Tensor:
    """Gradient of the student's logits, in their dtype, computed in float32."""
    if scale_factor > 1:
        return _pixel_upsampled.gradient(upstream, student, teacher, temperature, scale_factor)
    zs, zt, result = flatten_voxels(student), flatten_voxels(teacher), empty_gradient(student)
    batch, classes, voxels = zs.shape
    padded, block = _tile(classes)
    scale = upstream.to(torch.float32) * (temperature / (classes * voxels))
    maps = (*with_strides(zs), *with_strides(zt), *with_strides(flatten_voxels(result)))
    settings = {"KIND": kind, "K": padded, "BLOCK": block}
    grid = (triton.cdiv(voxels, block), batch)
    launch(_gradient, grid, *maps, scale, classes, voxels, 1 / temperature, **settings)
    return result


def _tile(classes: int) -> tuple[int, int]:
    """Classes and voxels of a tile: about 2048 logits, and a voxel at least for each of 128 threads."""
    padded = triton.next_power_of_2(classes)
    return padded, max(128, 2048 // padded)
