"""RedCore's weights: modalities whose own loss lags behind get more of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from passion_plugin._validate import is_number
from passion_plugin.backbone import StudentInput, active_students
from passion_plugin.baselines._scores import by_modality
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.losses import resize_labels, segmentation_loss
from passion_plugin.training import EpochReport, ModalityFrequencies, PreferenceEstimator, Strategy, TrainingStep

__all__ = ["RedCore"]


class RedCore(Strategy):
    r"""Weigh the loss of each modality alone by its relative advantage (Sun et al., AAAI 2024, arXiv:2312.10386).

    .. math::
        L = \frac{u}{B} \sum_b \sum_m \beta_m S_{bm}, \qquad
        RA_m = 1 - \frac{\hat S_m}{\mathrm{mean}_m \hat S}, \qquad
        \beta \leftarrow \mathrm{rescale}(\mathrm{clip}(\beta - \eta\, RA, \beta_{min}, \beta_{max}))

    with :math:`S_{bm}` the segmentation loss of the prediction from modality m alone and :math:`\hat S_m` its mean
    over the samples of the epoch that have m. This carries RedCore's weights over to segmentation: in its published
    code (github.com/sunjunaimer/RedCore) relative advantage is that of the losses of a network which imputes missing
    representations, beta weighs these losses, and both move every few iterations; there is no such network here. The
    update is that of PASSION's beta with losses instead of distances, once per epoch, and is done by
    :class:`~passion_plugin.PreferenceEstimator`.

    Missing modalities: :math:`S_{bm}` exists where the sample has m and at least one other modality; for a sample
    with a single one the user's own loss is that loss already. A modality that an epoch lacks keeps its weight.

    Args:
        weight: u.
        eta: :math:`\eta`, step size; grows as in PASSION by ``eta_growth`` every ``eta_every`` epochs.
        eta_growth: factor on :math:`\eta`.
        eta_every: epochs between two growths.
        beta_min: smallest weight.
        beta_max: largest weight before rescaling.

    Raises:
        ConfigError: a number that makes no sense.
    """

    name = "redcore"
    students = "trained"
    state_keys = ("epoch",)

    def __init__(
        self,
        weight: float = 1.0,
        *,
        eta: float = 0.01,
        eta_growth: float = 1.5,
        eta_every: int = 100,
        beta_min: float = 0.1,
        beta_max: float = 4.0,
    ) -> None:
        super().__init__()
        if not is_number(weight, above=0):
            raise ConfigError(f"RedCore: weight must be a positive number, got {weight!r}")
        self.weight = float(weight)
        # Says now what is wrong with the options.
        PreferenceEstimator(
            ("a", "b"), eta=eta, eta_growth=eta_growth, eta_every=eta_every, beta_min=beta_min, beta_max=beta_max
        )
        self.options: dict[str, Any] = {
            "eta": float(eta),
            "eta_growth": float(eta_growth),
            "eta_every": int(eta_every),
            "beta_min": float(beta_min),
            "beta_max": float(beta_max),
        }

    def prepare(self, modalities: Sequence[str], config: PassionConfig, frequencies: ModalityFrequencies) -> None:
        """Get ready for one model; see :meth:`Strategy.prepare`."""
        super().prepare(modalities, config, frequencies)
        self.estimator = PreferenceEstimator(self.modalities, **self.options)

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
        """Every modality alone, in the rows that have it beside another one."""
        return StudentInput.singles(self.modalities, active_students(presence))

    def loss(self, step: TrainingStep, labels: Tensor) -> Tensor:
        """Return the weighted losses of the modalities alone, and count them for the end of the epoch."""

        def segmentation(logits: Tensor, target: Tensor) -> Tensor:
            target = resize_labels(target, tuple(logits.shape[2:]))
            outputs = step.adapter.spec.outputs
            return segmentation_loss(logits, target, outputs=outputs, check_values=False, backend=self.config.backend)

        losses = by_modality(step, labels, segmentation)
        weighted = losses * self.estimator.beta.to(losses)
        self.estimator.update(losses.detach(), step.presence)
        return self.weight * weighted.sum(1).mean()

    def end_epoch(self) -> EpochReport:
        """Update the weights; to be called on every process, whose sums are added."""
        self.epoch += 1
        return self.estimator.end_epoch()

    def settings(self) -> dict[str, Any]:
        """Return the weight and the options of the estimator; see :meth:`Strategy.settings`."""
        return {"weight": self.weight, **self.options}

    def state_dict(self) -> dict[str, Any]:
        """Return weights, sums and counts; see :meth:`Strategy.state_dict`."""
        return {**super().state_dict(), "estimator": self.estimator.get_extra_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; see :meth:`Strategy.load_state_dict`."""
        super().load_state_dict(state)
        self.estimator.set_extra_state(state["estimator"])
