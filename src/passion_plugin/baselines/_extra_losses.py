"""PMR and RedCore: a further loss for the modality that lags behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from passion_plugin._validate import is_int, is_number
from passion_plugin.backbone import BackboneAdapter, StudentInput, active_students, feature_maps
from passion_plugin.baselines._scores import (
    comparable,
    compared,
    positive,
    prediction_entropy,
    ratio_to_others,
    student_scores,
    true_class_loss,
    true_class_probability,
    widened,
)
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, ConfigError, raise_problems
from passion_plugin.losses import resize_labels, segmentation_loss
from passion_plugin.training import EpochReport, ModalityFrequencies, PreferenceEstimator, Strategy, TrainingStep

_SMALLEST_SQUARE = 1e-8
_NEVER_SEEN = -1e9


class PMR(Strategy):
    r"""Prototypical modal rebalance (Fan et al., CVPR 2023, arXiv:2211.07089).

    .. math::
        p_m(k \mid v) = \mathrm{softmax}_k(-\lVert f_m(v) - c_{mk} \rVert), \qquad
        \beta_m = \mathrm{clip}(1/\rho_m - 1,\ 0,\ 1), \qquad \gamma_m = \mathrm{clip}(\rho_m - 1,\ 0,\ 1)

    .. math::
        L = \alpha \sum_m \beta_m \mathrm{PCE}_m - \mu \sum_m \gamma_m H(p_m), \qquad
        \mathrm{PCE}_m = -\log p_m(y), \quad \mu = 0 \text{ after } \texttt{entropy\_epochs}

    :math:`\rho_m` is the mean of :math:`p_m(y)` over that of the other modalities (``ratio_to_others``): PCE pulls the
    slow modality towards the prototypes of its classes, PER keeps the fast one undecided in the first epochs. Both
    reach the encoder of m only: prototypes and coefficients carry no gradient.

    Choices: :math:`f_m` is the finest feature map of encoder m at its own resolution, labels are resized to it;
    means over voxels weigh all classes of a sample alike. Prototypes are running means of the class means of each
    batch, where the paper passes over the training set in every epoch: a batch of images holds thousands of features
    of each class. For two modalities beta and gamma are the paper's; for more, "the other" becomes the mean of the
    others. Missing modalities: a sample counts for m if it has m and at least one other modality; prototypes learn
    from every sample that has m. Exclusive classes (softmax) only. With several processes each has its own
    prototypes.

    Args:
        alpha: :math:`\alpha`, weight of PCE.
        momentum: of the prototypes, in [0, 1).
        entropy_weight: :math:`\mu`, weight of PER; 0 switches it off.
        entropy_epochs: how many epochs PER lasts.

    Raises:
        ConfigError: listing every number that makes no sense.
    """

    name = "pmr"
    needs_features = True
    default_factor = 0.0
    state_keys = (*Strategy.state_keys, "_prototypes")

    def __init__(
        self, alpha: float = 1.0, *, momentum: float = 0.9, entropy_weight: float = 0.0, entropy_epochs: int = 0
    ) -> None:
        super().__init__()
        checks = [
            ("alpha", alpha, is_number(alpha, above=0), "a positive number"),
            ("momentum", momentum, is_number(momentum, least=0, below=1), "in [0, 1)"),
            ("entropy_weight", entropy_weight, is_number(entropy_weight, least=0), "0 or more"),
            ("entropy_epochs", entropy_epochs, is_int(entropy_epochs, least=0), "an integer, 0 or more"),
        ]
        problems = [f"{name} must be {need}, got {value!r}" for name, value, is_good, need in checks if not is_good]
        raise_problems(problems, what="PMR")
        self.alpha, self.momentum = float(alpha), float(momentum)
        self.entropy_weight, self.entropy_epochs = float(entropy_weight), int(entropy_epochs)

    def prepare(self, modalities: Sequence[str], config: PassionConfig, frequencies: ModalityFrequencies) -> None:
        """Get ready for one model; see :meth:`Strategy.prepare`."""
        super().prepare(modalities, config, frequencies)
        self._prototypes: dict[str, Tensor] = {}  # (K, C) by modality; NaN for a class that was never seen

    def settings(self) -> dict[str, Any]:
        """Return weights, momentum and for how long; see :meth:`Strategy.settings`."""
        return {name: getattr(self, name) for name in ("alpha", "momentum", "entropy_weight", "entropy_epochs")}

    def check(self, adapter: BackboneAdapter) -> None:
        """Check that there are encoders and exclusive classes; see :meth:`Strategy.check`."""
        super().check(adapter)
        if adapter.spec.outputs == "sigmoid":
            raise ConfigError("strategy 'pmr' is defined for exclusive classes (softmax), this backbone has regions")

    def loss(self, step: TrainingStep, labels: Tensor) -> Tensor | None:
        """Learn prototypes from the batch, and return the weighted PCE and PER; None where nothing compares."""
        maps = {name: _finest(step.features[name], labels.ndim - 1) for name in self.modalities}
        for column, name in enumerate(self.modalities):
            rows = step.presence[:, column].nonzero().flatten().to(labels.device)
            if len(rows):
                self._learn(name, maps[name][rows].detach(), labels[rows], step.teacher.logits.shape[1])
        columns = compared(step)
        if not columns:
            return None
        scores = widened(step.teacher.logits).new_zeros(step.active.shape)
        entropies, spreads = {}, {}
        for column, name in columns:
            rows = step.active[:, column].nonzero().flatten().to(labels.device)
            similarity = self._similarity(name, maps[name][rows])
            scores[rows, column] = true_class_probability(similarity.detach(), labels[rows], "softmax").to(scores)
            entropies[column] = true_class_loss(similarity, labels[rows], "softmax").mean()
            spreads[column] = prediction_entropy(similarity, labels[rows]).mean()
        self.skip(step.active, scores)
        usable = comparable(scores, step.active)
        rho = torch.where(usable.any(0), ratio_to_others(scores, usable), 1)
        beta, gamma = (1 / rho - 1).clamp(0, 1), (rho - 1).clamp(0, 1)
        self.record({name: beta[column] for column, name in columns})
        terms = [self.alpha * beta[column] * entropies[column] for column, _ in columns]
        if self.epoch < self.entropy_epochs:
            terms += [-self.entropy_weight * gamma[column] * spreads[column] for column, _ in columns]
        return torch.stack(terms).sum()

    def _learn(self, name: str, features: Tensor, labels: Tensor, number: int) -> None:
        """Move the prototypes (K, C) of the classes in the batch towards their means."""
        labels = rearrange(resize_labels(labels, tuple(features.shape[2:])), "n ... -> n 1 (...)")
        points = rearrange(widened(features), "n c ... -> n c (...)")
        # Sums over a mask keep the digits that adding millions of voxels one by one would lose.
        sums = torch.stack([reduce(torch.where(labels == k, points, 0), "n c v -> c", "sum") for k in range(number)])
        counts = torch.stack([(labels == k).sum() for k in range(number)])
        mean = sums / rearrange(counts, "k -> k 1")  # NaN for a class that the batch does not have
        before = self._prototypes.get(name, torch.full_like(mean, torch.nan)).to(mean)
        if before.shape != mean.shape:
            raise ConfigError(
                f"strategy 'pmr': the state that was loaded has prototypes {tuple(before.shape)} for {name!r}, this "
                f"model has {tuple(mean.shape)} (classes, channels); load the state of a model like this one"
            )
        moved = torch.where(before.isnan(), mean, self.momentum * before + (1 - self.momentum) * mean)
        # A feature that overflowed spoils the mean of its class in this batch, and must not spoil it for good.
        self._prototypes[name] = torch.where(mean.isfinite().all(1, keepdim=True), moved, before)

    def _similarity(self, name: str, features: Tensor) -> Tensor:
        """Return minus the distances to the prototypes, (n, K, *spatial): logits of a softmax."""
        prototypes = self._prototypes[name]
        seen = rearrange(~prototypes.isnan().any(1), "k -> k 1")
        # NaN would reach the gradient through the branch that is not taken.
        prototypes = prototypes.nan_to_num()
        with torch.autocast(features.device.type, enabled=False):
            points = rearrange(features.to(prototypes), "n c ... -> n c (...)")
            inner = einsum(points, prototypes, "n c v, k c -> n k v")
            lengths = points.square().sum(1, keepdim=True) + prototypes.square().sum(1, keepdim=True)
            # The root has no gradient at 0, where a voxel is its own prototype.
            distance = (lengths - 2 * inner).clamp(min=_SMALLEST_SQUARE).sqrt()
            similarity = torch.where(seen, -distance, _NEVER_SEEN)
        return similarity.unflatten(2, features.shape[2:])


def _finest(tensors: Sequence[Tensor], ndim: int) -> Tensor:
    """Return the feature map of the highest resolution."""
    maps = feature_maps(tensors, ndim)
    if not maps:
        raise BackboneError("strategy 'pmr': an encoder returns no feature map (B, C, *spatial) to take prototypes of")
    return max(maps, key=lambda tensor: tensor.shape[2:].numel())


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
    update is that of PASSION's beta with losses instead of distances, once per epoch
    (:class:`~passion_plugin.PreferenceEstimator`).

    Missing modalities: :math:`S_{bm}` exists where the sample has m and at least one other modality; for a sample
    with a single one the user's own loss is that loss already. A modality without a sample in an epoch keeps its
    weight.

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
        self.weight = positive("RedCore: weight", weight)
        self.options: dict[str, Any] = {
            "eta": eta,
            "eta_growth": eta_growth,
            "eta_every": eta_every,
            "beta_min": beta_min,
            "beta_max": beta_max,
        }
        PreferenceEstimator(("a", "b"), **self.options)  # Says now what is wrong with the options.

    def prepare(self, modalities: Sequence[str], config: PassionConfig, frequencies: ModalityFrequencies) -> None:
        """Get ready for one model; see :meth:`Strategy.prepare`."""
        super().prepare(modalities, config, frequencies)
        self.estimator = PreferenceEstimator(self.modalities, **self.options)

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
        """Every modality alone, in the rows that have it and another one."""
        return StudentInput.singles(self.modalities, active_students(presence))

    def loss(self, step: TrainingStep, labels: Tensor) -> Tensor:
        """Return the weighted losses of the modalities alone, and count them for the end of the epoch."""
        outputs, backend = step.adapter.spec.outputs, self.config.backend

        def segmentation(logits: Tensor, target: Tensor) -> Tensor:
            target = resize_labels(target, tuple(logits.shape[2:]))
            return segmentation_loss(logits, target, outputs=outputs, check_values=False, backend=backend)

        losses = student_scores(step, labels, segmentation)
        weighted = losses * self.estimator.beta.to(losses)
        self.estimator.update(losses.detach(), step.presence)
        return self.weight * weighted.sum(1).mean()

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """Number of epochs that ended."""
        return self.estimator.epoch

    def end_epoch(self) -> EpochReport:
        """Update the weights; to be called on every process, whose sums are added."""
        return self.estimator.end_epoch()

    def settings(self) -> dict[str, Any]:
        """Return the weight and the options of the estimator; see :meth:`Strategy.settings`."""
        return {"weight": self.weight, **{name: float(value) for name, value in self.options.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Return weights, sums and counts; see :meth:`Strategy.state_dict`."""
        return self.estimator.get_extra_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; see :meth:`Strategy.load_state_dict`."""
        self.estimator.set_extra_state(state)
