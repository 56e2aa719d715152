"""Segmentation losses of the uni-modal predictions: weighted cross-entropy and Dice (arXiv:2407.14796).

One custom operator computes both, with one softmax and one read of the logits in each direction. Both follow from six
sums over the voxels of a sample, (B, 6, K), for each class or region k:

* voxels: how many count; all but the ignored ones, and at least 1
* count: how many belong to k
* overlap: probability of k over the voxels that belong to k
* predicted: probability of k over all voxels
* inside: -log p over the voxels that belong to k
* outside: -log(1 - p) over the others; regions only, else 0

Backward needs nothing else in addition to the inputs: it computes the probabilities once more.
"""

# No `from __future__ import annotations`: custom_op of torch 2.5 wants types as annotations, not strings.

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from passion_plugin._types import Backend, Mode, Outputs
from passion_plugin._validate import Problems, check_labels, check_map, check_settings
from passion_plugin.losses import _common as common


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "default",
    outputs: Outputs = "softmax",
    check_values: bool = True,
    ignore_index: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """:func:`weighted_cross_entropy` plus :func:`dice_loss`, computed together for little more than one of them.

    Args:
        logits: (B, K, *spatial) with 2 or 3 spatial axes. K >= 2 for softmax, >= 1 for sigmoid.
        labels: softmax: class numbers (B, *spatial), integers (bool for K = 2); sigmoid: 0/1 masks (B, K, *spatial).
        mode: ``"default"`` or ``"official"`` (softmax only).
        outputs: ``"softmax"`` (exclusive classes) or ``"sigmoid"`` (regions).
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.
        ignore_index: label, or value in a mask, of voxels that count in no sum and no mean.
        backend: ``"auto"``: Triton kernels on CUDA where installed, else PyTorch; or ``"triton"``, ``"eager"``.

    Returns:
        (B,) in float32, or in float64 if the logits are; computed so under autocast too.

    Raises:
        ConfigError: a setting is unknown, or ``backend="triton"`` cannot be had.
        InputError: a tensor has the wrong shape, dtype or content.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])
        >>> segmentation_loss(torch.zeros(1, 2, 1, 4), labels)
        tensor([0.7933])
        >>> segmentation_loss(torch.zeros(1, 2, 1, 5), torch.tensor([[[0, 0, 0, 1, 255]]]), ignore_index=255)
        tensor([0.7933])
    """
    entropy, dice = _losses("segmentation_loss", logits, labels, mode, outputs, check_values, ignore_index, backend)
    return entropy + dice


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "default",
    outputs: Outputs = "softmax",
    check_values: bool = True,
    ignore_index: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Cross-entropy in which a class weighs the less, the more of the sample it fills.

    .. math::
        L_b = -\frac{1}{V} \sum_v \Bigl(1 - \frac{n_{b, y_{bv}}}{V}\Bigr) \log p_{b, y_{bv}, v},
        \qquad n_{bk} = \sum_v Y_{bkv}

    * ``mode="official"``: the published code, which clamps the probability to [0.005, 1] before its
      logarithm; a voxel below that bound gets no gradient. ``"default"`` has no clamp.
    * ``outputs="sigmoid"``: every region is a problem of two classes, inside and outside, weighed alike:

      .. math::
          L_b = -\frac{1}{K V} \sum_k \sum_v \Bigl[\Bigl(1 - \frac{n_{bk}}{V}\Bigr) Y_{bkv} \log p_{bkv}
          + \frac{n_{bk}}{V} (1 - Y_{bkv}) \log(1 - p_{bkv})\Bigr], \qquad p = \sigma(z)

      Default mode only. By this rule a region that is absent from the sample (or fills it) adds nothing, as
      in the two-class softmax loss.

    Arguments, errors and dtypes are those of :func:`segmentation_loss`.

    Returns:
        (B,) in float32 or float64.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])
        >>> weighted_cross_entropy(torch.zeros(1, 2, 1, 4), labels)  # (3 * 1/4 + 1 * 3/4) / 4 * log 2
        tensor([0.2599])
    """
    return _losses("weighted_cross_entropy", logits, labels, mode, outputs, check_values, ignore_index, backend)[0]


def dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "default",
    outputs: Outputs = "softmax",
    check_values: bool = True,
    ignore_index: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Soft Dice loss, the mean over all classes including the background.

    .. math::
        L_b = 1 - \frac{1}{K} \sum_k
        \frac{2 \sum_v p_{bkv} Y_{bkv}}{\sum_v p_{bkv} + \sum_v Y_{bkv} + 10^{-7}}

    Per sample, and with the small number in the denominator only: a class absent from the sample costs 1 / K
    whatever is predicted, without gradient. Other libraries decide otherwise on each of these points.
    Both modes are equal; ``outputs="sigmoid"`` uses :math:`p = \sigma(z)` and regions in place of classes.

    Arguments, errors and dtypes are those of :func:`segmentation_loss`.

    Returns:
        (B,) in float32 or float64.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])
        >>> dice_loss(torch.zeros(1, 2, 1, 4), labels)  # 1 - (3 / 5 + 1 / 3) / 2
        tensor([0.5333])
    """
    return _losses("dice_loss", logits, labels, mode, outputs, check_values, ignore_index, backend)[1]


def _losses(what: str, logits: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """Check the arguments of ``what`` and compute cross-entropy and Dice loss."""
    mode, outputs, check_values, ignore_index, backend = settings
    problems = Problems(what)
    check_settings(problems, mode, outputs, backend)
    kind, fewest = ("regions", 1) if outputs == "sigmoid" else ("classes", 2)
    if check_map(problems, "logits", logits, minimum=fewest):
        num_classes = logits.shape[1]
        check_labels(problems, labels, logits, num_classes, kind=kind, values=check_values, ignore_index=ignore_index)
    problems.raise_all()
    lowest = common.MIN_PROBABILITY if mode == "official" else 0.0
    entropy, dice, _ = _segmentation_op(logits, labels, lowest, ignore_index, backend)
    return entropy, dice


def plain_segmentation(
    logits: Tensor, labels: Tensor, lowest: float, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """The definition of both losses, (B,) each, which autograd can differentiate any number of times.

    Class numbers (B, *spatial) ask for a softmax, masks (B, K, *spatial) for a sigmoid. ``lowest`` is the bound below
    which cross-entropy clamps the probability of the true class; 0: no clamp.
    """
    z, y = common.flatten_both(logits.to(common.compute_dtype(logits)), labels)
    regions = y.ndim == 3
    entries = y if regions else rearrange(y, "b v -> b 1 v")
    counted = torch.ones_like(entries, dtype=torch.bool)
    if ignore_index is not None:
        counted = common.is_counted(entries, ignore_index)
    masks = common.class_masks(labels, z.shape[1], logits.ndim) & counted
    z = torch.where(counted, z, 0)
    voxels, count = counted.sum(-1, keepdim=True).clamp(min=1), masks.sum(-1, keepdim=True).to(z.dtype)
    if regions:
        p = z.sigmoid()
        weight = torch.where(masks, (voxels - count) / voxels, count / voxels) * counted / z.shape[1]
        nll = -F.logsigmoid(torch.where(masks, z, -z))
    else:
        p = z.softmax(1)
        weight = (voxels - count) / voxels * masks
        nll = torch.where(masks, -z.log_softmax(1).clamp(min=math.log(lowest) if lowest else -math.inf), 0)
    entropy = (weight * nll / voxels).sum((1, 2))
    dice = 2 * (p * masks).sum(-1) / ((p * counted).sum(-1) + count.squeeze(-1) + common.DICE_EPS)
    return entropy, 1 - dice.mean(1)


@torch.library.custom_op("passion_plugin::segmentation", mutates_args=())
def _segmentation_op(
    logits: Tensor, labels: Tensor, lowest: float, ignore_index: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy (B,) and Dice loss (B,) of :func:`plain_segmentation`, and the sums (B, 6, K)."""
    if common.use_triton(backend, logits):
        from passion_plugin.losses.kernels._segmentation import losses_and_sums

        return losses_and_sums(logits, labels, lowest, ignore_index)
    z, y = common.flatten_both(logits, labels)
    sums = z.new_zeros((len(z), 6, z.shape[1]), dtype=common.compute_dtype(z))
    with common.no_autocast(z):
        for part in common.voxel_chunks(z.shape[2], z.shape[0] * z.shape[1]):
            sums += _chunk_sums(z[..., part].to(sums.dtype), y[..., part], lowest, ignore_index)
    sums[:, 0].clamp_(min=1)
    voxels, count, overlap, predicted, inside, outside = sums.unbind(1)
    # Not 1 - count / voxels, which has lost its digits where a class fills nearly all of a volume.
    entropy = ((voxels - count) / voxels * inside + count / voxels * outside) / voxels
    dice = 2 * overlap / (predicted + count + common.DICE_EPS)
    return entropy.mean(1) if y.ndim == 3 else entropy.sum(1), 1 - dice.mean(1), sums


@torch.library.custom_op("passion_plugin::segmentation_gradient", mutates_args=())
def _segmentation_gradient_op(
    to_entropy: Tensor,
    to_dice: Tensor,
    logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    lowest: float,
    ignore_index: int | None,
    backend: str,
) -> Tensor:
    """Gradient of the logits, in their dtype, from those of the two losses, (B,) each, and the sums of forward."""
    if common.use_triton(backend, logits):
        from passion_plugin.losses.kernels._segmentation import gradient

        return gradient(to_entropy, to_dice, logits, labels, sums, lowest, ignore_index)
    z, y = common.flatten_both(logits, labels)
    voxels, count, overlap, predicted, _, _ = rearrange(sums, "b six k -> six b k 1")
    # By p, where the voxel does not belong to k, and what is added where it does; of -log p, and of -log(1 - p).
    size = predicted + count + common.DICE_EPS
    dice = 2 / z.shape[1] * rearrange(to_dice, "b -> b 1 1") / size
    entropy = rearrange(to_entropy, "b -> b 1 1") / voxels / (z.shape[1] if y.ndim == 3 else 1)
    slopes = (dice * overlap / size, -dice, entropy * ((voxels - count) / voxels), entropy * (count / voxels))
    result = common.empty_gradient(logits)
    flat = common.flatten_voxels(result)
    with common.no_autocast(z):
        for part in common.voxel_chunks(z.shape[2], z.shape[0] * z.shape[1]):
            flat[..., part] = _chunk_gradient(z[..., part].to(sums.dtype), y[..., part], slopes, lowest, ignore_index)
    return result


@_segmentation_op.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape[:2]
    sums = logits.new_empty((batch, 6, classes), dtype=common.compute_dtype(logits))
    return sums.new_empty(batch), sums.new_empty(batch), sums


common.register_gradient(_segmentation_op, _segmentation_gradient_op, plain_segmentation, tensors=2, losses=2, kept=2)


def _chunk_sums(z: Tensor, labels: Tensor, lowest: float, ignore_index: int | None) -> Tensor:
    """The sums (B, 6, K) over a chunk: z (B, K, n), and class numbers (B, n) or masks (B, K, n)."""
    member, z, counted = _membership(labels, z, ignore_index)
    if labels.ndim == 3:  # the published code knows no regions, so there is no clamp
        p = z.sigmoid()
        nll = F.logsigmoid(torch.where(member > 0, z, -z)).neg_()
        nll = nll if counted is None else nll.mul_(counted)
        inside = nll * member
        inside, outside = inside.sum(-1), nll.sub_(inside).sum(-1)
    else:
        log_p = z.log_softmax(1)
        # An impossible class has the logit -inf, whose product would be NaN where the voxel is of another class.
        least = torch.finfo(log_p.dtype).min
        bounded = log_p.clamp(min=math.log(lowest)) if lowest else log_p.clamp_(min=least)
        inside = -(bounded * member).sum(-1)
        inside = torch.where(inside >= -least, torch.inf, inside)
        outside = torch.zeros_like(inside)
        p = common.exp_(log_p)
    p = p if counted is None else p.mul_(counted)
    count, predicted, overlap = member.sum(-1), p.sum(-1), p.mul_(member).sum(-1)
    voxels = torch.full_like(count, z.shape[2]) if counted is None else counted.sum(-1).expand_as(count)
    return torch.stack((voxels, count, overlap, predicted, inside, outside), 1)


def _chunk_gradient(
    z: Tensor, labels: Tensor, slopes: tuple[Tensor, ...], lowest: float, ignore_index: int | None
) -> Tensor:
    """Gradient of a chunk z (B, K, n), from the slopes of Dice by p and of cross-entropy by -log p, (B, K, 1) each.

    Softmax: with a_k = d Dice / d p_k, p_k (a_k - sum_j p_j a_j) + w_y (p_k - Y_k). Sigmoid: Dice by p times p (1 - p),
    and that of a two-class cross-entropy.
    """
    others, step, weight_inside, weight_outside = slopes
    member, z, counted = _membership(labels, z, ignore_index)
    if labels.ndim == 3:
        p, inside = z.sigmoid(), member > 0
        result = p * (1 - p) * torch.where(inside, others + step, others)
        result += torch.where(inside, weight_inside * (p - 1), weight_outside * p)
    else:
        p = z.softmax(1)
        weight = torch.bmm(weight_inside.mT, member)
        if lowest:
            weight *= (p * member).sum(1, keepdim=True) >= lowest
        result = (member * step).add_(others).mul_(p)
        result.addcmul_(p, weight - result.sum(1, keepdim=True)).addcmul_(member, weight, value=-1)
    return result if counted is None else result.mul_(counted)


def _membership(labels: Tensor, z: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which class or region each voxel of z (B, K, n) belongs to, and which entries count, as 0 and 1; None: all.

    Where an entry does not count z is 0, whatever was there.
    """
    if labels.ndim == 2:
        labels = rearrange(labels, "b n -> b 1 n")
        classes = torch.arange(z.shape[1], dtype=z.dtype, device=z.device)
        # Compared as floating numbers: several times as fast as integers.
        member = torch.eq(labels.to(z.dtype), rearrange(classes, "k -> k 1"), out=z.new_empty(z.shape))
    else:
        member = torch.ne(labels, 0, out=z.new_empty(z.shape))
    if ignore_index is None:
        return member, z, None
    counted = common.is_counted(labels, ignore_index)
    return member.mul_(counted), torch.where(counted, z, 0), counted
