"""Pixel-wise self-distillation: what every voxel of the student should predict (arXiv:2407.14796)."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from passion_plugin._types import Backend, Mode, Outputs
from passion_plugin._validate import (
    Problems,
    check_choice,
    check_map,
    check_outputs,
    check_pair,
    check_positive_int,
    check_positive_number,
)
from passion_plugin.losses import _pixel_op as ops

__all__ = ["pixel_distillation"]


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
        backend: ``"auto"``, ``"eager"`` or ``"triton"``, see :mod:`passion_plugin.ops`.

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
    check_outputs(problems, mode, outputs)
    check_choice(problems, "backend", backend, get_args(Backend))
    check_positive_number(problems, "temperature", temperature)
    check_positive_int(problems, "scale_factor", scale_factor)
    fewest = 1 if outputs == "sigmoid" else 2
    usable = [
        check_map(problems, name, logits, minimum=fewest)
        for name, logits in (("student", student), ("teacher", teacher))
    ]
    if all(usable):
        check_pair(problems, student, teacher, channels=True)
    problems.raise_all()

    kind = "clamped" if mode == "official" else outputs
    factor = int(scale_factor) if mode == "official" else 1
    return ops.pixel_distillation(student, teacher.detach(), float(temperature), kind, factor, backend)
