"""How well a prediction does, per sample; and how well a modality does compared with the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from passion_plugin._types import Outputs
from passion_plugin._validate import is_number
from passion_plugin.errors import ConfigError
from passion_plugin.losses import resize_labels
from passion_plugin.training import TrainingStep


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least: sums over a volume overflow in float16 and lose digits in bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def positive(name: str, value: Any) -> float:
    """Return ``value``, a positive number, or raise a ConfigError."""
    if not is_number(value, above=0):
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def true_class_probability(logits: Tensor, labels: Tensor, outputs: Outputs) -> Tensor:
    r"""Return the mean probability of the true class; every class of the sample weighs the same.

    .. math::
        s_b = \frac{1}{|C_b|} \sum_{k \in C_b} \frac{1}{n_{bk}} \sum_{v:\, y_{bv} = k} p_{bkv}

    with :math:`C_b` the classes in the labels of the sample. A plain mean over voxels would say how well the network
    knows the background, which fills nearly all of a medical image. Each region counts as two classes, inside and
    outside.

    Args:
        logits: (B, K, *spatial).
        labels: (B, *spatial), or masks (B, K, *spatial), at any resolution.
        outputs: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        (B,), float32 at least.

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
    log = widened(logits).log_softmax(1)
    entropy = reduce(-log.exp() * log, "b k ... -> b (...)", "sum")
    return _class_mean(entropy, rearrange(labels, "b ... -> b (...)"), logits.shape[1])


def student_scores(step: TrainingStep, labels: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score students that saw one modality each, (B, M); zero where there is none.

    ``score`` leads from logits (n, K, *spatial) and the labels of these n samples to (n,).
    """
    scores = widened(step.teacher.logits).new_zeros(step.presence.shape)
    for student in step.students:
        rows = student.rows.to(labels.device)
        column = torch.full_like(rows, step.adapter.modalities.index(student.modality))
        values = score(student.prediction.logits, labels[rows])
        scores = scores.to(values).index_put((rows, column), values)
    return scores


def compared(step: TrainingStep) -> list[tuple[int, str]]:
    """Return column and name of the modalities that some sample of the batch has together with another one."""
    return [(column, name) for column, name in enumerate(step.adapter.modalities) if step.active[:, column].any()]


def comparable(scores: Tensor, active: Tensor) -> Tensor:
    """Return where a score is finite and another one of the same sample is too, bool (B, M).

    A score that overflowed says nothing about its modality, and must not change what is said about the others.
    ``active``, bool (B, M): the sample has the modality and at least one other.

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
    PMR. From scores s and active a (the sample has the modality and at least one other), (B, M) both, to (M,), which is
    meaningless for a modality that is nowhere active.

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
    logits, number = widened(logits), logits.shape[1]
    if outputs == "softmax":
        values = logits.log_softmax(1).gather(1, rearrange(labels, "b ... -> b 1 ..."))
    else:
        values = F.logsigmoid(torch.where(labels > 0, logits, -logits))
        inside = rearrange(labels, "b k ... -> b k (...)")
        labels, number = inside + 2 * torch.arange(number, device=labels.device)[:, None], 2 * number
    return rearrange(values, "b ... -> b (...)"), rearrange(labels, "b ... -> b (...)"), number


def _class_mean(values: Tensor, classes: Tensor, number: int) -> Tensor:
    """Return the mean over classes 0..number-1 of the mean over the voxels of each, (B,)."""
    # Not scatter_add: adding millions of voxels one by one loses digits of float32, sums over a mask do not.
    members = [classes == k for k in range(number)]
    sums = torch.stack([torch.where(member, values, 0).sum(1) for member in members], dim=1)
    counts = torch.stack([member.sum(1) for member in members], dim=1)
    return (sums / counts.clamp(min=1)).sum(1) / (counts > 0).sum(1)
