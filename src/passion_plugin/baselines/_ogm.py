"""OGM-GE: hold back the encoder that is ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passion_plugin._validate import is_number
from passion_plugin.backbone import StudentInput, active_students
from passion_plugin.baselines._scores import by_modality, comparable, compared, ratio_to_others, true_class_probability
from passion_plugin.errors import ConfigError
from passion_plugin.training import Strategy, TrainingStep

__all__ = ["OGMGE"]


class OGMGE(Strategy):
    r"""On-the-fly gradient modulation with generalisation enhancement (Peng et al., CVPR 2022, arXiv:2203.15332).

    .. math::
        k_m = \begin{cases} 1 - \tanh(\alpha \rho_m) & \rho_m > 1 \\ 1 & \text{else} \end{cases}
        \qquad g_m \leftarrow k_m g_m + \xi, \quad \xi \sim \mathcal N(0, \mathrm{std}(g_m)^2)

    (equation 10 of the paper, and its generalisation enhancement), with :math:`\rho_m` the score of modality m over
    the mean of the others' (:func:`~passion_plugin.strategies.scores.ratio_to_others`), and :math:`g_m` the gradient
    that reaches a parameter of encoder m from every loss.

    Choices: the uni-modal prediction is that of the backbone with m alone, without gradient; the paper's is the
    share of m in a linear classifier over concatenated features, which a segmentation network does not have. The
    score is the class-balanced mean of the true-class probability
    (:func:`~passion_plugin.strategies.scores.true_class_probability`). Missing modalities: a sample counts for m
    if it has m and at least one other modality; a modality without such a sample in the batch gets no hook, hence
    neither factor nor noise.

    Args:
        alpha: :math:`\alpha`, how strongly to hold back. Tuned per data set in the paper.
        noise: add the Gaussian noise (GE). Parameters with a single element get none.

    Raises:
        ConfigError: alpha is not a positive number.
    """

    name = "ogm-ge"
    students = "scored"
    scales_encoders = True

    def __init__(self, alpha: float = 0.3, *, noise: bool = True) -> None:
        super().__init__()
        if not is_number(alpha, above=0):
            raise ConfigError(f"OGMGE: alpha must be a positive number, got {alpha!r}")
        self.alpha, self.noise = float(alpha), bool(noise)

    def settings(self) -> dict[str, Any]:
        """Return alpha and noise; see :meth:`Strategy.settings`."""
        return {"alpha": self.alpha, "noise": self.noise}

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
        """Every modality alone, in the rows that have it beside another one."""
        return StudentInput.singles(self.modalities, active_students(presence))

    @torch.no_grad()
    def factors(self, step: TrainingStep, labels: Tensor) -> dict[str, Tensor]:
        """Return k of the modalities that can be compared; see :meth:`Strategy.factors`."""
        outputs = step.adapter.spec.outputs
        scores = by_modality(step, labels, lambda logits, target: true_class_probability(logits, target, outputs))
        self.skip(step.active, scores)
        rho = ratio_to_others(scores, comparable(scores, step.active))
        k = torch.where(rho > 1, 1 - torch.tanh(self.alpha * rho), 1)
        return {name: k[column] for column, name in compared(step)}
