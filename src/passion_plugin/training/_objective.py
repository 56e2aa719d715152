"""From terms per sample and modality to one scalar: the only place where anything is weighted or reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passion_plugin._types import Outputs
from passion_plugin._validate import describe
from passion_plugin.backbone import Prediction, Student
from passion_plugin.config import PassionConfig
from passion_plugin.errors import UsageError
from passion_plugin.losses import pixel_distillation, prototype_distillation, resize_labels, segmentation_loss
from passion_plugin.training._gradient_scaling import scale_gradient

UnimodalLoss = Callable[[Tensor, Tensor], Tensor]
"""The user's own loss: logits (n, K, *spatial) and labels (n, *spatial) or masks give their mean or (n,) values."""

_TERMS = ("pixel", "prototype", "distance", "unimodal")


@dataclass(frozen=True)
class LossTerms:
    """The terms of one step, before any weight, (B, M) each; zero where a term does not exist.

    Attributes:
        modalities: names of the columns.
        pixel: pixel distillation, K in the method's notation.
        prototype: prototype distillation, P.
        distance: prototype distance, D; carries no gradient.
        unimodal: uni-modal segmentation loss, S.
        gate: bool, omega: the modality lags behind the others of the sample.
        active: bool, where a student was compared with its teacher.
        supervised: bool, where a uni-modal segmentation loss was computed.
        subset: the same of the students that see several modalities, in one column (B, 1) of that name; None without
            ``subset_students``. Its gate is always open.
    """

    modalities: tuple[str, ...]
    pixel: Tensor
    prototype: Tensor
    distance: Tensor
    unimodal: Tensor
    gate: Tensor
    active: Tensor
    supervised: Tensor
    subset: LossTerms | None = None

    def detached(self) -> LossTerms:
        """Return the terms without gradient."""
        values = {name: getattr(self, name).detach() for name in (*_TERMS, "gate", "active", "supervised")}
        return LossTerms(self.modalities, **values, subset=self.subset and self.subset.detached())

    def means(self) -> dict[str, dict[str, float]]:
        """Return the mean of each term over the samples that have it, by modality name; NaN where none has.

        Returns:
            ``{"pixel": {"flair": …}, "prototype": …, "distance": …, "unimodal": …, "gate": …}``; that of
            ``gate`` is the fraction of active students whose gate is open. Students of several modalities are
            ``"subset"`` next to the names.
        """
        result: dict[str, dict[str, float]] = {}
        for name in (*_TERMS, "gate"):
            where = self.supervised if name == "unimodal" else self.active
            totals = torch.where(where, getattr(self, name).double(), 0).sum(0).tolist()
            counts = where.sum(0).tolist()
            result[name] = {
                modality: total / count if count else math.nan
                for modality, total, count in zip(self.modalities, totals, counts, strict=True)
            }
        if self.subset is not None:
            means = self.subset.means()
            for name in _TERMS:
                result[name] |= means[name]
        return result


def collect_terms(
    teacher: Prediction,
    students: Sequence[Student],
    labels: Tensor,
    modalities: Sequence[str],
    config: PassionConfig,
    outputs: Outputs,
    own_loss: UnimodalLoss | None = None,
) -> dict[str, Tensor]:
    """Compare every student with the teacher of the whole batch; labels may have any resolution.

    Returns:
        The fields ``pixel``, ``prototype``, ``distance`` and ``unimodal`` of :class:`LossTerms`, (B, M) each.
    """
    batch, device = len(teacher.logits), teacher.logits.device
    dtype = torch.promote_types(teacher.logits.dtype, torch.float32)
    zeros = torch.zeros(batch, dtype=dtype, device=device)
    columns = {name: [zeros] * len(modalities) for name in _TERMS}
    for student in students:
        rows = student.rows.to(device)
        target = labels if len(rows) == batch else labels.index_select(0, rows)
        values = (
            *distillation_terms(student.prediction, teacher.rows(rows).detached(), target, config, outputs),
            unimodal_loss(student.prediction.logits, target, config, outputs, own_loss),
        )
        column = modalities.index(student.modality)
        for name, value in zip(_TERMS, values, strict=True):
            columns[name][column] = zeros.index_put((rows,), value.to(dtype))
    return {name: torch.stack(column, dim=1) for name, column in columns.items()}


def distillation_terms(
    student: Prediction, teacher: Prediction, labels: Tensor, config: PassionConfig, outputs: Outputs
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Compare one student with its teacher.

    .. math:: K = \kappa(z^s, z^t) + \sum_j 2^{-j} \kappa(z^s_j, z^t_j)

    with one term for each coarse output.

    Returns:
        pixel, prototype and distance terms, (n,) each.
    """
    size = tuple(student.logits.shape[2:])
    how: Any = {"mode": config.mode, "backend": config.backend}
    pixel = pixel_distillation(student.logits, teacher.logits, config.temperature, outputs=outputs, **how)
    # A UnimodalHead has no coarse outputs to compare.
    pairs = zip(student.coarse, teacher.coarse[: len(student.coarse)], strict=True)
    for level, (ours, theirs) in enumerate(pairs, start=1):
        pixel = pixel + 2.0**-level * pixel_distillation(
            ours,
            theirs,
            config.temperature,
            scale_factor=max(1, round(size[0] / ours.shape[2])),
            outputs=outputs,
            **how,
        )
    prototype, distance = prototype_distillation(
        student.features,
        teacher.features,
        resize_labels(labels, tuple(student.features.shape[2:])),
        student.logits.shape[1],
        check_values=False,
        **how,
    )
    return pixel, prototype, distance


def unimodal_loss(
    logits: Tensor, labels: Tensor, config: PassionConfig, outputs: Outputs, own_loss: UnimodalLoss | None = None
) -> Tensor:
    """Return the segmentation loss, (n,), of a prediction that saw one modality; labels may have any resolution.

    By the user's own loss, of which a scalar counts for each of the n samples, or weighted cross-entropy plus Dice.
    """
    labels = resize_labels(labels, tuple(logits.shape[2:]))
    if own_loss is not None:
        value: Any = own_loss(logits, labels)
        size = len(logits)
        if not isinstance(value, Tensor) or value.shape not in ((), (size,)) or not value.is_floating_point():
            raise UsageError(
                f"unimodal_loss gave {describe(value)} for logits {tuple(logits.shape)}; it must give a floating-point "
                f"tensor, one number for all samples together () or one for each ({size},)"
            )
        return value.expand(size)
    return segmentation_loss(
        logits, labels, mode=config.mode, outputs=outputs, check_values=False, backend=config.backend
    )


def ensure_requires_grad(loss: Tensor) -> Tensor:
    """Return the loss, with something to call backward on where a batch had no students."""
    return loss if loss.requires_grad or not torch.is_grad_enabled() else loss.requires_grad_()


def passion_objective(
    terms: LossTerms, rarity: Sequence[float], beta: Tensor, config: PassionConfig, *, warming_up: bool
) -> Tensor:
    r"""Weight and reduce the terms of a batch.

    .. math::
        L = \frac1B \sum_b \sum_m w_m \left(
            \lambda_{pix}\, \beta_m K_{bm} + \lambda_{proto}\, \omega_{bm} P_{bm} + u\, S_{bm} \right)

    Official mode puts beta and the gate on S as well, as the published code does. :math:`\beta_m` acts on
    gradients only (:func:`passion_plugin.training.scale_gradient`), the value is that with beta = 1. During
    warm-up only S is left, without its gate. With ``config.gate`` off every gate is open. Students of several
    modalities add their :math:`\lambda_{pix} K_b + \lambda_{proto} P_b + u\, S_b`.

    Args:
        terms: with their gradient.
        rarity: w, (M,): the inverse of the fraction of training samples that have the modality.
        beta: (M,).
        config: weights, mode and modulation rule.
        warming_up: whether this is a warm-up epoch.

    Returns:
        A scalar.
    """
    official = config.mode == "official"
    pixel, unimodal = terms.pixel, terms.unimodal
    gate = terms.gate if config.gate else torch.ones_like(terms.gate)
    if config.modulation == "distillation":
        pixel = scale_gradient(pixel, beta)
        unimodal = scale_gradient(unimodal, beta) if official else unimodal
    segmentation = torch.where(gate, unimodal, 0) if official and not warming_up else unimodal
    total = config.unimodal_weight * segmentation
    if not warming_up:
        total = total + config.pixel_weight * pixel
        total = total + config.prototype_weight * torch.where(gate, terms.prototype, 0)
    loss = (total * total.new_tensor(rarity)).sum(1).mean()
    if terms.subset is None:
        return loss
    return loss + passion_objective(terms.subset, (1.0,), beta.new_ones(1), config, warming_up=warming_up)
