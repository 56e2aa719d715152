"""Terms of variations of PASSION that the library has no operation for; their equations are in ``ideas.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.losses._common import class_masks, compute_dtype, no_autocast

__all__ = ["balanced_divergence", "gated_gaps"]


def balanced_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over the classes of a sample of the mean over its voxels, (n,).

    Args:
        student: logits (n, K, *spatial).
        teacher: logits of the same shape, without gradient.
        labels: (n, *spatial), class numbers.
        temperature: T.
    """
    classes = student.shape[1]
    masks = class_masks(labels, classes, student.ndim)
    sizes, dtype = masks.sum(-1), compute_dtype(student, teacher)
    with no_autocast(student):
        log_s, log_t = ((z.flatten(2).to(dtype) / temperature).log_softmax(1) for z in (student, teacher))
        divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1, keepdim=True)
    means = torch.where(masks, divergence, 0).sum(-1) / sizes.clamp(min=1)
    return temperature**2 / classes * means.sum(1) / (sizes > 0).sum(1)


def gated_gaps(gaps: Tensor, active: Tensor, counted: Tensor, *, by_class: bool) -> Tensor:
    """Mean squared gap (B, M) of what lags behind the other modalities of its sample.

    Args:
        gaps: (B, M, K, V), 0 where there is no student.
        active: bool (B, M), where there is one.
        counted: bool (B, K), classes that the sample has.
        by_class: gates by class, each over all voxels; False: by voxel, each for all classes.
    """
    counts = counted[:, None, :, None]
    size = counts.sum((2, 3), keepdim=True) * gaps.shape[-1]
    squares, distances = (torch.where(counts, value, 0) for value in (gaps.square(), gaps.detach().abs()))
    distances = distances.sum(3 if by_class else 2, keepdim=True)
    mean = distances.sum(1, keepdim=True) / active.sum(1).clamp(min=1)[:, None, None, None]
    return (torch.where(distances > mean, squares, 0) / size).sum((2, 3))
