"""The equations of docs/method.md written down one after the other, with the tools that first come to mind.

Loops over samples, classes and modalities, a mask for each class, nothing shared between students and nothing
recomputed to save memory: what somebody writes who has read the paper and wants to see it work. Correct, and
the yardstick for both parity and cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.config import PassionConfig

__all__ = [
    "cosine_by_sums",
    "gates",
    "objective",
    "pixel_distillation",
    "prototype_distillation",
    "segmentation_loss",
    "terms",
]

Cosine = Callable[[Tensor, Tensor], Tensor]

_EPS = 1e-5


def pixel_distillation(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, *, official: bool = False, scale_factor: int = 1
) -> Tensor:
    """``T^2 / (K V) sum_v sum_k qt (log qt - log qs)``, (B,), of logits (B, K, *spatial)."""
    values = []
    for zs, zt in zip(student.split(1), teacher.detach().split(1), strict=True):
        qs, qt = torch.softmax(zs / temperature, dim=1), torch.softmax(zt / temperature, dim=1)
        if official:
            qs, qt = _upsample(qs, scale_factor).clamp(0.005, 1), _upsample(qt, scale_factor).clamp(0.005, 1)
        values.append(temperature**2 * (qt * (torch.log(qt) - torch.log(qs))).mean())
    return torch.stack(values)


def _upsample(q: Tensor, scale_factor: int) -> Tensor:
    if scale_factor == 1:
        return q
    mode = "bilinear" if q.ndim == 4 else "trilinear"
    return F.interpolate(q, scale_factor=float(scale_factor), mode=mode, align_corners=True)


def cosine(f: Tensor, c: Tensor) -> Tensor:
    """Cosine (*spatial) of features (C, *spatial) with a prototype (C, 1, ...), as PyTorch has it."""
    return F.cosine_similarity(f, c, dim=0, eps=_EPS)


def cosine_by_sums(f: Tensor, c: Tensor) -> Tensor:
    """The same from sums of squares: on the CPU several times faster than PyTorch's own."""
    length = (f**2).sum(0).sqrt().clamp(min=_EPS) * (c**2).sum(0).sqrt().clamp(min=_EPS)
    return (f * c).sum(0) / length


def prototype_distillation(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    num_classes: int,
    cosine: Cosine = cosine,
) -> tuple[Tensor, Tensor]:
    """P and D, (B,) each: mean over present classes and voxels of the squared and absolute gap of cosine maps."""
    losses, distances = [], []
    for fs, ft, y in zip(student_features, teacher_features.detach(), labels, strict=True):
        squares, gaps = [], []
        for k in range(num_classes):
            mask = (y == k).to(fs.dtype)
            if mask.sum() == 0:
                continue
            gap = cosine(fs, _prototype(fs, mask)) - cosine(ft, _prototype(ft, mask))
            squares.append((gap**2).mean())
            gaps.append(gap.detach().abs().mean())
        losses.append(torch.stack(squares).mean())
        distances.append(torch.stack(gaps).mean())
    return torch.stack(losses), torch.stack(distances)


def _prototype(f: Tensor, mask: Tensor) -> Tensor:
    """Mean (C, 1, ...) of features (C, *spatial) over the class ``mask`` (*spatial)."""
    prototype = (f * mask).flatten(1).sum(1) / (mask.sum() + _EPS)
    return prototype.view(-1, *[1] * mask.ndim)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Weighted cross-entropy plus Dice, (B,): class weight ``1 - n_k / V``, background included."""
    values = []
    for z, y in zip(logits, labels, strict=True):
        p = torch.softmax(z, dim=0)
        cross_entropy, dice = torch.zeros_like(z[0, 0].sum()), torch.zeros_like(z[0, 0].sum())
        for k in range(len(p)):
            Y = (y == k).to(z.dtype)
            cross_entropy = cross_entropy - ((1 - Y.mean()) * Y * torch.log(p[k])).mean()
            dice = dice + 2 * (p[k] * Y).sum() / (p[k].sum() + Y.sum() + 1e-7)
        values.append(cross_entropy + 1 - dice / len(p))
    return torch.stack(values)


def gates(distances: Tensor, presence: Tensor) -> Tensor:
    """``omega = 1[RP < 0]``, ``RP = 1 - D / Dbar``, bool (B, M), of D (B, M) where ``presence`` (B, M)."""
    omega = torch.zeros_like(presence)
    for b in range(len(presence)):
        available = presence[b].nonzero().flatten().tolist()
        mean = sum(distances[b, m] for m in available) / len(available)
        for m in available:
            omega[b, m] = len(available) > 1 and bool(1 - distances[b, m] / mean < 0)
    return omega


def terms(
    teacher: Sequence[Tensor], students: Sequence[Sequence[Tensor]], labels: Tensor, config: PassionConfig
) -> dict[str, Tensor]:
    """K, P, D and S of every student, (B, M) each, by the names of :class:`passion_plugin.LossTerms`.

    Args:
        teacher: logits, features and coarse logits, finest first.
        students: the same of every modality.
        labels: (B, *spatial).
        config: temperature.
    """
    teacher = [tensor.detach() for tensor in teacher]
    pixel, prototype, distance, unimodal = [], [], [], []
    for student in students:
        kappa = pixel_distillation(student[0], teacher[0], config.temperature)
        for j, (zs, zt) in enumerate(zip(student[2:], teacher[2:], strict=True), start=1):
            kappa = kappa + 2.0**-j * pixel_distillation(zs, zt, config.temperature)
        P, D = prototype_distillation(student[1], teacher[1], _nearest(labels, student[1]), student[0].shape[1])
        pixel.append(kappa)
        prototype.append(P)
        distance.append(D)
        unimodal.append(segmentation_loss(student[0], _nearest(labels, student[0])))
    columns = {"pixel": pixel, "prototype": prototype, "distance": distance, "unimodal": unimodal}
    return {name: torch.stack(values, dim=1) for name, values in columns.items()}


def objective(terms: Mapping[str, Tensor], presence: Tensor, rates: Sequence[float], config: PassionConfig) -> Tensor:
    """``mean_b sum_m a w (0.5 K + 0.1 omega P + u S)`` with beta = 1, its value before the first epoch ends.

    Args:
        terms: from :func:`terms`.
        presence: bool (B, M). A sample with a single modality has nothing to distil.
        rates: missing rate of each modality, w = 1 / (1 - rate).
        config: weights.
    """
    omega = gates(terms["distance"], presence)
    total = torch.zeros_like(terms["pixel"][:, 0])
    for m, rate in enumerate(rates):
        a = presence[:, m] & (presence.sum(1) > 1)
        term = config.pixel_weight * terms["pixel"][:, m]
        term = term + config.prototype_weight * omega[:, m] * terms["prototype"][:, m]
        total = total + a * (term + config.unimodal_weight * terms["unimodal"][:, m]) / (1 - rate)
    return total.mean()


def _nearest(labels: Tensor, like: Tensor) -> Tensor:
    if labels.shape[1:] == like.shape[2:]:
        return labels
    return F.interpolate(labels[:, None].float(), size=like.shape[2:], mode="nearest")[:, 0].long()
