"""Segmentation losses of the uni-modal predictions: weighted cross-entropy and Dice (arXiv:2407.14796)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from passion_plugin.losses._common import class_masks, outside_autocast, wide_dtype
from passion_plugin.validate import Mode, Outputs, Problems, check_labels, check_map, check_outputs

__all__ = ["dice_loss", "weighted_cross_entropy"]

_HIGHEST_OFFICIAL_NLL = -math.log(0.005)
_EPS = 1e-7


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "default",
    outputs: Outputs = "softmax",
    check_values: bool = True,
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

    Args:
        logits: (B, K, *spatial) with 2 or 3 spatial axes. K >= 2 for softmax, >= 1 for sigmoid.
        labels: softmax: class numbers (B, *spatial), integers (bool for K = 2); sigmoid: 0/1 masks
            (B, K, *spatial).
        mode: ``"default"`` or ``"official"``.
        outputs: ``"softmax"`` (exclusive classes) or ``"sigmoid"`` (regions).
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.

    Returns:
        (B,) in float32, or in float64 if the logits are; computed so under autocast too.

    Raises:
        ConfigError: a setting is unknown.
        InputError: a tensor has the wrong shape, dtype or content.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])
        >>> weighted_cross_entropy(torch.zeros(1, 2, 1, 4), labels)  # (3 * 1/4 + 1 * 3/4) / 4 * log 2
        tensor([0.2599])
    """
    _check("weighted_cross_entropy", logits, labels, mode, outputs, check_values)
    with outside_autocast(logits):
        z = logits.to(wide_dtype(logits)).flatten(2)
        masks = class_masks(labels, z.shape[1], logits.ndim)
        share = masks.sum(-1).to(z.dtype) / z.shape[2]
        if outputs == "sigmoid":
            weight = torch.where(masks, (1 - share).unsqueeze(2), share.unsqueeze(2))
            log_p = functional.logsigmoid(torch.where(masks, z, -z))
            return -(weight * log_p).flatten(1).mean(1)
        index = labels.flatten(1).long()
        nll = functional.cross_entropy(z, index, reduction="none")
        if mode == "official":
            nll = nll.clamp(max=_HIGHEST_OFFICIAL_NLL)
        return ((1 - share).gather(1, index) * nll).mean(1)


def dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "default",
    outputs: Outputs = "softmax",
    check_values: bool = True,
) -> Tensor:
    r"""Soft Dice loss, the mean over all classes including the background.

    .. math::
        L_b = 1 - \frac{1}{K} \sum_k
        \frac{2 \sum_v p_{bkv} Y_{bkv}}{\sum_v p_{bkv} + \sum_v Y_{bkv} + 10^{-7}}

    Per sample, and with the small number in the denominator only: a class absent from the sample costs 1 / K
    whatever is predicted, without gradient. Other libraries decide otherwise on each of these points.
    Both modes are equal; ``outputs="sigmoid"`` uses :math:`p = \sigma(z)` and regions in place of classes.

    Args:
        logits: (B, K, *spatial) with 2 or 3 spatial axes. K >= 2 for softmax, >= 1 for sigmoid.
        labels: softmax: class numbers (B, *spatial), integers (bool for K = 2); sigmoid: 0/1 masks
            (B, K, *spatial).
        mode: ``"default"`` or ``"official"`` (softmax only).
        outputs: ``"softmax"`` (exclusive classes) or ``"sigmoid"`` (regions).
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.

    Returns:
        (B,) in float32, or in float64 if the logits are; computed so under autocast too.

    Raises:
        ConfigError: a setting is unknown.
        InputError: a tensor has the wrong shape, dtype or content.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])
        >>> dice_loss(torch.zeros(1, 2, 1, 4), labels)  # 1 - (3 / 5 + 1 / 3) / 2
        tensor([0.5333])
    """
    _check("dice_loss", logits, labels, mode, outputs, check_values)
    with outside_autocast(logits):
        z = logits.to(wide_dtype(logits)).flatten(2)
        p = z.softmax(1) if outputs == "softmax" else z.sigmoid()
        masks = class_masks(labels, z.shape[1], logits.ndim)
        overlap = (p * masks).sum(-1)
        dice: Tensor = 2 * overlap / (p.sum(-1) + masks.sum(-1) + _EPS)
        return 1 - dice.mean(1)


def _check(what: str, logits: Tensor, labels: Tensor, mode: Mode, outputs: Outputs, values: bool) -> None:
    problems = Problems(what)
    check_outputs(problems, mode, outputs)
    regions = outputs == "sigmoid"
    if check_map(problems, "logits", logits, minimum=1 if regions else 2):
        kind: Literal["classes", "regions"] = "regions" if regions else "classes"
        check_labels(problems, labels, logits, logits.shape[1], kind=kind, values=values)
    problems.raise_all()
