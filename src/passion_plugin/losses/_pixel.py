r"""Pixel-wise self-distillation: what every voxel of the student should predict (arXiv:2407.14796).

A custom operator reads both logits once in each direction and keeps nothing of their size. With :math:`a = z / T` and
the loss :math:`\kappa` of one sample, backward computes the probabilities once more:

.. math::
    \frac{\partial \kappa}{\partial z^s} = \frac{T}{K V} (q^s - q^t)

for softmax and sigmoid alike. With c for clamping, the clamped kind has :math:`h = -c(q^t) / c(q^s)` where
:math:`q^s` is not below the bound, else 0, brought down by the transpose of the interpolation, and

.. math::
    \frac{\partial \kappa}{\partial z^s_k} = \frac{T}{K V} q^s_k \Bigl(h_k - \sum_j q^s_j h_j\Bigr).
"""

# No `from __future__ import annotations`: custom_op of torch 2.5 wants types as annotations, not strings.

import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from passion_plugin._types import Backend, Mode, Outputs
from passion_plugin._validate import Problems, check_pair, check_settings, is_int, is_number
from passion_plugin.losses import _common as common


def pixel_distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    scale_factor: int = 1,
    mode: Mode = "default",
    outputs: Outputs = "softmax",
    backend: Backend = "auto",
) -> Tensor:
    r"""Divergence of the student's class probabilities from the teacher's, per sample.

    .. math::
        \kappa_b = \frac{T^2}{K V} \sum_v \sum_k q^t_{bkv} (\log q^t_{bkv} - \log q^s_{bkv}),
        \qquad q = \mathrm{softmax}(z / T)

    The mean runs over classes and voxels; :math:`T^2` makes the size of the gradient independent of T.

    * ``mode="default"``: as written, from ``log_softmax``, so that a confidently wrong student gets its full
      gradient. The value is never negative but for rounding, some 1e-9 T^2 in float32. Coarse outputs are compared at
      their own resolution: ``scale_factor`` is accepted, so that both modes share one call, and has no effect.
    * ``mode="official"``: the published code. :math:`q = \mathrm{clamp}(\mathrm{Up}(\mathrm{softmax}(z / T)),
      0.005, 1)`, with bi- or trilinear ``Up`` by ``scale_factor`` (``align_corners=True``) and no
      re-normalisation: the value can be negative, and a clamped probability gets no gradient.
    * ``outputs="sigmoid"``: every channel is a region of its own, with the Bernoulli divergence
      :math:`p^t \log\frac{p^t}{p^s} + (1 - p^t) \log\frac{1 - p^t}{1 - p^s}`, :math:`p = \sigma(z / T)`,
      in place of the sum over k, and the same mean over regions and voxels. Default mode only.

    Args:
        student: logits (B, K, *spatial) with 2 or 3 spatial axes. K >= 2 for softmax, >= 1 for sigmoid.
        teacher: logits of the same shape. Detached: no gradient reaches them.
        temperature: T > 0, no unit.
        scale_factor: by how much official mode up-samples; :math:`2^j` for the j-th coarse output.
        mode: ``"default"`` or ``"official"``.
        outputs: ``"softmax"`` (exclusive classes) or ``"sigmoid"`` (regions).
        backend: ``"auto"``: Triton kernels on CUDA where installed, else PyTorch; or ``"triton"``, ``"eager"``.

    Returns:
        (B,) in float32, or in float64 if an input is; computed so under autocast too.

    Raises:
        ConfigError: a setting is unknown or out of range, or ``backend="triton"`` cannot be had.
        InputError: a tensor has the wrong shape or dtype.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        >>> pixel_distillation(teacher, teacher)
        tensor([0.])
        >>> pixel_distillation(-teacher, teacher, temperature=1.0)
        tensor([0.7616])
    """
    problems = Problems("pixel_distillation")
    check_settings(problems, mode, outputs, backend)
    if not is_number(temperature, above=0):
        problems.settings.append(f"temperature={temperature!r}, but it must be a finite number above 0.")
    if not is_int(scale_factor, least=1):
        problems.settings.append(f"scale_factor={scale_factor!r}, but it must be an integer of at least 1.")
    check_pair(problems, student, teacher, minimum=1 if outputs == "sigmoid" else 2)
    problems.raise_all()
    kind, factor = ("clamped", int(scale_factor)) if mode == "official" else (outputs, 1)
    return _pixel_op(student, teacher.detach(), float(temperature), kind, factor, backend)


def plain_pixel_distillation(
    student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int
) -> Tensor:
    """The definition of :func:`pixel_distillation`, which autograd can differentiate any number of times.

    ``kind`` is ``"softmax"``, ``"sigmoid"``, or ``"clamped"``: softmax, up-sampled by ``scale_factor`` (1 for the
    others), then clamped to [0.005, 1].
    """
    dtype = common.compute_dtype(student, teacher)
    a_s, a_t = student.to(dtype) / temperature, teacher.detach().to(dtype) / temperature
    if kind == "sigmoid":
        # Both terms together, by log p = a + log(1 - p). Not F.softplus for log(1 - p): it cuts off at a = 20.
        gap = torch.sigmoid(a_t) * (a_t - a_s) + F.logsigmoid(-a_t) - F.logsigmoid(-a_s)
    elif kind == "softmax":
        log_qt = a_t.log_softmax(1)
        gap = log_qt.exp() * (log_qt - a_s.log_softmax(1))
    else:
        qs, qt = (_clamped_probability(a, scale_factor) for a in (a_s, a_t))
        gap = qt * (qt.log() - qs.log())
    return temperature**2 * reduce(gap, "b ... -> b", "mean")


def _clamped_probability(a: Tensor, scale_factor: int) -> Tensor:
    q = a.softmax(1)
    if scale_factor > 1:
        mode = "bilinear" if q.ndim == 4 else "trilinear"
        q = F.interpolate(q, scale_factor=float(scale_factor), mode=mode, align_corners=True)
    return q.clamp(common.MIN_PROBABILITY, 1.0)


@torch.library.custom_op("passion_plugin::pixel_distillation", mutates_args=())
def _pixel_op(
    student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int, backend: str
) -> Tensor:
    """Divergence (B,) of :func:`plain_pixel_distillation`, in chunks whose temporaries stay in the CPU's cache."""
    if common.use_triton(backend, student, teacher):
        from passion_plugin.losses.kernels._pixel import divergence

        return divergence(student, teacher, temperature, kind, scale_factor)
    dtype = common.compute_dtype(student, teacher)
    total = student.new_zeros(len(student), dtype=dtype)
    with common.no_autocast(student):
        if scale_factor > 1:
            qs, qt = (_scaled(z, temperature, dtype).softmax(1) for z in (student, teacher))
            for planes, matrices in _slabs(qs, scale_factor):
                total += _clamped_sum(_upsample(qs[:, :, planes], matrices), _upsample(qt[:, :, planes], matrices))
        else:
            for _, a_s, a_t in _scaled_chunks(student, teacher, temperature, dtype):
                total += _chunk_sum(a_s, a_t, kind)
    return total * (temperature**2 / _entries(student, scale_factor))


@torch.library.custom_op("passion_plugin::pixel_distillation_gradient", mutates_args=())
def _pixel_gradient_op(
    upstream: Tensor, student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int, backend: str
) -> Tensor:
    """Gradient of the student's logits, in their dtype, from that of the divergence, (B,)."""
    if common.use_triton(backend, student, teacher):
        from passion_plugin.losses.kernels._pixel import gradient

        return gradient(upstream, student, teacher, temperature, kind, scale_factor)
    dtype = common.compute_dtype(student, teacher)
    result = common.empty_gradient(student)
    flat = common.flatten_voxels(result)
    scale = rearrange(upstream.to(dtype), "b -> b 1 1") * (temperature / _entries(student, scale_factor))
    with common.no_autocast(student):
        if scale_factor > 1:
            qs, qt = (_scaled(z, temperature, dtype).softmax(1) for z in (student, teacher))
            slope = torch.zeros_like(qs)
            for planes, matrices in _slabs(qs, scale_factor):
                fine = _clamped_slope(_upsample(qs[:, :, planes], matrices), _upsample(qt[:, :, planes], matrices))
                slope[:, :, planes] += _upsample_transposed(fine, matrices)
            torch.mul(common.flatten_voxels(_through_softmax(qs, slope)), scale, out=flat)
        else:
            for part, a_s, a_t in _scaled_chunks(student, teacher, temperature, dtype):
                torch.mul(_chunk_slope(a_s, a_t, kind), scale, out=flat[..., part])
    return result


@_pixel_op.register_fake
def _(student: Tensor, teacher: Tensor, *settings: Any) -> Tensor:
    return student.new_empty(len(student), dtype=common.compute_dtype(student, teacher))


common.register_gradient(_pixel_op, _pixel_gradient_op, plain_pixel_distillation, tensors=2)


def _entries(student: Tensor, scale_factor: int) -> int:
    """K V: over how many classes and voxels the mean runs."""
    return math.prod(student.shape[1:]) * scale_factor ** (student.ndim - 2)


def _scaled(z: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """``z / T`` in ``dtype``, a copy with the voxels of a class side by side."""
    if z.stride(-1) != 1:  # channels last: softmax over the few classes of each voxel would be slow
        z = z.contiguous()
    return z.to(dtype) * (1 / temperature)


def _scaled_chunks(
    student: Tensor, teacher: Tensor, temperature: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some voxels, and ``z / T`` (B, K, n) of student and teacher there."""
    zs, zt = common.flatten_voxels(student), common.flatten_voxels(teacher)
    for part in common.voxel_chunks(zs.shape[2], zs.shape[0] * zs.shape[1]):
        yield part, _scaled(zs[..., part], temperature, dtype), _scaled(zt[..., part], temperature, dtype)


def _chunk_sum(a_s: Tensor, a_t: Tensor, kind: str) -> Tensor:
    """Divergence (B,) summed over classes and voxels of ``a = z / T`` (B, K, n); overwrites both."""
    if kind == "softmax":
        log_qs, log_qt = a_s.log_softmax(1), a_t.log_softmax(1)
        gap = torch.sub(log_qt, log_qs, out=log_qs)
        return common.exp_(log_qt).mul_(gap).sum((1, 2))
    if kind == "sigmoid":
        # sum p_t (a_t - a_s) + log(1 + e^a_s) - log(1 + e^a_t), with log(1 + e^a) = max(a, 0) + log(1 + e^-|a|). The
        # two logarithms become one of a quotient, taken by log1p so that no digit of small terms is lost.
        e_s, e_t = (common.exp_(a.abs().neg_()) for a in (a_s, a_t))
        total = e_s.sub_(e_t).div_(e_t.add_(1)).log1p_()
        total += a_t.sigmoid().mul_(a_t - a_s)
        total += a_s.relu_().sub_(a_t.relu_())
        return total.sum((1, 2))
    return _clamped_sum(a_s.softmax(1), a_t.softmax(1))


def _chunk_slope(a_s: Tensor, a_t: Tensor, kind: str) -> Tensor:
    """Derivative of :func:`_chunk_sum` by ``a_s``; overwrites both."""
    if kind == "softmax":
        return a_s.softmax(1).sub_(a_t.softmax(1))
    if kind == "sigmoid":
        return a_s.sigmoid_().sub_(a_t.sigmoid_())
    qs, qt = a_s.softmax(1), a_t.softmax(1)
    return _through_softmax(qs, _clamped_slope(qs, qt))


def _clamped_sum(qs: Tensor, qt: Tensor) -> Tensor:
    """``sum c(q_t) log(c(q_t) / c(q_s))`` with c the clamp from below; overwrites both."""
    qt.clamp_(common.MIN_PROBABILITY, 1)
    return reduce(qs.clamp_(common.MIN_PROBABILITY, 1).reciprocal_().mul_(qt).log_().mul_(qt), "b ... -> b", "sum")


def _clamped_slope(qs: Tensor, qt: Tensor) -> Tensor:
    """Derivative for ``qs``, zero below the clamp; overwrites ``qt``."""
    # In the dtype of qs: products with a bool tensor are several times slower.
    free = qs.clone().ge_(common.MIN_PROBABILITY)
    return qt.clamp_(common.MIN_PROBABILITY, 1).div_(qs.clamp(common.MIN_PROBABILITY, 1)).mul_(free).neg_()


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """From the derivative for ``q = softmax(a)`` to that for a; overwrites ``slope``."""
    return slope.sub_((q * slope).sum(1, keepdim=True)).mul_(q)


_SLAB_ELEMENTS = 1 << 18
_SLAB_PLANES = 32  # in 2-D, more would fill the matrix of the first axis with zeros


def _slabs(q: Tensor, scale_factor: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut the volume that is ``scale_factor`` times as fine as ``q`` (B, K, *coarse) into slabs of whole planes.

    Yields the coarse planes that a slab lies between, and its interpolation: a small matrix (fine, coarse) for each
    spatial axis. Matrix products serve both ways: their transpose is exact and adds up in a fixed order.
    """
    first, *others = (_interpolation(size, scale_factor, q) for size in q.shape[2:])
    fine, coarse = first.shape
    plane = math.prod(q.shape[:2]) * math.prod(map(len, others))
    step = min(max(1, _SLAB_ELEMENTS // max(1, plane)), _SLAB_PLANES)
    for start in range(0, fine, step):
        stop = min(start + step, fine)
        lowest = start * (coarse - 1) // (fine - 1)
        highest = -((stop - 1) * (coarse - 1) // (1 - fine))  # rounded up
        planes = slice(lowest, highest + 1)
        yield planes, [first[start:stop, planes], *others]


def _interpolation(size: int, scale_factor: int, like: Tensor) -> Tensor:
    """Linear interpolation of ``size`` values, ends aligned, as a matrix: the hat function around each of them."""
    steps = torch.arange(size * scale_factor, device=like.device, dtype=torch.float64)
    positions = rearrange(steps * ((size - 1) / (size * scale_factor - 1)), "fine -> fine 1")
    distance = positions - torch.arange(size, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)


def _upsample(q: Tensor, matrices: list[Tensor]) -> Tensor:
    """(B, K, *coarse) to (B, K, *fine), the largest product last and with the smallest matrix."""
    first, *middle, last = matrices
    q = q @ last.T
    for matrix in middle:
        q = matrix @ q
    return (first @ q.flatten(3)).unflatten(3, q.shape[3:])


def _upsample_transposed(slope: Tensor, matrices: list[Tensor]) -> Tensor:
    """(B, K, *fine) to (B, K, *coarse): the transpose of :func:`_upsample`, the largest product first."""
    first, *middle, last = matrices
    slope = (first.T @ slope.flatten(3)).unflatten(3, slope.shape[3:])
    for matrix in middle:
        slope = matrix.T @ slope
    return slope @ last
