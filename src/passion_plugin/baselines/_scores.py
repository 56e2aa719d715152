"""How well a prediction does, per sample; and how well a modality does beside the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin._types import Outputs
from passion_plugin.losses import resize_labels
from passion_plugin.training import TrainingStep

__all__ = [
    "by_modality",
    "comparable",
    "compared",
    "prediction_entropy",
    "ratio_to_others",
    "true_class_loss",
    "true_class_probability",
]


def true_class_probability(logits: Tensor, labels: Tensor, outputs: Outputs) -> Tensor:
    r"""Return the mean probability of the true class, every class of the sample weighing the same.

    .. math::
        s_b = \frac{1}{|C_b|} \sum_{k \in C_b} \frac{1}{n_{bk}} \sum_{v:\, y_{bv} = k} p_{bkv}

    with :math:`C_b` the classes in the labels of the sample. A plain mean over voxels would say how well the
    background is known, which fills nearly all of a medical image. For regions each region counts as two classes,
    inside and outside.

    Args:
        logits: (B, K, *spatial).
        labels: (B, *spatial), or masks (B, K, *spatial), at any resolution.
        outputs: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        (B,), at least float32.

    Example:
        >>> logits = torch.tensor([0.75, 0.25]).log().view(1, 2, 1).expand(1, 2, 4)
        >>> true_class_probability(logits, torch.tensor([[0, 0, 0, 1]]), "softmax")  # (0.75 + 0.25) / 2
        tensor([0.5000])
    """
    values, classes, number = _true_log_probability(logits, labels, outputs)
    return _class_mean(values.exp(), classes, number)


def true_class_loss(logits: Tensor, labels: Tensor, outputs: Outputs) -> Tensor:
    """Return the mean negative log-probability of the true class, as :func:`true_class_probability` averages it."""
    values, classes, number = _true_log_probability(logits, labels, outputs)
    return _class_mean(-values, classes, number)


def prediction_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean entropy of a softmax, (B,), as :func:`true_class_probability` averages over voxels."""
    labels = resize_labels(labels, tuple(logits.shape[2:]))
    log = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return _class_mean(-(log.exp() * log).sum(1).flatten(1), labels.flatten(1), logits.shape[1])


def by_modality(step: TrainingStep, labels: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score the students that saw one modality each.

    Args:
        step: with such students.
        labels: (B, *spatial) or masks.
        score: from logits (n, K, *spatial) and labels of n samples to (n,).

    Returns:
        (B, M), zero where there is no student.
    """
    matrix: Tensor | None = None
    for student in step.students:
        rows = student.rows.to(labels.device)
        values = score(student.prediction.logits, labels.index_select(0, rows))
        if matrix is None:
            matrix = values.new_zeros(step.presence.shape)
        column = torch.full_like(rows, step.adapter.modalities.index(student.modality))
        matrix = matrix.index_put((rows, column), values)
    return step.teacher.logits.new_zeros(step.presence.shape) if matrix is None else matrix


def compared(step: TrainingStep) -> list[tuple[int, str]]:
    """Return column and name of the modalities that some sample of the batch has beside another one."""
    return [(column, name) for column, name in enumerate(step.adapter.modalities) if step.active[:, column].any()]


def comparable(scores: Tensor, active: Tensor) -> Tensor:
    """Return where a score is finite and another one of the same sample is too.

    An overflow says nothing about a modality, and must not say it for the others of the batch, nor for later batches.

    Args:
        scores: (B, M).
        active: bool (B, M): the sample has the modality and at least one other.

    Returns:
        bool (B, M), on the device of the scores.

    Example:
        >>> scores = torch.tensor([[0.5, 0.25, float("nan")], [0.5, float("inf"), 0.0]])
        >>> comparable(scores, torch.tensor([[True, True, True], [True, True, False]])).tolist()
        [[True, True, False], [False, False, False]]
    """
    usable = active.to(scores.device) & scores.isfinite()
    return usable & (usable.sum(1, keepdim=True) > 1)


def ratio_to_others(scores: Tensor, active: Tensor) -> Tensor:
    r"""Compare each modality with the mean of the others that the same samples have.

    .. math::
        \rho_m = \frac{\sum_b a_{bm} s_{bm}}{\sum_b a_{bm} \frac{1}{n_b - 1} \sum_{m' \ne m} a_{bm'} s_{bm'}}

    On complete data with two modalities this is the ratio of the batch sums, the discrepancy ratio of OGM-GE and
    PMR.

    Args:
        scores: (B, M).
        active: bool (B, M), a: the sample has the modality and at least one other.

    Returns:
        (M,); meaningless for a modality that is nowhere active.

    Example:
        >>> scores = torch.tensor([[0.6, 0.2, 0.0], [0.9, 0.3, 0.6]])
        >>> ratio_to_others(scores, scores > 0)  # 1.5 / (0.2 + 0.45), 0.5 / (0.6 + 0.75), 0.6 / 0.6
        tensor([2.3077, 0.3704, 1.0000])
    """
    scores = torch.where(active, scores, 0)
    others = (scores.sum(1, keepdim=True) - scores) / (active.sum(1, keepdim=True) - 1).clamp(min=1)
    others = torch.where(active, others, 0)
    return scores.sum(0) / others.sum(0).clamp(min=torch.finfo(scores.dtype).tiny)


def _true_log_probability(logits: Tensor, labels: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor, int]:
    """Return log-probabilities (B, V) of what is true, which class that is, (B, V), and the number of classes."""
    labels = resize_labels(labels, tuple(logits.shape[2:])).long()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    number = logits.shape[1]
    if outputs == "softmax":
        values = logits.log_softmax(1).gather(1, labels.unsqueeze(1))
        return values.flatten(1), labels.flatten(1), number
    values = F.logsigmoid(torch.where(labels > 0, logits, -logits))
    region = torch.arange(number, device=labels.device).view(-1, *[1] * (labels.ndim - 2))
    return values.flatten(1), (2 * region + labels).flatten(1), 2 * number


def _class_mean(values: Tensor, classes: Tensor, number: int) -> Tensor:
    # Not scatter_add: adding millions of voxels one by one loses digits of float32, sums over a mask do not.
    members = [classes == k for k in range(number)]
    sums = torch.stack([torch.where(member, values, 0).sum(1) for member in members], dim=1)
    counts = torch.stack([member.sum(1) for member in members], dim=1)
    return (sums / counts.clamp(min=1)).sum(1) / (counts > 0).sum(1)
