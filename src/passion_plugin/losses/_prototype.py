r"""Semantic self-distillation: how every voxel relates to the class prototypes (arXiv:2407.14796).

A custom operator sums the features of each class, then the gaps; similarity maps are never stored. A class has the sum
:math:`s_k = \sum_v Y_{kv} f_v`, the prototype :math:`c_k = s_k / (n_k + \epsilon)` and the direction
:math:`u_k = c_k / \max(|c_k|, \epsilon)`; a similarity is :math:`S_{kv} = u_k \cdot f_v / l_v` with
:math:`l_v = \max(|f_v|, \epsilon)`. The loss :math:`P = \sum_k w_k \sum_v g_{kv}^2` of the gap
:math:`g = S^s - S^t` has the gradient

.. math::
    \frac{\partial P}{\partial f_v} = \sum_k \frac{2 w_k g_{kv}}{l_v} \Bigl(u_k - [|f_v| \ge \epsilon]\,
    S_{kv} \frac{f_v}{l_v}\Bigr) + \sum_k Y_{kv} \frac{\partial P}{\partial s_k}

and :math:`\partial P / \partial s_k` follows from :math:`\partial P / \partial u_k = 2 w_k \sum_v g_{kv} f_v / l_v`.
That sum is of the size of the prototypes, so the second pass of the forward takes it along: two passes over the
features there, and a single one in the backward.
"""

# No `from __future__ import annotations`: custom_op of torch 2.5 wants types as annotations, not strings.

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from passion_plugin._types import Backend, Mode
from passion_plugin._validate import Problems, check_labels, check_pair, check_settings, is_int
from passion_plugin.losses import _common as common


def prototype_distillation(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    mode: Mode = "default",
    ignore_index: int | None = None,
    check_values: bool = True,
    backend: Backend = "auto",
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
        ignore_index: class number of voxels that belong to no class and count in no mean; None for none. Class
            numbers only.
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.
        backend: ``"auto"``: Triton kernels on CUDA where installed, else PyTorch; or ``"triton"``, ``"eager"``.

    Returns:
        P (B,) and D (B,), in float32, or in float64 if features are; D carries no gradient.

    Raises:
        ConfigError: a setting is unknown or out of range.
        InputError: a tensor has the wrong shape, dtype or content.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> teacher = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 1, 4)
        >>> student = torch.ones(1, 3, 1, 4)  # tells nothing apart
        >>> prototype_distillation(student, teacher, labels, num_classes=2)
        (tensor([0.5000]), tensor([0.5000]))
    """
    problems = Problems("prototype_distillation")
    check_settings(problems, mode, "softmax", backend)
    usable = check_pair(problems, student_features, teacher_features, features=True)
    if not is_int(num_classes, least=1):
        problems.settings.append(f"num_classes={num_classes!r}, but it must be an integer of at least 1.")
    elif usable:
        how: Any = {"kind": "either", "values": check_values, "ignore_index": ignore_index}
        check_labels(problems, labels, student_features, num_classes, **how)
        if ignore_index is not None and isinstance(labels, Tensor) and labels.ndim == student_features.ndim:
            problems.settings.append("ignore_index needs class numbers; a voxel of region masks is left out by 0.")
    problems.raise_all()
    loss, distance, *_ = _prototype_op(
        student_features, teacher_features.detach(), labels, num_classes, mode == "official", ignore_index, backend
    )
    return loss, distance


def plain_prototype_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, official: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`prototype_distillation`, which autograd can differentiate any number of times.

    ``official``: a class counts if every sample has it.
    """
    dtype = common.compute_dtype(student, teacher)
    masks = common.class_masks(labels, num_classes, student.ndim)
    counted = torch.ones_like(masks[:, :1])
    if ignore_index is not None:
        counted = common.is_counted(rearrange(labels, "b ... -> b 1 (...)"), ignore_index)
        masks = masks & counted
    weights = _class_weights(masks.sum(-1), counted.sum(-1), official, dtype)
    gap = similarity_maps(student.to(dtype), masks) - similarity_maps(teacher.detach().to(dtype), masks)
    gap = torch.where(counted, gap, 0.0)
    return _weighted_sum(weights, gap.square().sum(-1)), _weighted_sum(weights, gap.detach().abs().sum(-1))


def similarity_maps(features: Tensor, masks: Tensor) -> Tensor:
    """Cosine (B, K, V) of every voxel with the prototypes of the classes ``masks`` (B, K, V)."""
    f = common.flatten_voxels(features)
    sums = einsum(masks.to(f.dtype), f, "b k v, b c v -> b k c")
    directions, _, _ = _directions(sums, masks.sum(-1))
    # Bounded before the root, whose second derivative at 0 is NaN.
    lengths = f.square().sum(1, keepdim=True).clamp(min=common.COSINE_EPS**2).sqrt()
    return einsum(directions, f, "b k c, b c v -> b k v") / lengths


@torch.library.custom_op("passion_plugin::prototype_distillation", mutates_args=())
def _prototype_op(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    official: bool,
    ignore_index: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """P (B,) and D (B,), and what their gradient needs in addition to the inputs.

    That is: directions of the student's (B, K, Cs) and of the teacher's prototypes (B, K, Ct), weights of the classes
    (B, K), gradient of P for the student's class sums (B, K, Cs).
    """
    class_sums, gap_sums, _ = _passes(backend, student, teacher)
    maps = _flatten(student, teacher, labels)
    with common.no_autocast(student):
        sums_s, sums_t, counts = class_sums(maps, num_classes, ignore_index)
        directions_s, per_sum, bounded = _directions(sums_s, counts)
        directions_t, _, _ = _directions(sums_t, counts)
        voxels = torch.full_like(counts[:, :1], maps[0].shape[2])
        if ignore_index is not None:
            voxels = common.is_counted(maps[2], ignore_index).sum(1, keepdim=True)
        weights = _class_weights(counts, voxels, official, sums_s.dtype)
        square_sums, abs_sums, grad_directions = gap_sums(maps, (directions_s, directions_t), ignore_index)
        grad_directions = 2 * rearrange(weights, "b k -> b k 1") * grad_directions
        radial = directions_s * (directions_s * grad_directions).sum(-1, keepdim=True)
        grad_sums = (grad_directions - torch.where(bounded, 0.0, radial)) * per_sum
    loss, distance = _weighted_sum(weights, square_sums), _weighted_sum(weights, abs_sums)
    return loss, distance, directions_s, directions_t, weights, grad_sums


@torch.library.custom_op("passion_plugin::prototype_distillation_backward", mutates_args=())
def _prototype_gradient_op(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    directions_s: Tensor,
    directions_t: Tensor,
    weights: Tensor,
    grad_sums: Tensor,
    num_classes: int,
    official: bool,
    ignore_index: int | None,
    backend: str,
) -> Tensor:
    """Gradient (B, Cs, *spatial) of ``upstream`` (B,) times P, in the dtype of the student's features."""
    *_, feature_gradient = _passes(backend, student, teacher)
    slopes = 2 * weights * rearrange(upstream, "b -> b 1")
    grad_sums = grad_sums * rearrange(upstream, "b -> b 1 1")
    maps, directions = _flatten(student, teacher, labels), (directions_s, directions_t)
    with common.no_autocast(student):
        return feature_gradient(maps, directions, slopes, grad_sums, ignore_index).view(student.shape)


@_prototype_op.register_fake
def _(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, official: bool, ignore_index: Any, backend: str
) -> tuple[Tensor, ...]:
    batch, dtype = len(student), common.compute_dtype(student, teacher)
    shapes = ((), (), (num_classes, student.shape[1]), (num_classes, teacher.shape[1]), (num_classes,))
    return tuple(student.new_empty((batch, *shape), dtype=dtype) for shape in (*shapes, shapes[2]))


common.register_gradient(_prototype_op, _prototype_gradient_op, plain_prototype_distillation, tensors=3, kept=2)


Maps = tuple[Tensor, Tensor, Tensor]
"""Features of the student (B, Cs, V) and of the teacher (B, Ct, V), class numbers (B, V) or masks (B, K, V)."""


def _flatten(student: Tensor, teacher: Tensor, labels: Tensor) -> Maps:
    fs, y = common.flatten_both(student, labels)
    return fs, common.flatten_voxels(teacher), y


def _passes(backend: str, student: Tensor, teacher: Tensor) -> tuple[Callable[..., Any], ...]:
    """The three passes over the voxels, in Triton or eager: class sums, gap sums, gradient of the features."""
    if common.use_triton(backend, student, teacher):
        from passion_plugin.losses.kernels import _prototype as kernels

        return kernels.class_sums, kernels.gap_sums, kernels.feature_gradient
    return _class_sums, _gap_sums, _feature_gradient


def _directions(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions (B, K, C) of the prototypes, their slope by the sums (B, K, 1), where the bound acts (B, K, 1)."""
    size = rearrange(counts, "b k -> b k 1").to(sums.dtype) + common.COSINE_EPS
    prototypes = sums / size
    squared = prototypes.square().sum(-1, keepdim=True)
    length = squared.clamp(min=common.COSINE_EPS**2).sqrt()
    return prototypes / length, 1 / (size * length), squared < common.COSINE_EPS**2


def _class_weights(counts: Tensor, voxels: Tensor, official: bool, dtype: torch.dtype) -> Tensor:
    """Weights (B, K) of a mean over voxels and the classes that count; all 0 where none does."""
    present = counts > 0
    if official:
        present = present.all(0, keepdim=True).expand_as(present)
    return present.to(dtype) / (present.sum(1, keepdim=True) * voxels).clamp(min=1)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    # A class that does not count must not matter even if it is NaN.
    return torch.where(weights > 0, weights * values, 0.0).sum(1)


def _class_sums(maps: Maps, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the features of each class, (B, K, Cs) and (B, K, Ct), and its number of voxels (B, K)."""
    student, teacher, _ = maps
    dtype = common.compute_dtype(student, teacher)
    sums_s, sums_t = (f.new_zeros((len(f), num_classes, f.shape[1]), dtype=dtype) for f in (student, teacher))
    counts = student.new_zeros((len(student), num_classes), dtype=dtype)
    for b, _, f, t, y in _chunks(maps, num_classes, dtype):
        masks = _write_masks(y, ignore_index, into=f.new_empty(num_classes, y.shape[-1]))
        counts[b] += masks.sum(1)
        sums_s[b].addmm_(masks, f.T)
        sums_t[b].addmm_(masks, t.T)
    return sums_s, sums_t, counts


def _gap_sums(maps: Maps, directions: tuple[Tensor, Tensor], ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over voxels of the squared and the absolute gap, (B, K) each, and of gap times f / l (B, K, Cs)."""
    directions_s, directions_t = directions
    batch, num_classes, _ = directions_s.shape
    square_sums, abs_sums = directions_s.new_zeros(2, batch, num_classes)
    grad_directions = torch.zeros_like(directions_s)
    for b, _, f, t, y in _chunks(maps, num_classes, directions_s.dtype):
        gap, _, scale, _ = _gap(f, t, y, directions_s[b], directions_t[b], ignore_index)
        square_sums[b] += gap.square().sum(1)
        abs_sums[b] += gap.abs().sum(1)
        grad_directions[b].addmm_(gap.mul_(scale), f.T)
    return square_sums, abs_sums, grad_directions


def _feature_gradient(
    maps: Maps, directions: tuple[Tensor, Tensor], slopes: Tensor, grad_sums: Tensor, ignore_index: int | None
) -> Tensor:
    """Gradient (B, Cs, V) of P, from its ``slopes`` (B, K) by gap / gap and its gradient for the class sums."""
    directions_s, directions_t = directions
    num_classes, dtype = slopes.shape[1], directions_s.dtype
    gradient = torch.empty_like(maps[0])
    for b, part, f, t, y in _chunks(maps, num_classes, dtype):
        gap, similarity, scale, squared = _gap(f, t, y, directions_s[b], directions_t[b], ignore_index)
        # One product for both: the slopes times the directions, and the masks times the gradient for the class sums.
        factors = gap.new_empty(2 * num_classes, len(scale))
        slope = torch.mul(gap, slopes[b].unsqueeze(1), out=factors[:num_classes]).mul_(scale)
        _write_masks(y, ignore_index, into=factors[num_classes:])
        # A length at its bound does not change with f.
        radial = similarity.mul_(slope).sum(0).mul_(scale).masked_fill_(squared < common.COSINE_EPS**2, 0.0)
        vectors, result = torch.cat((directions_s[b], grad_sums[b])).T, gradient[b, :, part]
        if gradient.dtype == dtype:
            torch.mm(vectors, factors, out=result).addcmul_(f, radial, value=-1)
        else:
            result.copy_(torch.mm(vectors, factors).addcmul_(f, radial, value=-1))
    return gradient


def _chunks(maps: Maps, num_classes: int, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """Sample, voxels, and there the features (C, n) of both in ``dtype`` and the labels (n,) or masks (K, n).

    The largest temporaries of a pass are as wide as the features and as the maps of both.
    """
    student, teacher, labels = maps
    widest = max(student.shape[1], teacher.shape[1]) + 2 * num_classes
    for b in range(len(student)):
        for part in common.voxel_chunks(student.shape[2], widest, times=4):
            yield b, part, student[b, :, part].to(dtype), teacher[b, :, part].to(dtype), labels[b, ..., part]


def _gap(
    f: Tensor, t: Tensor, labels: Tensor, directions_s: Tensor, directions_t: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gap (K, n) of some voxels, 0 where ignored, and what :func:`_cosines` gives for the student."""
    (similarity, scale, squared), (target, _, _) = _cosines(directions_s, f), _cosines(directions_t, t)
    gap = torch.sub(similarity, target, out=target)
    return _zero_ignored(gap, labels, ignore_index), similarity, scale, squared


def _cosines(directions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (K, n) of the features (C, n) of some voxels, their 1 / l (n,), and their squared lengths (n,)."""
    squared = features.square().sum(0)
    scale = squared.clamp(min=common.COSINE_EPS**2).rsqrt_()
    return torch.mm(directions, features).mul_(scale), scale, squared


def _write_masks(labels: Tensor, ignore_index: int | None, *, into: Tensor) -> Tensor:
    """Write which of some voxels belong to which class into (K, n), as 0 and 1."""
    if labels.ndim == 2:
        return torch.ne(labels, 0, out=into)
    classes = torch.arange(len(into), dtype=into.dtype, device=into.device).unsqueeze(1)
    # Compared as floating numbers: several times as fast as integers.
    torch.eq(labels.to(into.dtype), classes, out=into)
    return _zero_ignored(into, labels, ignore_index)


def _zero_ignored(values: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
    return values if ignore_index is None else values.masked_fill_(~common.is_counted(labels, ignore_index), 0)
