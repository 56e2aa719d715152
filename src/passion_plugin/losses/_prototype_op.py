r"""Prototype distillation as one operation: class sums, then gaps; similarity maps are never stored.

A class has the sum :math:`s_k = \sum_v Y_{kv} f_v`, the prototype :math:`c_k = s_k / (n_k + \epsilon)` and
the direction :math:`u_k = c_k / \max(|c_k|, \epsilon)`; a similarity is :math:`S_{kv} = u_k \cdot f_v / l_v` with
:math:`l_v = \max(|f_v|, \epsilon)`. The loss :math:`P = \sum_k w_k \sum_v g_{kv}^2` of the gap
:math:`g = S^s - S^t` has the gradient

.. math::
    \frac{\partial P}{\partial f_v} = \sum_k \frac{2 w_k g_{kv}}{l_v} \Bigl(u_k - [|f_v| \ge \epsilon]\,
    S_{kv} \frac{f_v}{l_v}\Bigr) + \sum_k Y_{kv} \frac{\partial P}{\partial s_k}

and :math:`\partial P / \partial s_k` follows from :math:`\partial P / \partial u_k = 2 w_k \sum_v g_{kv} f_v / l_v`.
That sum is of the size of the prototypes, so the second pass of the forward takes it along: two passes over the
features there, and a single one in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from passion_plugin.losses._common import class_masks, outside_autocast, use_triton, voxel_chunks, wide_dtype

__all__ = ["EPS", "Passes", "plain_prototype_distillation", "prototype_distillation", "similarity_maps"]

EPS = 1e-5


def plain_prototype_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, official: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """The definition, with maps in memory: ensure_requires_grad any number of times.

    Args:
        student: features (B, Cs, *spatial).
        teacher: features (B, Ct, *spatial).
        labels: class numbers (B, *spatial) or masks (B, K, *spatial).
        num_classes: K.
        official: whether a class counts only if every sample of the batch has it.
        ignore_index: class number of voxels that count nowhere.

    Returns:
        P and D, (B,) in float32 or wider; D carries no gradient.
    """
    dtype = wide_dtype(student, teacher)
    with outside_autocast(student):
        masks = class_masks(labels, num_classes, student.ndim)
        counted = torch.ones_like(masks[:, :1])
        if ignore_index is not None:
            counted = ~_ignored(labels.flatten(1).unsqueeze(1), ignore_index)
            masks = masks & counted
        weights = _class_weights(masks.sum(-1), counted.sum(-1), official, dtype)
        gap = similarity_maps(student.to(dtype), masks) - similarity_maps(teacher.detach().to(dtype), masks)
        gap = torch.where(counted, gap, 0.0)
        loss = _weighted(weights, gap.square().sum(-1))
        return loss, _weighted(weights, gap.detach().abs().sum(-1))


def similarity_maps(features: Tensor, masks: Tensor) -> Tensor:
    """Cosine (B, K, V) of every voxel with the prototypes of the classes ``masks`` (B, K, V)."""
    f = features.flatten(2)
    sums = torch.bmm(masks.to(f.dtype), f.transpose(1, 2))
    directions, _, _ = _directions(sums, masks.sum(-1))
    # Bounded before the root, whose second derivative at 0 is NaN.
    return torch.bmm(directions, f) / f.square().sum(1, keepdim=True).clamp(min=EPS**2).sqrt()


class Passes(NamedTuple):
    """The three passes over the voxels; Triton has its own. Features are (B, C, V), labels (B, V) or (B, K, V)."""

    class_sums: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gap_sums: Callable[..., tuple[Tensor, Tensor, Tensor]]
    feature_gradient: Callable[..., Tensor]


@torch.library.custom_op(
    "passion_plugin::prototype_distillation",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor labels, int num_classes, bool official, int? ignore_index, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def prototype_distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    official: bool,
    ignore_index: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """P and D of :func:`plain_prototype_distillation`, and what their gradient needs beside the inputs.

    Returns:
        P (B,), D (B,), directions of the student's (B, K, Cs) and of the teacher's prototypes (B, K, Ct), weights of
        the classes (B, K), gradient of P with respect to the student's class sums (B, K, Cs).
    """
    passes = _passes(backend, student, teacher)
    fs, ft, y = _flat(student, teacher, labels)
    with outside_autocast(student):
        sums_s, sums_t, counts = passes.class_sums(fs, ft, y, num_classes, ignore_index)
        directions_s, per_sum, bounded = _directions(sums_s, counts)
        directions_t, _, _ = _directions(sums_t, counts)
        voxels = torch.full_like(counts[:, :1], fs.shape[2])
        if ignore_index is not None:
            voxels = voxels - _ignored(y, ignore_index).sum(1, keepdim=True)
        weights = _class_weights(counts, voxels, official, sums_s.dtype)
        squares, sizes, turn = passes.gap_sums(fs, ft, y, directions_s, directions_t, ignore_index)
        turn = 2 * weights.unsqueeze(-1) * turn
        along = directions_s * (directions_s * turn).sum(-1, keepdim=True)
        pull = (turn - torch.where(bounded, 0.0, along)) * per_sum
    return _weighted(weights, squares), _weighted(weights, sizes), directions_s, directions_t, weights, pull


@torch.library.custom_op(
    "passion_plugin::prototype_distillation_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor student, Tensor teacher, Tensor labels, Tensor directions_s, "
    "Tensor directions_t, Tensor weights, Tensor pull, int? ignore_index, str backend) -> Tensor",
)
def prototype_distillation_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    directions_s: Tensor,
    directions_t: Tensor,
    weights: Tensor,
    pull: Tensor,
    ignore_index: int | None,
    backend: str,
) -> Tensor:
    """Gradient (B, Cs, *spatial) of ``upstream`` (B,) times P, in the dtype of the student's features."""
    passes = _passes(backend, student, teacher)
    slopes, pull = 2 * weights * upstream.unsqueeze(1), pull * upstream.view(-1, 1, 1)
    with outside_autocast(student):
        gradient = passes.feature_gradient(
            *_flat(student, teacher, labels), directions_s, directions_t, slopes, pull, ignore_index
        )
    return gradient.view(student.shape)


@prototype_distillation.register_fake
def _(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, official: bool, ignore_index: Any, backend: str
) -> tuple[Tensor, ...]:
    batch, dtype = len(student), wide_dtype(student, teacher)
    shapes = ((), (), (num_classes, student.shape[1]), (num_classes, teacher.shape[1]), (num_classes,))
    return tuple(student.new_empty((batch, *shape), dtype=dtype) for shape in (*shapes, shapes[2]))


@prototype_distillation_backward.register_fake
def _(upstream: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student.flatten(2)).view(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, labels, *ctx.settings = inputs
    small = output[1:]
    ctx.mark_non_differentiable(*small)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, labels, *small[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if upstream is not None and ctx.needs_input_grad[0]:
        student, teacher, labels, *small = ctx.saved_tensors
        *definition, backend = ctx.settings
        if torch.is_grad_enabled():
            # Somebody wants second derivatives: those of the plain formula.
            loss, _ = plain_prototype_distillation(student, teacher, labels, *definition)
            (gradient,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
        else:
            gradient = prototype_distillation_backward(
                upstream, student, teacher, labels, *small, definition[-1], backend
            )
    return gradient, None, None, None, None, None, None


prototype_distillation.register_autograd(_backward, setup_context=_setup_context)


def _passes(backend: str, student: Tensor, teacher: Tensor) -> Passes:
    if use_triton(backend, teacher if teacher.dtype == torch.float64 else student):
        from passion_plugin.losses.kernels._prototype import PASSES

        return PASSES
    return Passes(_class_sums, _gap_sums, _feature_gradient)


def _flat(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of voxels; a view wherever the strides allow it."""
    return student.flatten(2), teacher.flatten(2), labels.flatten(labels.ndim - student.ndim + 2)


def _directions(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions (B, K, C) of the prototypes, their slope by the sums (B, K, 1), where the bound acts (B, K, 1)."""
    size = counts.unsqueeze(-1).to(sums.dtype) + EPS
    prototypes = sums / size
    squared = prototypes.square().sum(-1, keepdim=True)
    length = squared.clamp(min=EPS**2).sqrt()
    return prototypes / length, 1 / (size * length), squared < EPS**2


def _class_weights(counts: Tensor, voxels: Tensor, official: bool, dtype: torch.dtype) -> Tensor:
    """Weights (B, K) of a mean over voxels and the classes that count; all 0 where none does."""
    present = counts > 0
    if official:
        present = present.all(0, keepdim=True).expand_as(present)
    return present.to(dtype) / (present.sum(1, keepdim=True) * voxels).clamp(min=1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    # A class that does not count must not matter even if it is NaN.
    return torch.where(weights > 0, weights * values, 0.0).sum(1)


def _class_sums(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the features of each class, (B, K, Cs) and (B, K, Ct), and its number of voxels (B, K)."""
    dtype = wide_dtype(student, teacher)
    batch = len(student)
    sums = [torch.zeros(batch, num_classes, f.shape[1], dtype=dtype, device=f.device) for f in (student, teacher)]
    counts = torch.zeros(batch, num_classes, dtype=dtype, device=student.device)
    for b in range(batch):
        for part in _parts(student, teacher, num_classes):
            masks = counts.new_empty(num_classes, part.stop - part.start)
            _write_masks(labels[b, ..., part], ignore_index, into=masks)
            counts[b] += masks.sum(1)
            for total, features in zip(sums, (student, teacher), strict=True):
                total[b].addmm_(masks, features[b, :, part].to(dtype).T)
    return sums[0], sums[1], counts


def _gap_sums(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    directions_s: Tensor,
    directions_t: Tensor,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over voxels of squared gap, of its size, (B, K) each, and of gap times f / l (B, K, Cs)."""
    dtype, num_classes = directions_s.dtype, directions_s.shape[1]
    squares, sizes = directions_s.new_zeros(2, len(student), num_classes)
    turn = torch.zeros_like(directions_s)
    for b in range(len(student)):
        for part in _parts(student, teacher, num_classes):
            f, t = student[b, :, part].to(dtype), teacher[b, :, part].to(dtype)
            (similarity, scale, _), (target, *_) = _cosines(directions_s[b], f), _cosines(directions_t[b], t)
            gap = _without_ignored(similarity.sub_(target), labels[b, ..., part], ignore_index)
            squares[b] += gap.square().sum(1)
            sizes[b] += gap.abs().sum(1)
            turn[b].addmm_(gap.mul_(scale), f.T)
    return squares, sizes, turn


def _feature_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    directions_s: Tensor,
    directions_t: Tensor,
    slopes: Tensor,
    pull: Tensor,
    ignore_index: int | None,
) -> Tensor:
    """Gradient (B, Cs, V), from the ``slopes`` (B, K) of P by gap / gap and its gradient ``pull`` by class sums."""
    dtype, num_classes = directions_s.dtype, directions_s.shape[1]
    gradient = torch.empty_like(student)
    for b in range(len(student)):
        towards = torch.cat((directions_s[b], pull[b])).T
        for part in _parts(student, teacher, num_classes):
            f, t, y = student[b, :, part].to(dtype), teacher[b, :, part].to(dtype), labels[b, ..., part]
            (similarity, scale, squared), (target, *_) = _cosines(directions_s[b], f), _cosines(directions_t[b], t)
            gap = _without_ignored(torch.sub(similarity, target, out=target), y, ignore_index)
            drive = gap.new_empty(2 * num_classes, len(scale))
            slope = torch.mul(gap, slopes[b].unsqueeze(1), out=drive[:num_classes]).mul_(scale)
            _write_masks(y, ignore_index, into=drive[num_classes:])
            # A length at its bound does not change with f.
            radial = similarity.mul_(slope).sum(0).mul_(scale).masked_fill_(squared < EPS**2, 0.0)
            result = gradient[b, :, part]
            if gradient.dtype == dtype:
                torch.mm(towards, drive, out=result).addcmul_(f, radial, value=-1)
            else:
                result.copy_(torch.mm(towards, drive).addcmul_(f, radial, value=-1))
    return gradient


def _parts(student: Tensor, teacher: Tensor, num_classes: int) -> Iterator[slice]:
    """Cut the voxels: the largest temporaries are as wide as the features and as the maps of both."""
    widest = max(student.shape[1], teacher.shape[1]) + 2 * num_classes
    return voxel_chunks(student.shape[2], widest, times=4)


def _cosines(directions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (K, n) of the features (C, n) of some voxels, their 1 / l (n,), and their squared lengths (n,)."""
    squared = features.square().sum(0)
    scale = squared.clamp(min=EPS**2).rsqrt_()
    return torch.mm(directions, features).mul_(scale), scale, squared


def _write_masks(labels: Tensor, ignore_index: int | None, *, into: Tensor) -> None:
    """Write which of some voxels belong to which class into (K, n), as 0 and 1."""
    if labels.ndim == 2:
        torch.ne(labels, 0, out=into)
        return
    classes = torch.arange(len(into), dtype=into.dtype, device=into.device).unsqueeze(1)
    # Compared as floating numbers: several times as fast as integers.
    torch.eq(labels.to(into.dtype), classes, out=into)
    _without_ignored(into, labels, ignore_index)


def _without_ignored(values: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
    return values if ignore_index is None else values.masked_fill_(_ignored(labels, ignore_index), 0)


def _ignored(labels: Tensor, ignore_index: int) -> Tensor:
    # Compared with uint8 as it is, 256 would be 0.
    return labels.long() == ignore_index
