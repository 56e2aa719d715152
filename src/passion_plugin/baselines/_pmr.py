"""PMR: pull the features of the slow modality towards its class prototypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from passion_plugin._validate import is_int, is_number
from passion_plugin.backbone import BackboneAdapter, feature_maps
from passion_plugin.baselines._scores import (
    comparable,
    compared,
    prediction_entropy,
    ratio_to_others,
    true_class_loss,
    true_class_probability,
)
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, ConfigError, raise_problems
from passion_plugin.losses import resize_labels
from passion_plugin.training import ModalityFrequencies, Strategy, TrainingStep

__all__ = ["PMR"]

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

    :math:`\rho_m` is the mean of :math:`p_m(y)` over that of the other modalities
    (:func:`~passion_plugin.strategies.scores.ratio_to_others`): the slow modality is pulled towards the prototypes of
    its classes (PCE), and in the first epochs the fast one is kept from settling (PER). Both reach the encoder of
    m only: prototypes and coefficients carry no gradient.

    Choices: :math:`f_m` is the finest feature map of encoder m at its own resolution, labels are brought down to it;
    means over voxels weigh all classes of a sample alike. Prototypes are running means of the class means of each
    batch, where the paper passes over the training set at every epoch: a batch of images holds thousands of features
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
    state_keys = (*Strategy.state_keys, "_prototypes", "_seen")

    def __init__(
        self, alpha: float = 1.0, *, momentum: float = 0.9, entropy_weight: float = 0.0, entropy_epochs: int = 0
    ) -> None:
        super().__init__()
        problems = []
        if not is_number(alpha, above=0):
            problems.append(f"alpha must be a positive number, got {alpha!r}")
        if not is_number(momentum, least=0, below=1):
            problems.append(f"momentum must be in [0, 1), got {momentum!r}")
        if not is_number(entropy_weight, least=0):
            problems.append(f"entropy_weight must be 0 or more, got {entropy_weight!r}")
        if not is_int(entropy_epochs, least=0):
            problems.append(f"entropy_epochs must be an integer, 0 or more, got {entropy_epochs!r}")
        raise_problems(problems, what="PMR")
        self.alpha, self.momentum = float(alpha), float(momentum)
        self.entropy_weight, self.entropy_epochs = float(entropy_weight), int(entropy_epochs)

    def prepare(self, modalities: Sequence[str], config: PassionConfig, frequencies: ModalityFrequencies) -> None:
        """Get ready for one model; see :meth:`Strategy.prepare`."""
        super().prepare(modalities, config, frequencies)
        self._prototypes: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """Return weights, momentum and for how long; see :meth:`Strategy.settings`."""
        return {name: getattr(self, name) for name in ("alpha", "momentum", "entropy_weight", "entropy_epochs")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; see :meth:`Strategy.load_state_dict`."""
        prototypes, seen = (
            (state.get(key) for key in ("_prototypes", "_seen")) if isinstance(state, Mapping) else ({}, {})
        )
        if isinstance(prototypes, Mapping) and isinstance(seen, Mapping):
            if not prototypes.keys() == seen.keys() <= set(self.modalities):
                raise ConfigError(
                    f"state of strategy 'pmr': it has prototypes of {list(prototypes)} and marks {list(seen)}; both must "
                    f"be for the same modalities of {self.modalities}"
                )
        super().load_state_dict(state)

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
        scores = torch.zeros(step.active.shape, device=labels.device, dtype=_wide(step.teacher.logits.dtype))
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
        labels = resize_labels(labels, tuple(features.shape[2:])).flatten(1).unsqueeze(1)
        points = features.to(_wide(features.dtype)).flatten(2)
        # Sums over a mask keep the digits that adding millions of voxels one by one would lose.
        members = [labels == k for k in range(number)]
        sums = torch.stack([torch.where(member, points, 0).sum((0, 2)) for member in members])
        counts = torch.stack([member.sum() for member in members]).unsqueeze(1)
        mean = sums / counts.clamp(min=1)
        before = self._prototypes.get(name, torch.zeros_like(mean)).to(mean)
        if before.shape != mean.shape:
            raise ConfigError(
                f"strategy 'pmr': the state that was loaded has prototypes {tuple(before.shape)} for {name!r}, this "
                f"model has {tuple(mean.shape)} (classes, channels); load the state of a model like this one"
            )
        seen = self._seen.get(name, torch.zeros_like(counts, dtype=torch.bool)).to(mean.device)
        moved = torch.where(seen, self.momentum * before + (1 - self.momentum) * mean, mean)
        # A feature that overflowed spoils the mean of its class in this batch, and must not spoil it for good.
        learnt = (counts > 0) & mean.isfinite().all(1, keepdim=True)
        self._prototypes[name] = torch.where(learnt, moved, before)
        self._seen[name] = seen | learnt

    def _similarity(self, name: str, features: Tensor) -> Tensor:
        """Return minus the distances to the prototypes, (n, K, *spatial): logits of a softmax."""
        with torch.autocast(features.device.type, enabled=False):
            prototypes = self._prototypes[name]
            points = features.to(prototypes.dtype).flatten(2)
            inner = torch.einsum("ncv,kc->nkv", points, prototypes)
            lengths = points.square().sum(1, keepdim=True) + prototypes.square().sum(1)[:, None]
            # The root has no gradient at 0, where a voxel is its own prototype.
            distance = (lengths - 2 * inner).clamp(min=_SMALLEST_SQUARE).sqrt()
            similarity = torch.where(self._seen[name], -distance, _NEVER_SEEN)
        return similarity.unflatten(2, features.shape[2:])


def _finest(tensors: Sequence[Tensor], ndim: int) -> Tensor:
    """Return the feature map of the highest resolution that an encoder put out."""
    maps = feature_maps(tensors, ndim)
    if not maps:
        raise BackboneError("strategy 'pmr': an encoder puts out no feature map (B, C, *spatial) to take prototypes of")
    return max(maps, key=lambda tensor: tensor.shape[2:].numel())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
