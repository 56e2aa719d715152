r"""Pixel distillation as one operation: one read of both logits each way, nothing of their size kept.

With :math:`a = z / T` and the loss :math:`\kappa` of one sample, backward computes the probabilities once more:

.. math::
    \frac{\partial \kappa}{\partial z^s} = \frac{T}{K V} (q^s - q^t)

for softmax and sigmoid alike. With c for clamping, the clamped kind has :math:`h = -c(q^t) / c(q^s)` where
:math:`q^s` is not below the bound, else 0, brought down by the transpose of the interpolation, and

.. math::
    \frac{\partial \kappa}{\partial z^s_k} = \frac{T}{K V} q^s_k \Bigl(h_k - \sum_j q^s_j h_j\Bigr).
"""

from __future__ import annotations

# No `from __future__ import annotations`: custom_op of torch 2.5 reads the annotations and wants types, not strings.
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from passion_plugin.losses import _pixel_eager as eager
from passion_plugin.losses._common import outside_autocast, use_triton, wide_dtype

__all__ = ["pixel_distillation", "pixel_distillation_gradient", "plain_pixel_distillation"]


def plain_pixel_distillation(
    student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int
) -> Tensor:
    """The definition of :func:`pixel_distillation`, which autograd can differentiate as often as one likes.

    Args:
        student: logits (B, K, *spatial).
        teacher: logits of the same shape. Detached.
        temperature: T.
        kind: ``"softmax"``, ``"sigmoid"``, or ``"clamped"``: softmax, up-sampled, then clamped to [0.005, 1].
        scale_factor: of the up-sampling; above 1 for ``"clamped"`` only.

    Returns:
        (B,) in float32, or in float64 if an input is.
    """
    dtype = wide_dtype(student, teacher)
    with outside_autocast(student):
        zs, zt = student.to(dtype) / temperature, teacher.detach().to(dtype) / temperature
        if kind == "sigmoid":
            # Both terms together, by log p = z + log(1 - p). Not F.softplus for log(1 - p): it cuts off at z = 20.
            gap = torch.sigmoid(zt) * (zt - zs) + functional.logsigmoid(-zt) - functional.logsigmoid(-zs)
        elif kind == "softmax":
            log_qt = zt.log_softmax(1)
            gap = log_qt.exp() * (log_qt - zs.log_softmax(1))
        else:
            qs, qt = (_clamped_probability(z, scale_factor) for z in (zs, zt))
            gap = qt * (qt.log() - qs.log())
        return temperature**2 * gap.flatten(1).mean(1)


def _clamped_probability(z: Tensor, scale_factor: int) -> Tensor:
    q = z.softmax(1)
    if scale_factor > 1:
        interpolation = "bilinear" if q.ndim == 4 else "trilinear"
        q = functional.interpolate(q, scale_factor=float(scale_factor), mode=interpolation, align_corners=True)
    return q.clamp(eager.CLAMP, 1.0)


@torch.library.custom_op("passion_plugin::pixel_distillation", mutates_args=())
def pixel_distillation(
    student: Tensor, teacher: Tensor, temperature: float, kind: str, scale_factor: int, backend: str
) -> Tensor:
    """Divergence (B,), see :func:`plain_pixel_distillation`."""
    if use_triton(backend, _widest(student, teacher)):
        from passion_plugin.losses.kernels._pixel import divergence

        return divergence(student, teacher, temperature, kind, scale_factor)
    return eager.divergence(student, teacher, temperature, kind, scale_factor)


@torch.library.custom_op("passion_plugin::pixel_distillation_gradient", mutates_args=())
def pixel_distillation_gradient(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    kind: str,
    scale_factor: int,
    backend: str,
) -> Tensor:
    """Gradient for the student's logits from that for the divergence, (B,)."""
    if use_triton(backend, _widest(student, teacher)):
        from passion_plugin.losses.kernels._pixel import gradient

        return gradient(upstream, student, teacher, temperature, kind, scale_factor)
    return eager.gradient(upstream, student, teacher, temperature, kind, scale_factor)


@pixel_distillation.register_fake
def _(student: Tensor, teacher: Tensor, *settings: Any) -> Tensor:
    return student.new_empty(student.shape[:1], dtype=wide_dtype(student, teacher))


@pixel_distillation_gradient.register_fake
def _(upstream: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student.flatten(2)).view(student.shape)


def _widest(student: Tensor, teacher: Tensor) -> Tensor:
    return teacher if teacher.dtype == torch.float64 else student


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, *ctx.settings, ctx.backend = inputs
    ctx.save_for_backward(student, teacher)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher = ctx.saved_tensors
    to_student = None
    if ctx.needs_input_grad[0] and torch.is_grad_enabled():  # create_graph=True
        value = plain_pixel_distillation(student, teacher, *ctx.settings)
        (to_student,) = torch.autograd.grad(value, student, upstream, create_graph=True)
    elif ctx.needs_input_grad[0]:
        to_student = pixel_distillation_gradient(upstream, student, teacher, *ctx.settings, ctx.backend)
    return to_student, None, None, None, None, None


pixel_distillation.register_autograd(_backward, setup_context=_keep_inputs)
