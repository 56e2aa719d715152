"""Triton kernels of :mod:`passion_plugin.losses.segmentation_loss`, in tiles of all classes by a block of voxels.

Forward reads the logits in one kernel, which leaves partial sums per program, and adds those up in a second one.
Backward is one kernel. Nothing is added atomically, so the same input gives the same bits.
"""

# The parameters of kernels are pointers and numbers of Triton's own; only launchers are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from passion_plugin.losses._common import DICE_EPS, empty_gradient, flatten_both, flatten_voxels
from passion_plugin.losses.kernels import launch, with_strides

_EPS = tl.constexpr(DICE_EPS)

# Logits in a tile: few enough for registers, enough to keep many loads in flight.
_TILE = 2048

# Partial sums of one kind that the second kernel of forward holds at once.
_PARTIALS = 8192


def losses_and_sums(
    logits: Tensor, labels: Tensor, lowest: float, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (B,), Dice loss (B,) and the sums (B, 6, K) in float32, as the eager code gives them."""
    z, y = flatten_both(logits, labels)
    batch, classes, voxels = z.shape
    rows, block = _tile_shape(classes)
    blocks = triton.cdiv(voxels, block)
    tiles = triton.cdiv(blocks, _PARTIALS // rows)
    programs = triton.cdiv(blocks, tiles)
    partials = z.new_empty((batch, 6, classes, programs), dtype=torch.float32)
    sums = z.new_empty((batch, 6, classes), dtype=torch.float32)
    entropy, dice = sums.new_empty(batch), sums.new_empty(batch)
    highest = -math.log(lowest) if lowest else math.inf
    sizes = (classes, voxels, tiles, highest, ignore_index or 0)
    tile = {"IGNORES": ignore_index is not None, "REGIONS": y.ndim == 3, "ROWS": rows, "BLOCK": block}
    launch(_partial_sums, (programs, batch), *with_strides(z), *with_strides(y), partials, *sizes, **tile)
    padded = triton.next_power_of_2(programs)
    settings = {"REGIONS": y.ndim == 3, "ROWS": rows, "PROGRAMS": padded}
    launch(_finish, (batch,), partials, sums, entropy, dice, classes, programs, **settings)
    return entropy, dice, sums


def gradient(
    to_entropy: Tensor,
    to_dice: Tensor,
    logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    lowest: float,
    ignore_index: int | None,
) -> Tensor:
    """Gradient of the logits, in their dtype, as the eager code gives it."""
    (z, y), result = flatten_both(logits, labels), empty_gradient(logits)
    batch, classes, voxels = z.shape
    rows, block = _tile_shape(classes)
    maps = (*with_strides(z), *with_strides(y), *with_strides(flatten_voxels(result)))
    upstream = (to_entropy, to_entropy.stride(0), to_dice, to_dice.stride(0))
    tile = {"IGNORES": ignore_index is not None, "REGIONS": y.ndim == 3, "ROWS": rows, "BLOCK": block}
    grid = (triton.cdiv(voxels, block), batch)
    launch(_gradient, grid, *maps, *upstream, sums, classes, voxels, lowest, ignore_index or 0, **tile)
    return result


def _tile_shape(classes: int) -> tuple[int, int]:
    rows = triton.next_power_of_2(classes)
    return rows, max(32, _TILE // rows)


@triton.jit
def _partial_sums(
    logits, logits_b, logits_k, logits_v, labels, labels_b, labels_k, labels_v, partials, K, V, tiles, highest, ignore,
    IGNORES: tl.constexpr, REGIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The six sums over ``tiles`` tiles, to partials (B, 6, K, programs)."""
    program, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    logits += batch * logits_b
    labels += batch * labels_b
    k = tl.arange(0, ROWS).to(tl.int64)
    voxels = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    overlap = tl.zeros((ROWS,), tl.float32)
    predicted = tl.zeros((ROWS,), tl.float32)
    inside = tl.zeros((ROWS,), tl.float32)
    outside = tl.zeros((ROWS,), tl.float32)
    for tile in range(tiles):
        v = (program * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        z, member, counted = _load(
            logits, labels, k, v, K, V, logits_k, logits_v, labels_k, labels_v, ignore, IGNORES, REGIONS
        )
        if REGIONS:
            p = tl.sigmoid(z)
            nll = _softplus(tl.where(member, -z, z))
            outside += tl.sum(tl.where(counted & ~member, nll, 0.0), 1)
        else:
            shifted, exponential, total = _softmax(z, k, K)
            p = exponential / total
            nll = tl.log(total) - shifted
            # Not tl.minimum: it would hide NaN.
            nll = tl.where(nll > highest, highest, nll)
        voxels += tl.sum(counted.to(tl.float32), 1)
        count += tl.sum(member.to(tl.float32), 1)
        overlap += tl.sum(tl.where(member, p, 0.0), 1)
        predicted += tl.sum(tl.where(counted, p, 0.0), 1)
        inside += tl.sum(tl.where(member, nll, 0.0), 1)
    programs = tl.num_programs(0)
    to = partials + (batch * 6 * K + k) * programs + program
    step = K * programs
    tl.store(to, voxels, mask=k < K)
    tl.store(to + step, count, mask=k < K)
    tl.store(to + 2 * step, overlap, mask=k < K)
    tl.store(to + 3 * step, predicted, mask=k < K)
    tl.store(to + 4 * step, inside, mask=k < K)
    tl.store(to + 5 * step, outside, mask=k < K)


@triton.jit
def _finish(
    partials, sums, entropy, dice, K, programs, REGIONS: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Add up the partial sums of a sample and turn them into its losses."""
    batch = tl.program_id(0).to(tl.int64)
    partials += batch * 6 * K * programs
    k = tl.arange(0, ROWS)
    voxels = tl.maximum(_total(partials, 0, k, K, programs, PROGRAMS), 1.0)
    count = _total(partials, 1, k, K, programs, PROGRAMS)
    overlap = _total(partials, 2, k, K, programs, PROGRAMS)
    predicted = _total(partials, 3, k, K, programs, PROGRAMS)
    inside = _total(partials, 4, k, K, programs, PROGRAMS)
    outside = _total(partials, 5, k, K, programs, PROGRAMS)
    to = sums + batch * 6 * K + k
    tl.store(to, voxels, mask=k < K)
    tl.store(to + K, count, mask=k < K)
    tl.store(to + 2 * K, overlap, mask=k < K)
    tl.store(to + 3 * K, predicted, mask=k < K)
    tl.store(to + 4 * K, inside, mask=k < K)
    tl.store(to + 5 * K, outside, mask=k < K)
    terms = ((voxels - count) / voxels * inside + count / voxels * outside) / voxels
    tl.store(entropy + batch, tl.sum(terms, 0) / (K if REGIONS else 1))
    tl.store(dice + batch, 1 - tl.sum(2 * overlap / (predicted + count + _EPS), 0) / K)


@triton.jit
def _gradient(
    logits, logits_b, logits_k, logits_v, labels, labels_b, labels_k, labels_v, result, result_b, result_k, result_v,
    to_entropy, entropy_b, to_dice, dice_b, sums, K, V, lowest, ignore,
    IGNORES: tl.constexpr, REGIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile; the arithmetic is that of the eager code."""
    batch = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, ROWS).to(tl.int64)
    sums += batch * 6 * K + k
    voxels = tl.load(sums, mask=k < K, other=1.0)
    count = tl.load(sums + K, mask=k < K, other=0.0)
    overlap = tl.load(sums + 2 * K, mask=k < K, other=0.0)
    size = tl.load(sums + 3 * K, mask=k < K, other=0.0) + count + _EPS
    dice = 2 * tl.load(to_dice + batch * dice_b) / K / size
    entropy = tl.load(to_entropy + batch * entropy_b) / voxels
    if REGIONS:
        entropy = entropy / K
    weight = (entropy * ((voxels - count) / voxels))[:, None]

    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    logits += batch * logits_b
    labels += batch * labels_b
    z, member, counted = _load(
        logits, labels, k, v, K, V, logits_k, logits_v, labels_k, labels_v, ignore, IGNORES, REGIONS
    )
    slope = (dice * overlap / size)[:, None] - tl.where(member, dice[:, None], 0.0)
    if REGIONS:
        p = tl.sigmoid(z)
        found = p * (1 - p) * slope + tl.where(member, weight * (p - 1), (entropy * (count / voxels))[:, None] * p)
    else:
        _, exponential, total = _softmax(z, k, K)
        p = exponential / total
        pull = tl.where(member & (p >= lowest), weight, 0.0)
        found = p * (slope + tl.sum(pull - p * slope, 0)[None, :]) - pull
    to = result + batch * result_b + k[:, None] * result_k + v[None, :] * result_v
    found = tl.where(counted, found, 0.0)
    tl.store(to, found.to(result.dtype.element_ty), mask=(k < K)[:, None] & (v < V)[None, :])


@triton.jit
def _load(
    logits, labels, k, v, K, V, logits_k, logits_v, labels_k, labels_v, ignore,
    IGNORES: tl.constexpr, REGIONS: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS, BLOCK): logits, where the voxel belongs to k, where it counts."""
    k, v = k[:, None], v[None, :]
    counted = (k < K) & (v < V)
    z = tl.load(logits + k * logits_k + v * logits_v, mask=counted, other=0.0).to(tl.float32)
    if REGIONS:
        y = tl.load(labels + k * labels_k + v * labels_v, mask=counted, other=0)
        member = counted & (y != 0)
    else:
        y = tl.load(labels + v * labels_v, mask=v < V, other=0)
        member = counted & (y.to(tl.int64) == k)
    if IGNORES:
        counted = counted & (y.to(tl.int64) != ignore)
        member = member & counted
    return z, member, counted


@triton.jit
def _softmax(z, k, K):
    """Logits minus the greatest of their voxel, the exponentials of that (0 beyond K), and their sum."""
    known = (k < K)[:, None]
    shifted = z - tl.max(tl.where(known, z, -float("inf")), 0)[None, :]
    exponential = tl.where(known, tl.exp(shifted), 0.0)
    return shifted, exponential, tl.sum(exponential, 0)[None, :]


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))``; the quotient gives back the digits that 1 + e has lost."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    return tl.where(x > 0, x, 0.0) + tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _total(partials, row, k, K, programs, PROGRAMS: tl.constexpr):
    """Sum (ROWS,) of the partial sums of kind ``row``."""
    program = tl.arange(0, PROGRAMS)[None, :]
    here = partials + (row * K + k[:, None]) * programs + program
    return tl.sum(tl.load(here, mask=(k[:, None] < K) & (program < programs), other=0.0), 1)
