"""Pixel distillation with PyTorch operations: chunk by chunk, so that temporaries stay in the CPU's cache.

Exponentials outside of softmax are powers of 2: PyTorch on the CPU takes a quarter of the time for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from passion_plugin.losses._common import outside_autocast, voxel_chunks, wide_dtype

__all__ = ["CLAMP", "divergence", "gradient"]

CLAMP = 0.005

_SLAB_ELEMENTS = 1 << 18

_SLAB_PLANES = 32  # in 2-D, more would fill the matrix of the first axis with zeros


def divergence(student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int) -> Tensor:
    """Per-sample divergence, see :func:`~passion_plugin.ops.pixel.plain_pixel_distillation`.

    Args:
        student: logits (B, K, *spatial).
        teacher: logits of the same shape.
        temperature: T.
        kind: ``"softmax"``, ``"sigmoid"`` or ``"clamped"``.
        scale_factor: of the up-sampling; above 1 for ``"clamped"`` only.

    Returns:
        (B,) in float32, or in float64 if an input is.
    """
    dtype = wide_dtype(student, teacher)
    rate = 1 / temperature
    total = student.new_zeros(len(student), dtype=dtype)
    with outside_autocast(student):
        if scale_factor > 1:
            qs, qt = (_probabilities(z, rate, dtype) for z in (student, teacher))
            for slab in _slabs(qs, scale_factor):
                total += _clamped_sum(slab.up(qs), slab.up(qt))
        else:
            summed = {"softmax": _softmax_sum, "sigmoid": _sigmoid_sum, "clamped": _clamped_sum_of_logits}[kind]
            zs, zt = student.flatten(2), teacher.flatten(2)
            for part in voxel_chunks(zs.shape[2], zs.shape[0] * zs.shape[1]):
                total += summed(zs[..., part], zt[..., part], rate, dtype)
    return total * (temperature**2 / _entries(student, scale_factor))


def gradient(
    upstream: Tensor, student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int
) -> Tensor:
    """Gradient of :func:`divergence` for the student's logits.

    Args:
        upstream: (B,), the gradient for the divergence.
        student: as in the forward pass, like all that follow.
        teacher: as above.
        temperature: as above.
        kind: as above.
        scale_factor: as above.

    Returns:
        (B, K, *spatial) in the dtype of the student.
    """
    dtype = wide_dtype(student, teacher)
    rate = 1 / temperature
    zs, zt = student.flatten(2), teacher.flatten(2)
    result = torch.empty_like(zs)
    scale = upstream.to(dtype).view(-1, 1, 1) * (temperature / _entries(student, scale_factor))
    with outside_autocast(student):
        if scale_factor > 1:
            qs, qt = (_probabilities(z, rate, dtype) for z in (student, teacher))
            slope = torch.zeros_like(qs)
            for slab in _slabs(qs, scale_factor):
                slab.add_down(_clamped_slope(slab.up(qs), slab.up(qt)), slope)
            torch.mul(_through_softmax(qs, slope).flatten(2), scale, out=result)
        else:
            slope_of = {"softmax": _softmax_slope, "sigmoid": _sigmoid_slope, "clamped": _clamped_slope_of_logits}[kind]
            for part in voxel_chunks(zs.shape[2], zs.shape[0] * zs.shape[1]):
                slope = slope_of(zs[..., part], zt[..., part], rate, dtype)
                torch.mul(slope, scale, out=result[..., part])
    return result.view(student.shape)


def _entries(student: Tensor, scale_factor: int) -> int:
    """K V: over how many classes and voxels the mean runs."""
    return math.prod(student.shape[1:]) * scale_factor ** (student.ndim - 2)


def _scaled(z: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """``rate z`` in ``dtype``, a copy with the voxels of a class side by side."""
    if z.stride(-1) != 1:  # channels last: softmax over the few classes of each voxel would be slow
        z = z.contiguous()
    return z.to(dtype) * rate


def _probabilities(z: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    return _scaled(z, rate, dtype).softmax(1)


def _softmax_sum(zs: Tensor, zt: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """``sum q_t (log q_t - log q_s)``."""
    log_qs, log_qt = (_scaled(z, rate, dtype).log_softmax(1) for z in (zs, zt))
    gap = torch.sub(log_qt, log_qs, out=log_qs)
    return log_qt.mul_(1 / math.log(2)).exp2_().mul_(gap).sum((1, 2))


def _softmax_slope(zs: Tensor, zt: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    return _probabilities(zs, rate, dtype).sub_(_probabilities(zt, rate, dtype))


def _sigmoid_sum(zs: Tensor, zt: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """``sum p_t (a_t - a_s) + log(1 + e^a_s) - log(1 + e^a_t)``, with ``log(1 + e^a) = max(a, 0) + log(1 + e^-|a|)``.

    The two logarithms become one of a quotient, taken by ``log1p`` so that no digit of small terms is lost.
    """
    a_s, a_t = (z.to(dtype) * rate for z in (zs, zt))
    e_s, e_t = (a.abs().mul_(-1 / math.log(2)).exp2_() for a in (a_s, a_t))
    total = e_s.sub_(e_t).div_(e_t.add_(1)).log1p_()
    total += a_t.sigmoid().mul_(a_t - a_s)
    total += a_s.relu_().sub_(a_t.relu_())
    return total.sum((1, 2))


def _sigmoid_slope(zs: Tensor, zt: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    return (zs.to(dtype) * rate).sigmoid_().sub_((zt.to(dtype) * rate).sigmoid_())


def _clamped_sum(qs: Tensor, qt: Tensor) -> Tensor:
    """``sum c(q_t) log(c(q_t) / c(q_s))`` with c the clamp from below; overwrites both."""
    qt.clamp_(CLAMP, 1)
    return qs.clamp_(CLAMP, 1).reciprocal_().mul_(qt).log_().mul_(qt).flatten(1).sum(1)


def _clamped_slope(qs: Tensor, qt: Tensor) -> Tensor:
    """Derivative for ``qs``, zero below the clamp; overwrites ``qt``."""
    free = qs.clone().ge_(CLAMP)  # in the dtype of qs: products with a bool tensor are several times slower
    return qt.clamp_(CLAMP, 1).div_(qs.clamp(CLAMP, 1)).mul_(free).neg_()


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """From the derivative for ``q = softmax(a)`` to that for a; overwrites ``slope``."""
    return slope.sub_((q * slope).sum(1, keepdim=True)).mul_(q)


def _clamped_sum_of_logits(zs: Tensor, zt: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    return _clamped_sum(_probabilities(zs, rate, dtype), _probabilities(zt, rate, dtype))


def _clamped_slope_of_logits(zs: Tensor, zt: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    qs, qt = _probabilities(zs, rate, dtype), _probabilities(zt, rate, dtype)
    return _through_softmax(qs, _clamped_slope(qs, qt))


class _Slab:
    """Some planes of the up-sampled volume, as products with one small matrix per spatial axis.

    Matrix products serve both ways: their transpose is exact, and on every device it adds up in a fixed order.

    Args:
        matrices: (outputs, inputs) for each spatial axis; the first for the planes of this slab and the coarse planes
            that they lie between.
        planes: these coarse planes.
    """

    def __init__(self, matrices: list[Tensor], planes: slice) -> None:
        self.matrices = matrices
        self.planes = planes

    def up(self, q: Tensor) -> Tensor:
        """(B, K, *coarse) to (B, K, planes, *fine), the largest product last and with the smallest matrix."""
        first, *middle, last = self.matrices
        q = q[:, :, self.planes] @ last.T
        for matrix in middle:
            q = matrix @ q
        return (first @ q.flatten(3)).unflatten(3, q.shape[3:])

    def add_down(self, slope: Tensor, into: Tensor) -> None:
        """Add the transpose of :meth:`up` of ``slope`` to ``into`` (B, K, *coarse)."""
        first, *middle, last = self.matrices
        slope = (first.T @ slope.flatten(3)).unflatten(3, slope.shape[3:])
        for matrix in middle:
            slope = matrix.T @ slope
        into[:, :, self.planes] += slope @ last


def _slabs(q: Tensor, scale_factor: int) -> Iterator[_Slab]:
    """Cut the volume that is ``scale_factor`` times that of ``q`` into slabs of whole planes."""
    first, *others = (_interpolation(size, scale_factor, q) for size in q.shape[2:])
    fine, coarse = first.shape
    plane = math.prod(q.shape[:2]) * math.prod(map(len, others))
    step = min(max(1, _SLAB_ELEMENTS // max(1, plane)), _SLAB_PLANES)
    for start in range(0, fine, step):
        stop = min(start + step, fine)
        lowest = start * (coarse - 1) // (fine - 1)
        highest = -((stop - 1) * (coarse - 1) // (1 - fine))
        planes = slice(lowest, highest + 1)
        yield _Slab([first[start:stop, planes], *others], planes)


def _interpolation(size: int, scale_factor: int, like: Tensor) -> Tensor:
    """Linear interpolation of ``size`` values, ends aligned, as a matrix: the hat function around each of them."""
    steps = torch.arange(size * scale_factor, device=like.device, dtype=torch.float64)
    positions = steps * ((size - 1) / (size * scale_factor - 1))
    distance = positions.unsqueeze(1) - torch.arange(size, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)
