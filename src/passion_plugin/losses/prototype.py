"""Semantic self-distillation: how every voxel relates to the class prototypes (arXiv:2407.14796)."""

from __future__ import annotations

import torch
from torch import Tensor

from passion_plugin.losses._common import class_masks, outside_autocast, wide_dtype
from passion_plugin.validate import (
    Mode,
    Problems,
    check_choice,
    check_labels,
    check_map,
    check_pair,
    check_positive_int,
)

__all__ = ["prototype_distillation"]

_EPS = 1e-5


def prototype_distillation(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    mode: Mode = "default",
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Gap between the student's and the teacher's maps of similarity to class prototypes, per sample.

    .. math::
        c_{bk} = \frac{\sum_v f_{bv} Y_{bkv}}{n_{bk} + \epsilon}, \quad
        S_{bkv} = \cos(f_{bv}, c_{bk}), \quad
        P_b = \operatorname{mean}_{k, v} (S^s - S^t)^2, \quad D_b = \operatorname{mean}_{k, v} |S^s - S^t|

    with :math:`\epsilon = 10^{-5}`, which also bounds each norm in the cosine from below. Student and teacher
    have prototypes of their own, so their features need not share a space nor even a number of channels. The
    gradient of P flows through the student's features and through its prototypes.

    The means run over all voxels and over the classes that count: those present in the sample
    (``mode="default"``), or those present in EVERY sample of the batch (``mode="official"``, as the published
    code; the same at B = 1). A sample in which no class counts has P = D = 0.

    Args:
        student_features: (B, Cs, *spatial) with 2 or 3 spatial axes: what enters the last classifier.
        teacher_features: (B, Ct, *spatial). Detached: no gradient reaches them.
        labels: class numbers (B, *spatial), integers (bool for K = 2), or region masks (B, K, *spatial) of 0
            and 1.
        num_classes: K, the number of classes or regions.
        mode: ``"default"`` or ``"official"``.
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.

    Returns:
        P (B,) and D (B,), in float32, or in float64 if features are; D carries no gradient.

    Raises:
        ConfigError: a setting is unknown or out of range.
        InputError: a tensor has the wrong shape, dtype or content.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> teacher = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 1, 4)
        >>> student = torch.ones(1, 3, 1, 4)  # tells nothing apart
        >>> prototype_distillation(student, teacher, labels, num_classes=2)
        (tensor([0.5000]), tensor([0.5000]))
    """
    problems = Problems("prototype_distillation")
    check_choice(problems, "mode", mode, ("default", "official"))
    countable = check_positive_int(problems, "num_classes", num_classes)
    usable = [
        check_map(problems, name, features, channels="C")
        for name, features in (("student_features", student_features), ("teacher_features", teacher_features))
    ]
    if all(usable):
        check_pair(problems, student_features, teacher_features, channels=False)
    if usable[0] and countable:
        check_labels(problems, labels, student_features, num_classes, kind="either", values=check_values)
    problems.raise_all()

    dtype = wide_dtype(student_features, teacher_features)
    with outside_autocast(student_features):
        masks = class_masks(labels, num_classes, student_features.ndim)
        present = masks.any(-1)
        if mode == "official":
            present = present.all(0, keepdim=True).expand_as(present)
        weights = masks.to(dtype).transpose(1, 2)
        similarity = _similarity_maps(student_features.to(dtype), weights)
        with torch.no_grad():
            target = _similarity_maps(teacher_features.to(dtype), weights)
        gap = similarity - target
        loss = _mean_over_present(gap.square(), present)
        distance = _mean_over_present(gap.detach().abs(), present)
    return loss, distance


def _similarity_maps(features: Tensor, weights: Tensor) -> Tensor:
    """Cosine (B, K, V) of features (B, C, *spatial) with prototypes made with ``weights`` (B, V, K)."""
    f = features.flatten(2)
    prototypes = torch.bmm(f, weights) / (weights.sum(1, keepdim=True) + _EPS)
    # Lengths divide the small operands: normalised features would be a second tensor of the features' size.
    maps: Tensor = torch.bmm((prototypes / _length(prototypes)).transpose(1, 2), f) / _length(f)
    return maps


def _length(vectors: Tensor) -> Tensor:
    """Norm over axis 1, at least eps. Bounded before the root, whose second derivative at 0 is NaN."""
    return vectors.square().sum(1, keepdim=True).clamp(min=_EPS**2).sqrt()


def _mean_over_present(gap: Tensor, present: Tensor) -> Tensor:
    """Mean of ``gap`` (B, K, V) over voxels and the classes ``present`` (B, K); 0 where there is none."""
    total = torch.where(present, gap.mean(-1), 0.0).sum(1)
    return total / present.sum(1).clamp(min=1)
