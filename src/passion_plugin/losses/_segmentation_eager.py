"""The eager body of :mod:`passion_plugin.ops.segmentation`: chunk by chunk, gradients written out."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from passion_plugin.losses._common import outside_autocast, voxel_chunks, wide_dtype

__all__ = ["EPS", "differ", "gradient", "log", "losses_and_sums"]

EPS = 1e-7


def losses_and_sums(
    logits: Tensor, labels: Tensor, regions: bool, lowest: float, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy (B,), Dice loss (B,) and the sums (B, 6, K) that both are made of."""
    z, y = logits.flatten(2), labels.flatten(2 if regions else 1)
    sums = z.new_zeros((len(z), 6, z.shape[1]), dtype=wide_dtype(z))
    add = partial(_region_sums if regions else _class_sums, lowest=lowest, ignore_index=ignore_index)
    with outside_autocast(z):
        for part in voxel_chunks(z.shape[2], len(z) * z.shape[1]):
            sums += add(z[..., part].to(sums.dtype), y[..., part])
    sums[:, 0].clamp_(min=1)
    voxels, count, overlap, predicted, inside, outside = sums.unbind(1)
    # Not 1 - count / voxels, which has lost its digits where a class fills nearly all of a volume.
    entropy = ((voxels - count) / voxels * inside + count / voxels * outside) / voxels
    dice = 2 * overlap / (predicted + count + EPS)
    return entropy.mean(1) if regions else entropy.sum(1), 1 - dice.mean(1), sums


def gradient(
    to_entropy: Tensor,
    to_dice: Tensor,
    sums: Tensor,
    logits: Tensor,
    labels: Tensor,
    regions: bool,
    lowest: float,
    ignore_index: int | None,
) -> Tensor:
    """Gradient of the logits, in their dtype, from those of the two losses, (B,) each, and the sums of forward."""
    z, y = logits.flatten(2), labels.flatten(2 if regions else 1)
    result = torch.empty_like(z)
    slopes = _slopes(to_entropy, to_dice, sums, regions)
    slope = partial(_region_gradient if regions else _class_gradient, lowest=lowest, ignore_index=ignore_index)
    with outside_autocast(z):
        for part in voxel_chunks(z.shape[2], len(z) * z.shape[1]):
            result[..., part] = slope(z[..., part].to(sums.dtype), y[..., part], slopes)
    return result.view(logits.shape)


def differ(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels are not ``ignore_index``; as int64, for a uint8 tensor compared with -1 would find 255."""
    return labels.long() != ignore_index


def log(lowest: float) -> float:
    """Logarithm of a bound on a probability, that of 0 too."""
    return math.log(lowest) if lowest else -math.inf


def _class_sums(z: Tensor, labels: Tensor, *, lowest: float, ignore_index: int | None) -> Tensor:
    """The sums (B, 6, K) over a chunk, z (B, K, C) and class numbers (B, C)."""
    member, z, counted = _members(labels, z, ignore_index)
    log_p = z.log_softmax(1)
    # An impossible class has the logit -inf, of which a product would make NaN where the voxel is of another class.
    least = torch.finfo(log_p.dtype).min
    bounded = log_p.clamp(min=log(lowest)) if lowest else log_p.clamp_(min=least)
    inside = -(bounded * member).sum(-1)
    inside = torch.where(inside >= -least, torch.inf, inside)
    p = log_p.mul_(1 / math.log(2)).exp2_()  # a quarter of the time of exp_
    p = p if counted is None else p.mul_(counted)
    count, predicted, overlap = member.sum(-1), p.sum(-1), p.mul_(member).sum(-1)
    voxels = count.sum(1, keepdim=True).expand_as(count)
    return torch.stack((voxels, count, overlap, predicted, inside, torch.zeros_like(inside)), 1)


def _region_sums(z: Tensor, masks: Tensor, *, lowest: float, ignore_index: int | None) -> Tensor:
    """The sums (B, 6, K) over a chunk, z and masks (B, K, C). There is no official code for regions to clamp like."""
    member, counted = masks != 0, torch.ones_like(masks, dtype=torch.bool)
    if ignore_index is not None:
        counted = differ(masks, ignore_index)
        member, z = member & counted, torch.where(counted, z, 0)
    p = z.sigmoid()
    nll = functional.logsigmoid(torch.where(member, z, -z)).neg_()
    if ignore_index is not None:
        p *= counted
        nll *= counted
    member = member.to(z.dtype)
    inside = nll * member
    terms = (counted, member, p * member, p, inside, nll.sub_(inside))
    return torch.stack([term.sum(-1, dtype=z.dtype) for term in terms], 1)


def _slopes(to_entropy: Tensor, to_dice: Tensor, sums: Tensor, regions: bool) -> tuple[Tensor, ...]:
    """What the gradient of class k depends on, (B, K, 1) each.

    Returns:
        Derivative of Dice by p where the voxel does not belong to k, what is added to it where it does, and the
        weights of -log p and -log(1 - p) in cross-entropy.
    """
    voxels, count, overlap, predicted, _, _ = sums.unsqueeze(-1).unbind(1)
    size = predicted + count + EPS
    dice = 2 / voxels.shape[1] * to_dice.view(-1, 1, 1) / size
    entropy = to_entropy.view(-1, 1, 1) / voxels / (voxels.shape[1] if regions else 1)
    return dice * overlap / size, -dice, entropy * ((voxels - count) / voxels), entropy * (count / voxels)


def _class_gradient(
    z: Tensor, labels: Tensor, slopes: tuple[Tensor, ...], *, lowest: float, ignore_index: int | None
) -> Tensor:
    """Gradient of a chunk z (B, K, C): with a_k = d Dice / d p_k, p_k (a_k - sum_j p_j a_j) + w_y (p_k - Y_k)."""
    outside, step, weight, _ = slopes
    member, z, counted = _members(labels, z, ignore_index)
    p = z.softmax(1)
    weight = torch.bmm(weight.mT, member)
    if lowest:
        weight *= (p * member).sum(1, keepdim=True) >= lowest
    result = (member * step).add_(outside).mul_(p)
    result.addcmul_(p, weight - result.sum(1, keepdim=True)).addcmul_(member, weight, value=-1)
    return result if counted is None else result.mul_(counted)


def _region_gradient(
    z: Tensor, masks: Tensor, slopes: tuple[Tensor, ...], *, lowest: float, ignore_index: int | None
) -> Tensor:
    """Gradient of a chunk z (B, K, C): that of Dice by p times p (1 - p), and that of a two-class cross-entropy."""
    outside, step, weight_inside, weight_outside = slopes
    if ignore_index is not None:
        z = torch.where(differ(masks, ignore_index), z, 0)
    p, member = z.sigmoid(), masks != 0
    result = p * (1 - p) * torch.where(member, outside + step, outside)
    result += torch.where(member, weight_inside * (p - 1), weight_outside * p)
    return result if ignore_index is None else result.mul_(differ(masks, ignore_index))


def _members(labels: Tensor, z: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which class each voxel of z (B, K, C) belongs to, as 0 and 1; z; and which voxels count (B, 1, C), None: all.

    Where a voxel does not count z is 0, whatever was there.
    """
    numbers = labels.to(z.dtype).unsqueeze(1)
    counted = None
    if ignore_index is not None:
        counted = differ(labels, ignore_index).unsqueeze(1)
        numbers, z = torch.where(counted, numbers, -1), torch.where(counted, z, 0)
    member = z.new_empty(z.shape)
    # Compared as floating numbers: several times as fast as integers.
    torch.eq(numbers, torch.arange(z.shape[1], dtype=z.dtype, device=z.device).view(-1, 1), out=member)
    return member, z, counted
