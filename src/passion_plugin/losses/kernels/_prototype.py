"""The passes of prototype distillation on a GPU.

A program holds all channels and classes of a few voxels, so features are loaded once per pass. It walks over
``_SPAN`` voxels and writes one row of sums; PyTorch adds up the rows. Nothing depends on the order of programs.
"""

# The parameters of kernels are pointers and numbers of Triton's own; only launchers are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from passion_plugin.losses._common import COSINE_EPS
from passion_plugin.losses.kernels import launch, with_strides

# Rows of sums then take about K / 1024 of what features take in float32, whatever the number of channels.
_SPAN = 1024

_EPS_SQUARED = tl.constexpr(COSINE_EPS**2)


@triton.jit
def _load_features(pointer, b, c, v, stride_b, stride_c, stride_v, channels, voxels):
    """Features (c, v) in float32, 0 beyond the ends."""
    offsets = b * stride_b + c[:, None] * stride_c + v[None, :] * stride_v
    return tl.load(pointer + offsets, mask=(c[:, None] < channels) & (v[None, :] < voxels), other=0.0).to(tl.float32)


@triton.jit
def _load_rows(pointer, b, k, c, classes, channels):
    """Numbers (k, c) of a contiguous (B, K, C), 0 beyond the ends."""
    offsets = (b * classes + k[:, None]) * channels + c[None, :]
    return tl.load(pointer + offsets, mask=(k[:, None] < classes) & (c[None, :] < channels), other=0.0)


@triton.jit
def _load_members(
    labels, b, k, v, stride_b, stride_k, stride_v, classes, voxels, ignore_index,
    REGIONS: tl.constexpr, IGNORE: tl.constexpr,
):  # fmt: skip
    """Which voxels belong to which class, (k, v) of 0.0 and 1.0."""
    inside = (k[:, None] < classes) & (v[None, :] < voxels)
    if REGIONS:
        y = tl.load(labels + b * stride_b + k[:, None] * stride_k + v[None, :] * stride_v, mask=inside, other=0)
        member = inside & (y != 0)
    else:
        y = tl.load(labels + b * stride_b + v * stride_v, mask=v < voxels, other=0)
        member = inside & (y[None, :] == k[:, None])
        if IGNORE:
            member = member & (y[None, :] != ignore_index)
    return tl.where(member, 1.0, 0.0)


@triton.jit
def _cosines(features, directions):
    """Cosines (k, v), 1 / l (v,), and where the bound on l acts (v,)."""
    squared = tl.sum(features * features, axis=0)
    scale = 1.0 / tl.sqrt(tl.maximum(squared, _EPS_SQUARED))
    return tl.dot(directions, features, input_precision="ieee") * scale[None, :], scale, squared < _EPS_SQUARED


@triton.jit
def _without_ignored(gap, labels, b, v, stride_b, stride_v, voxels, ignore_index, IGNORE: tl.constexpr):
    if IGNORE:
        y = tl.load(labels + b * stride_b + v * stride_v, mask=v < voxels, other=0)
        gap = tl.where(y[None, :] != ignore_index, gap, 0.0)
    return gap


@triton.jit
def _store_columns(rows, row, k, column, values, classes, width, first, count):
    """Write ``values`` (k, column) into the columns from ``first`` of one row (K, width)."""
    offsets = (row * classes + k[:, None]) * width + first + column[None, :]
    tl.store(rows + offsets, values, mask=(k[:, None] < classes) & (column[None, :] < count))


@triton.jit
def _class_sums_kernel(
    student, s_b, s_c, s_v, teacher, t_b, t_c, t_v, labels, y_b, y_k, y_v, rows,
    voxels, classes, student_channels, teacher_channels, ignore_index,
    REGIONS: tl.constexpr, IGNORE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Row (K, Cs + Ct + 1) of a program: sums of the student's and the teacher's features, number of voxels."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    cs, ct = tl.arange(0, BLOCK_S).to(tl.int64), tl.arange(0, BLOCK_T).to(tl.int64)
    sums_s = tl.zeros((BLOCK_K, BLOCK_S), tl.float32)
    sums_t = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    counts = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(STEPS):
        v = (block * STEPS + step) * BLOCK_V + tl.arange(0, BLOCK_V)
        member = _load_members(labels, b, k, v, y_b, y_k, y_v, classes, voxels, ignore_index, REGIONS, IGNORE)
        f = _load_features(student, b, cs, v, s_b, s_c, s_v, student_channels, voxels)
        sums_s += tl.dot(member, tl.trans(f), input_precision="ieee")
        t = _load_features(teacher, b, ct, v, t_b, t_c, t_v, teacher_channels, voxels)
        sums_t += tl.dot(member, tl.trans(t), input_precision="ieee")
        counts += tl.sum(member, axis=1)
    row = b * tl.num_programs(0) + block
    width = student_channels + teacher_channels + 1
    _store_columns(rows, row, k, cs, sums_s, classes, width, 0, student_channels)
    _store_columns(rows, row, k, ct, sums_t, classes, width, student_channels, teacher_channels)
    tl.store(rows + (row * classes + k) * width + width - 1, counts, mask=k < classes)


@triton.jit
def _gap_sums_kernel(
    student, s_b, s_c, s_v, teacher, t_b, t_c, t_v, labels, y_b, y_k, y_v, directions_s, directions_t, rows,
    voxels, classes, student_channels, teacher_channels, ignore_index,
    REGIONS: tl.constexpr, IGNORE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Row (K, Cs + 2) of a program: sums of gap times f / l, of the squared gap, and of its size."""
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    cs, ct = tl.arange(0, BLOCK_S).to(tl.int64), tl.arange(0, BLOCK_T).to(tl.int64)
    us = _load_rows(directions_s, b, k, cs, classes, student_channels)
    ut = _load_rows(directions_t, b, k, ct, classes, teacher_channels)
    grad_direction = tl.zeros((BLOCK_K, BLOCK_S), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    sizes = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(STEPS):
        v = (block * STEPS + step) * BLOCK_V + tl.arange(0, BLOCK_V)
        t = _load_features(teacher, b, ct, v, t_b, t_c, t_v, teacher_channels, voxels)
        target, _, _ = _cosines(t, ut)
        f = _load_features(student, b, cs, v, s_b, s_c, s_v, student_channels, voxels)
        similarity, scale, _ = _cosines(f, us)
        gap = _without_ignored(similarity - target, labels, b, v, y_b, y_v, voxels, ignore_index, IGNORE)
        squares += tl.sum(gap * gap, axis=1)
        sizes += tl.sum(tl.abs(gap), axis=1)
        grad_direction += tl.dot(gap * scale[None, :], tl.trans(f), input_precision="ieee")
    row = b * tl.num_programs(0) + block
    width = student_channels + 2
    _store_columns(rows, row, k, cs, grad_direction, classes, width, 0, student_channels)
    last = rows + (row * classes + k) * width + student_channels
    tl.store(last, squares, mask=k < classes)
    tl.store(last + 1, sizes, mask=k < classes)


@triton.jit
def _feature_gradient_kernel(
    student, s_b, s_c, s_v, teacher, t_b, t_c, t_v, labels, y_b, y_k, y_v, directions_s, directions_t,
    slopes, grad_sums, gradient, g_b, g_c, g_v, voxels, classes, student_channels, teacher_channels, ignore_index,
    REGIONS: tl.constexpr, IGNORE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    cs, ct = tl.arange(0, BLOCK_S).to(tl.int64), tl.arange(0, BLOCK_T).to(tl.int64)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    us = _load_rows(directions_s, b, k, cs, classes, student_channels)
    ut = _load_rows(directions_t, b, k, ct, classes, teacher_channels)
    t = _load_features(teacher, b, ct, v, t_b, t_c, t_v, teacher_channels, voxels)
    target, _, _ = _cosines(t, ut)
    f = _load_features(student, b, cs, v, s_b, s_c, s_v, student_channels, voxels)
    similarity, scale, bounded = _cosines(f, us)
    gap = _without_ignored(similarity - target, labels, b, v, y_b, y_v, voxels, ignore_index, IGNORE)
    slope = gap * tl.load(slopes + b * classes + k, mask=k < classes, other=0.0)[:, None] * scale[None, :]
    # A length at its bound does not change with f.
    radial = tl.where(bounded, 0.0, tl.sum(similarity * slope, axis=0) * scale)
    member = _load_members(labels, b, k, v, y_b, y_k, y_v, classes, voxels, ignore_index, REGIONS, IGNORE)
    result = tl.dot(tl.trans(us), slope, input_precision="ieee") - f * radial[None, :]
    by_sums = _load_rows(grad_sums, b, k, cs, classes, student_channels)
    result += tl.dot(tl.trans(by_sums), member, input_precision="ieee")
    tl.store(
        gradient + b * g_b + cs[:, None] * g_c + v[None, :] * g_v,
        result.to(gradient.dtype.element_ty),
        mask=(cs[:, None] < student_channels) & (v[None, :] < voxels),
    )


Maps = tuple[Tensor, Tensor, Tensor]
"""Features of the student (B, Cs, V) and of the teacher (B, Ct, V), class numbers (B, V) or masks (B, K, V)."""


def class_sums(maps: Maps, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the features of each class, (B, K, Cs) and (B, K, Ct), and its number of voxels (B, K)."""
    widths = (maps[0].shape[1], maps[1].shape[1], 1)
    total = _sum_rows(_class_sums_kernel, maps, (), num_classes, sum(widths), ignore_index)
    sums_s, sums_t, counts = total.split(widths, -1)
    return sums_s, sums_t, counts.squeeze(-1)


def gap_sums(maps: Maps, directions: tuple[Tensor, Tensor], ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over voxels of the squared and the absolute gap, (B, K) each, and of gap times f / l (B, K, Cs)."""
    _, classes, width = directions[0].shape
    total = _sum_rows(_gap_sums_kernel, maps, directions, classes, width + 2, ignore_index)
    return total[..., -2], total[..., -1], total[..., :-2]


def feature_gradient(
    maps: Maps, directions: tuple[Tensor, Tensor], slopes: Tensor, grad_sums: Tensor, ignore_index: int | None
) -> Tensor:
    """Gradient (B, Cs, V) of the student's features, in their dtype."""
    arguments, sizes, tile = _arguments(maps, slopes.shape[1], ignore_index)
    gradient = torch.empty_like(maps[0])
    small = (tensor.contiguous() for tensor in (*directions, slopes, grad_sums))
    grid = (triton.cdiv(gradient.shape[2], tile["BLOCK_V"]), len(gradient))
    launch(_feature_gradient_kernel, grid, *arguments, *small, *with_strides(gradient), *sizes, **tile)
    return gradient


def _sum_rows(
    kernel: Any, maps: Maps, directions: tuple[Tensor, ...], num_classes: int, width: int, ignore_index: int | None
) -> Tensor:
    """Sums (B, K, width) over all voxels."""
    arguments, sizes, tile = _arguments(maps, num_classes, ignore_index)
    batch, _, voxels = maps[0].shape
    grid = (triton.cdiv(voxels, _SPAN), batch)
    rows = torch.empty(batch, grid[0], num_classes, width, dtype=torch.float32, device=maps[0].device)
    small = (tensor.contiguous() for tensor in directions)
    launch(kernel, grid, *arguments, *small, rows, *sizes, STEPS=_SPAN // tile["BLOCK_V"], **tile)
    return rows.sum(1)


def _arguments(
    maps: Maps, num_classes: int, ignore_index: int | None
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, int]]:
    """What all kernels take: three maps with strides, sizes, and the shape of a tile."""
    student, teacher, labels = maps
    sizes = (student.shape[2], num_classes, student.shape[1], teacher.shape[1], ignore_index or 0)
    # tl.dot wants 16 or more on each side.
    block_k, block_s, block_t = (max(16, triton.next_power_of_2(size)) for size in sizes[1:4])
    widest = max(block_k, block_s, block_t)
    tile = {
        "REGIONS": labels.ndim == 3,
        "IGNORE": ignore_index is not None,
        "BLOCK_K": block_k,
        "BLOCK_S": block_s,
        "BLOCK_T": block_t,
        # The largest tiles that ptxas keeps in registers, and that share 99 KB at C = 256, K = 32.
        "BLOCK_V": max(16, 2048 // widest),
        "num_warps": max(4, widest // 16),
        "num_stages": 2,
    }
    return (*with_strides(student), *with_strides(teacher), *with_strides(labels)), sizes, tile
