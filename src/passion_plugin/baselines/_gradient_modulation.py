"""OGM-GE and AGM: scale the gradients of the encoders, so that the modality ahead does not stop the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from passion_plugin.backbone import StudentInput, active_students
from passion_plugin.baselines._scores import (
    comparable,
    compared,
    positive,
    ratio_to_others,
    student_scores,
    true_class_loss,
    true_class_probability,
    widened,
)
from passion_plugin.config import PassionConfig
from passion_plugin.training import EpochReport, ModalityFrequencies, Strategy, TrainingStep, all_reduce_sum

_LARGEST_EXPONENT = 7.0
_LARGEST_DIFFERENCE = 80.0  # whose exponential is still a number in float32


class OGMGE(Strategy):
    r"""On-the-fly gradient modulation with generalisation enhancement (Peng et al., CVPR 2022, arXiv:2203.15332).

    .. math::
        k_m = \begin{cases} 1 - \tanh(\alpha \rho_m) & \rho_m > 1 \\ 1 & \text{else} \end{cases}
        \qquad g_m \leftarrow k_m g_m + \xi, \quad \xi \sim \mathcal N(0, \mathrm{std}(g_m)^2)

    (equation 10 of the paper, and its generalisation enhancement), with :math:`\rho_m` the score of modality m over
    the mean of the others' (``ratio_to_others``), and :math:`g_m` the gradient that reaches a parameter of encoder m
    from every loss.

    Choices: the uni-modal prediction is that of the backbone with m alone, without gradient; the paper takes the share
    of m in a linear classifier over concatenated features, which a segmentation network does not have. The score is
    the class-balanced mean of the true-class probability (``true_class_probability``). Missing modalities: a sample
    counts for m if it has m and at least one other modality; a modality without such a sample in the batch gets no
    hook, hence neither factor nor noise.

    Args:
        alpha: :math:`\alpha`, how strongly to slow. Tuned per data set in the paper.
        noise: add the Gaussian noise (GE). Parameters with a single element get none.

    Raises:
        ConfigError: alpha is not a positive number.
    """

    name = "ogm-ge"
    students = "scored"
    scales_encoders = True

    def __init__(self, alpha: float = 0.3, *, noise: bool = True) -> None:
        super().__init__()
        self.alpha, self.noise = positive("OGMGE: alpha", alpha), bool(noise)

    def settings(self) -> dict[str, Any]:
        """Return alpha and noise; see :meth:`Strategy.settings`."""
        return {"alpha": self.alpha, "noise": self.noise}

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
        """Every modality alone, in the rows that have it and another one."""
        return StudentInput.singles(self.modalities, active_students(presence))

    @torch.no_grad()
    def factors(self, step: TrainingStep, labels: Tensor) -> dict[str, Tensor]:
        """Return k of the modalities that can be compared; see :meth:`Strategy.factors`."""
        outputs = step.adapter.spec.outputs
        scores = student_scores(step, labels, lambda logits, target: true_class_probability(logits, target, outputs))
        self.skip(step.active, scores)
        rho = ratio_to_others(scores, comparable(scores, step.active))
        k = torch.where(rho > 1, 1 - torch.tanh(self.alpha * rho), 1)
        return {name: k[column] for column, name in compared(step)}


class AGM(Strategy):
    r"""Adaptive gradient modulation (Li et al., ICCV 2023, arXiv:2308.07686).

    .. math::
        s_{bm} = -\log \mathrm{softmax}(\phi_{bm})_{y_b}, \qquad
        d_m = \mathrm{mean}_b \frac{n_b}{n_b - 1} \bigl(\mathrm{mean}_{m'} s_{bm'} - s_{bm}\bigr), \qquad
        r_m = e^{d_m}

    .. math::
        \kappa_m = \exp\bigl(\alpha \min(\tau_m - r_m,\ 7)\bigr), \qquad
        \tau_m = \exp(\text{mean of } d_m \text{ over the steps before this one})

    :math:`\phi` are the Shapley values of the logits (``shapley_values``), :math:`s` their class-balanced
    cross-entropy, :math:`r_m > 1` says that modality m is ahead. The gradient that reaches a parameter of encoder m
    is scaled by :math:`\kappa_m`.

    Choices: the published code (github.com/lihong2303/AGM) scales the gradient that enters each :math:`\phi_m` and
    keeps running means of s; both are the same for the encoders of a late-fusion network and on complete data.
    Passes over subsets run without gradient here, and only the encoders are scaled, so that the user's prediction
    stays the one of the backbone. Missing modalities: the game is played among the modalities of each sample; samples
    with a single one are left out, a modality without any sample left gets no hook and its running mean stays. A sample
    with n modalities needs ``2^n - 2`` passes. Several processes pool their means at the end of an epoch and use their
    own in between.

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
        self.alpha = positive("AGM: alpha", alpha)

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
            for columns in itertools.combinations(range(len(self.modalities)), size):
                rows = presence[:, list(columns)].all(1) & (presence.sum(1) > size)
                if rows.any():
                    found.append(StudentInput(tuple(self.modalities[m] for m in columns), rows.nonzero().flatten()))
        return found

    @torch.no_grad()
    def factors(self, step: TrainingStep, labels: Tensor) -> dict[str, Tensor]:
        """Return kappa of the modalities that can be compared; see :meth:`Strategy.factors`."""
        outputs, values = step.adapter.spec.outputs, shapley_values(step)
        scores = torch.stack([true_class_loss(logits, labels, outputs) for logits in values.unbind(1)], dim=1)
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
        # Where every score overflowed nothing is known, and the factor changes nothing.
        kappa = torch.where(measured, kappa, 1)
        return {name: kappa[column] for column, name in compared(step)}

    def end_epoch(self) -> EpochReport:
        """Pool the running means of all processes, and report the epoch; see :meth:`Strategy.end_epoch`."""
        steps = self._steps.cpu().double()
        packed = torch.cat([self._mean.cpu().double() * steps, steps, torch.ones(1, dtype=torch.float64)])
        total = all_reduce_sum(packed, f"running means of epoch {self.epoch} on {self.modalities}")
        sums, counts, processes = total.split([len(steps), len(steps), 1])
        # Each process continues with its share of the steps, so that the next pooling counts none of them twice.
        self._mean, self._steps = (sums / counts.clamp(min=1)).to(self._mean), (counts / processes).to(self._steps)
        return super().end_epoch()


def shapley_values(step: TrainingStep) -> Tensor:
    r"""Split the logits of each sample into what its modalities contribute.

    .. math::
        \phi_{bm} = \sum_{S \subseteq A_b \setminus \{m\}} \frac{|S|!\,(n_b - |S| - 1)!}{n_b!}
        \bigl(z_b(S \cup \{m\}) - z_b(S)\bigr), \qquad z_b(\varnothing) = 0

    with :math:`A_b` the :math:`n_b` available modalities of the sample. They sum to the logits from all of them.
    The network cannot predict from nothing; zero logits, a uniform prediction, stand for that. The step must have a
    student for each non-empty proper subset of what each sample has.

    Returns:
        (B, M, K, *spatial), at least float32; zeros where the sample does not have the modality.
    """
    logits, number = widened(step.teacher.logits), step.presence.sum(1)
    full = rearrange(logits, "b ... -> b 1 (...)")
    # The teacher is z of all that a sample has, which is S and m for one S of n - 1 modalities: weight 1 / n.
    weights = step.presence / rearrange(number.double(), "b -> b 1")
    values = full * rearrange(weights.to(full), "b m -> b m 1")
    for student in step.students:
        # Its z is added for its own modalities, where S is one smaller than what it saw, and taken off for the others.
        size, counts = len(student.modalities), number[student.rows].tolist()
        added = torch.tensor([[1 / (n * math.comb(n - 1, size - 1))] for n in counts], dtype=torch.float64)
        taken = torch.tensor([[1 / (n * math.comb(n - 1, size))] for n in counts], dtype=torch.float64)
        member = torch.tensor([name in student.modalities for name in step.adapter.modalities])
        weights = torch.where(member, added, -taken) * step.presence[student.rows]
        part = rearrange(student.prediction.logits.to(full), "b ... -> b 1 (...)")
        part = part * rearrange(weights.to(full), "b m -> b m 1")
        values = values.index_add(0, student.rows.to(full.device), part)
    return values.view(*step.presence.shape, *logits.shape[1:])
