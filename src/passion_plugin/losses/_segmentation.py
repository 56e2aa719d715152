"""Segmentation losses of the uni-modal predictions: weighted cross-entropy and Dice (arXiv:2407.14796)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from passion_plugin._types import Backend, Mode, Outputs
from passion_plugin._validate import Problems, check_choice, check_labels, check_map, check_outputs
from passion_plugin.losses import _segmentation_op as ops

__all__ = ["dice_loss", "segmentation_loss", "weighted_cross_entropy"]

_LOWEST_OFFICIAL_PROBABILITY = 0.005


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
        labels: softmax: class numbers (B, *spatial), integers (bool for K = 2); sigmoid: 0/1 masks
            (B, K, *spatial).
        mode: ``"default"`` or ``"official"``.
        outputs: ``"softmax"`` (exclusive classes) or ``"sigmoid"`` (regions).
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.
        ignore_index: label, or value in a mask, of voxels that count in no sum and no mean.
        backend: ``"auto"``, ``"eager"`` or ``"triton"``, see :mod:`passion_plugin.ops`.

    Returns:
        (B,) in float32, or in float64 if the logits are; computed so under autocast too.

    Raises:
        ConfigError: a setting is unknown.
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

    Args:
        logits: (B, K, *spatial) with 2 or 3 spatial axes. K >= 2 for softmax, >= 1 for sigmoid.
        labels: softmax: class numbers (B, *spatial), integers (bool for K = 2); sigmoid: 0/1 masks
            (B, K, *spatial).
        mode: ``"default"`` or ``"official"``.
        outputs: ``"softmax"`` (exclusive classes) or ``"sigmoid"`` (regions).
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.
        ignore_index: label, or value in a mask, of voxels that count in no sum and no mean.
        backend: ``"auto"``, ``"eager"`` or ``"triton"``, see :mod:`passion_plugin.ops`.

    Returns:
        (B,) in float32, or in float64 if the logits are; computed so under autocast too.

    Raises:
        ConfigError: a setting is unknown.
        InputError: a tensor has the wrong shape, dtype or content.

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

    Args:
        logits: (B, K, *spatial) with 2 or 3 spatial axes. K >= 2 for softmax, >= 1 for sigmoid.
        labels: softmax: class numbers (B, *spatial), integers (bool for K = 2); sigmoid: 0/1 masks
            (B, K, *spatial).
        mode: ``"default"`` or ``"official"`` (softmax only).
        outputs: ``"softmax"`` (exclusive classes) or ``"sigmoid"`` (regions).
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.
        ignore_index: label, or value in a mask, of voxels that count in no sum and no mean.
        backend: ``"auto"``, ``"eager"`` or ``"triton"``, see :mod:`passion_plugin.ops`.

    Returns:
        (B,) in float32, or in float64 if the logits are; computed so under autocast too.

    Raises:
        ConfigError: a setting is unknown.
        InputError: a tensor has the wrong shape, dtype or content.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])
        >>> dice_loss(torch.zeros(1, 2, 1, 4), labels)  # 1 - (3 / 5 + 1 / 3) / 2
        tensor([0.5333])
    """
    return _losses("dice_loss", logits, labels, mode, outputs, check_values, ignore_index, backend)[1]


def _losses(
    what: str,
    logits: Tensor,
    labels: Tensor,
    mode: Mode,
    outputs: Outputs,
    check_values: bool,
    ignore_index: int | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    problems, regions = Problems(what), outputs == "sigmoid"
    check_outputs(problems, mode, outputs)
    check_choice(problems, "backend", backend, get_args(Backend))
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        problems.settings.append(f"ignore_index={ignore_index!r}, but it must be an integer or None.")
        ignore_index = None
    if check_map(problems, "logits", logits, minimum=1 if regions else 2):
        kind: Literal["classes", "regions"] = "regions" if regions else "classes"
        kept = labels
        if check_values and ignore_index is not None and isinstance(labels, Tensor):
            kept = labels.masked_fill(labels.long() == ignore_index, 0)
        check_labels(problems, kept, logits, logits.shape[1], kind=kind, values=check_values)
    problems.raise_all()
    lowest = _LOWEST_OFFICIAL_PROBABILITY if mode == "official" else 0.0
    entropy, dice, _ = ops.segmentation(logits, labels, regions, lowest, ignore_index, backend)
    return entropy, dice
