"""The terms of PASSION (arXiv:2407.14796) as functions: one value per sample, no reduction over the batch.

Presence of modalities, weights and the mean over the batch belong to whoever combines the terms; see
:mod:`passion_plugin.testing.references` for the same equations as plain loops. Each of ``_pixel``, ``_prototype`` and
``_segmentation`` holds public function, plain definition, custom operator and gradient; ``kernels`` the same in Triton.

Example:
    >>> import torch
    >>> from passion_plugin.losses import pixel_distillation
    >>> student = torch.randn(2, 3, 8, 8, requires_grad=True)
    >>> teacher = torch.randn(2, 3, 8, 8)
    >>> pixel_distillation(student, teacher, temperature=4.0).shape
    torch.Size([2])
"""

from __future__ import annotations

from passion_plugin.losses._labels import prepare_target, resize_labels
from passion_plugin.losses._pixel import pixel_distillation
from passion_plugin.losses._prototype import prototype_distillation
from passion_plugin.losses._segmentation import dice_loss, segmentation_loss, weighted_cross_entropy

__all__ = [
    "dice_loss",
    "pixel_distillation",
    "prepare_target",
    "prototype_distillation",
    "resize_labels",
    "segmentation_loss",
    "weighted_cross_entropy",
]
