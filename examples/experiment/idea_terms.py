"""Terms of variations of PASSION that the library does not have; their equations are in ``ideas.py``."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

__all__ = ["balanced_divergence", "class_masks", "gated_gaps", "similarity_maps", "widened"]

_EPS = 1e-5


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least, voxels flattened: (n, C, *spatial) to (n, C, V)."""
    return rearrange(tensor.to(torch.promote_types(tensor.dtype, torch.float32)), "n c ... -> n c (...)")


def class_masks(labels: Tensor, classes: int) -> Tensor:
    """Which voxels belong to each class: bool (n, K, V) of class numbers (n, *spatial)."""
    return rearrange(labels, "n ... -> n 1 (...)") == rearrange(torch.arange(classes).to(labels), "k -> k 1")


def similarity_maps(features: Tensor, masks: Tensor) -> Tensor:
    """Cosine (n, K, V) of the features (n, C, *spatial) of every voxel with their mean over each class (n, K, V)."""
    with torch.autocast(features.device.type, enabled=False):
        points = widened(features)
        means = einsum(masks.to(points.dtype), points, "n k v, n c v -> n k c") / masks.sum(-1, keepdim=True).clamp(
            min=1
        )
        cosines = einsum(F.normalize(means, dim=2, eps=_EPS), points, "n k c, n c v -> n k v")
        # Bounded before the root, which has no gradient at 0.
        return cosines / points.square().sum(1, keepdim=True).clamp(min=_EPS**2).sqrt()


def balanced_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over the classes of a sample of the mean over its voxels, (n,).

    Args:
        student: logits (n, K, *spatial).
        teacher: logits of the same shape, without gradient.
        labels: (n, *spatial), class numbers.
        temperature: T.
    """
    classes = student.shape[1]
    masks = class_masks(labels, classes)
    sizes = masks.sum(-1)
    with torch.autocast(student.device.type, enabled=False):
        log_s, log_t = ((widened(logits) / temperature).log_softmax(1) for logits in (student, teacher))
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
