"""AGM: scale each encoder's gradient by how far its share of the prediction is from its running mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passion_plugin._validate import is_number
from passion_plugin.backbone import StudentInput
from passion_plugin.baselines._scores import comparable, compared, true_class_loss
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.training import EpochReport, ModalityFrequencies, Strategy, TrainingStep, all_reduce_sum

__all__ = ["AGM", "mono_modal_responses"]

_LARGEST_EXPONENT = 7.0

_LARGEST_DIFFERENCE = 80.0  # whose exponential is still a number in float32


def mono_modal_responses(step: TrainingStep) -> list[Tensor]:
    r"""Split the logits of each sample into what its modalities contribute: their Shapley values.

    .. math::
        \phi_{bm} = \sum_{S \subseteq A_b \setminus \{m\}} \frac{|S|!\,(n_b - |S| - 1)!}{n_b!}
        \bigl(z_b(S \cup \{m\}) - z_b(S)\bigr), \qquad z_b(\varnothing) = 0

    with :math:`A_b` the :math:`n_b` available modalities of the sample. They sum to the logits from all of them.
    The network cannot predict from nothing; zero logits, a uniform prediction, stand for that.

    Args:
        step: with a student for each non-empty proper subset of what each sample has.

    Returns:
        M tensors (B, K, *spatial); zeros where the sample lacks the modality.
    """
    modalities, full = step.adapter.modalities, step.teacher.logits
    full = full.to(torch.promote_types(full.dtype, torch.float32))
    shape = (-1, *[1] * (full.ndim - 1))
    number = step.presence.sum(1)
    responses = []
    for column, name in enumerate(modalities):
        share = step.presence[:, column].double() / number
        response = full * share.to(full).view(shape)
        for student in step.students:
            member = name in student.modalities
            rows, size = student.rows, len(student.modalities) - member
            weights = torch.tensor([_weight(size, n) for n in number[rows].tolist()], dtype=torch.float64)
            weights = torch.where(step.presence[rows, column], weights, 0)
            part = student.prediction.logits.to(full) * weights.to(full).view(shape)
            response = response.index_add(0, rows.to(full.device), part, alpha=1 if member else -1)
        responses.append(response)
    return responses


class AGM(Strategy):
    r"""Adaptive gradient modulation (Li et al., ICCV 2023, arXiv:2308.07686).

    .. math::
        s_{bm} = -\log \mathrm{softmax}(\phi_{bm})_{y_b}, \qquad
        d_m = \mathrm{mean}_b \frac{n_b}{n_b - 1} \bigl(\mathrm{mean}_{m'} s_{bm'} - s_{bm}\bigr), \qquad
        r_m = e^{d_m}

    .. math::
        \kappa_m = \exp\bigl(\alpha \min(\tau_m - r_m,\ 7)\bigr), \qquad
        \tau_m = \exp(\text{mean of } d_m \text{ over the steps before this one})

    :math:`\phi` are the Shapley values of the logits (:func:`mono_modal_responses`), :math:`s` their class-balanced
    cross-entropy, :math:`r_m > 1` says that modality m is ahead. The gradient that reaches a parameter of encoder m
    is scaled by :math:`\kappa_m`.

    Choices: the published code (github.com/lihong2303/AGM) scales the gradient that enters each :math:`\phi_m` and
    keeps running means of s; both are the same for the encoders of a late-fusion network and on complete data.
    Passes over subsets are run without gradient here, and only the encoders are scaled, so that the user's
    prediction stays the one of the backbone. Missing modalities: the game is played among the modalities of each
    sample; samples with a single one are left out, a modality without any sample left gets no hook and its running
    mean rests. A sample with n modalities needs ``2^n - 2`` passes. Several processes pool their means at the end of an
    epoch and go by their own in between.

    Args:
        alpha: :math:`\alpha`, how strongly to scale.

    Raises:
        ConfigError: alpha is not a positive number.
    """

    name = "agm"
    students = "scored"
    scales_encoders = True
    needs_full_teacher = True
    state_keys = (*Strategy.state_keys, "_mean", "_steps")

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not is_number(alpha, above=0):
            raise ConfigError(f"AGM: alpha must be a positive number, got {alpha!r}")
        self.alpha = float(alpha)

    def prepare(self, modalities: Sequence[str], config: PassionConfig, frequencies: ModalityFrequencies) -> None:
        """Get ready for one model; see :meth:`Strategy.prepare`."""
        super().prepare(modalities, config, frequencies)
        self._mean = torch.zeros(len(self.modalities))
        self._steps = torch.zeros(len(self.modalities))

    def settings(self) -> dict[str, Any]:
        """Return alpha; see :meth:`Strategy.settings`."""
        return {"alpha": self.alpha}

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
        """Every non-empty subset of the modalities, in the rows that have it and more."""
        found = []
        for size in range(1, len(self.modalities)):
            for members in itertools.combinations(range(len(self.modalities)), size):
                rows = presence[:, list(members)].all(1) & (presence.sum(1) > size)
                if rows.any():
                    found.append(StudentInput(tuple(self.modalities[m] for m in members), rows.nonzero().flatten()))
        return found

    @torch.no_grad()
    def factors(self, step: TrainingStep, labels: Tensor) -> dict[str, Tensor]:
        """Return kappa of the modalities that can be compared; see :meth:`Strategy.factors`."""
        outputs = step.adapter.spec.outputs
        responses = mono_modal_responses(step)
        scores = torch.stack([true_class_loss(response, labels, outputs) for response in responses], dim=1)
        self.skip(step.active, scores)
        active = comparable(scores, step.active)
        number = active.sum(1, keepdim=True)
        mean = torch.where(active, scores, 0).sum(1, keepdim=True) / number.clamp(min=1)
        ahead = torch.where(active, (mean - scores) * number / (number - 1).clamp(min=1), 0)
        difference = (ahead.sum(0) / active.sum(0).clamp(min=1)).clamp(-_LARGEST_DIFFERENCE, _LARGEST_DIFFERENCE)
        self._mean = self._mean.to(difference)
        kappa = torch.exp(self.alpha * (self._mean.exp() - difference.exp()).clamp(max=_LARGEST_EXPONENT))
        measured = active.any(0)
        self._steps = self._steps.to(difference) + measured
        rate = torch.where(measured, 1 / self._steps.clamp(min=1), 0)
        self._mean = self._mean + rate * (difference - self._mean)
        # Where nothing could be compared the factor is that of a modality that is where it always was.
        kappa = torch.where(measured, kappa, 1)
        return {name: kappa[column] for column, name in compared(step)}

    def end_epoch(self) -> EpochReport:
        """Pool the running means of all processes, and report the epoch; see :meth:`Strategy.end_epoch`."""
        steps = self._steps.cpu().double()
        weighted = torch.cat([self._mean.cpu().double() * steps, steps, torch.ones(1, dtype=torch.float64)])
        *both, ranks = all_reduce_sum(weighted, f"running means of epoch {self.epoch} on {self.modalities}").split(
            [len(steps), len(steps), 1]
        )
        mean = both[0] / both[1].clamp(min=1)
        # Each process carries on with its share of the steps, so that the next pooling counts none of them twice.
        self._mean, self._steps = mean.to(self._mean), (both[1] / ranks).to(self._steps)
        return super().end_epoch()


def _weight(size: int, number: int) -> float:
    return math.factorial(size) * math.factorial(number - size - 1) / math.factorial(number) if size < number else 0.0
