"""Variations of PASSION that experiments judge; those that do not help stay out of the library.

Each is a rule like any other: :class:`~passion_plugin.strategies.PassionRule` with one part changed. Their
equations stand below, what came of them in docs/results.md. In the name of a strategy an idea is written like a
hyper-parameter: ``passion:pixel=balanced``, ``passion:teacher_decay=0.99``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from examples.experiment.idea_terms import balanced_divergence, gated_gaps
from passion_plugin._validate import is_number, is_one_of
from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.backbone._passes import fused_pass
from passion_plugin.backbone._prediction import Prediction
from passion_plugin.backbone._students import StudentInput
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, raise_problems
from passion_plugin.losses._common import class_masks, compute_dtype, no_autocast
from passion_plugin.losses._labels import resize_labels
from passion_plugin.losses._prototype import similarity_maps
from passion_plugin.training import LossTerms, PassionRule
from passion_plugin.training._frequencies import ModalityFrequencies
from passion_plugin.training._objective import UnimodalLoss
from passion_plugin.training._step import TrainingStep

__all__ = ["IDEAS", "PassionVariation"]

Pixel = Literal["mean", "balanced"]
GateBy = Literal["modality", "class", "voxel"]


class PassionVariation(PassionRule):
    r"""PASSION with some of its parts exchanged, in default mode and with softmax outputs.

    With :math:`\delta_{bmv}` the divergence of student m from its teacher at one voxel, summed over classes, and
    :math:`g_{bmkv} = S^m_{bkv} - S^t_{bkv}` the gap between their similarity maps:

    * ``pixel="balanced"``: :math:`K_{bm} = \frac{T^2}{K} \operatorname{mean}_k \frac1{n_{bk}} \sum_{v: y_{bv} = k}
      \delta_{bmv}`, the mean over the classes of the sample, so that the background is one class among others.
    * ``gate_by="class"``: :math:`P_{bm} = \operatorname{mean}_k \omega_{bmk} \operatorname{mean}_v g_{bmkv}^2` with
      :math:`\omega_{bmk} = \mathbf 1[D_{bmk} > \bar D_{bk}]`, :math:`D_{bmk} = \operatorname{mean}_v |g_{bmkv}|` and
      :math:`\bar D_{bk}` its mean over the modalities of the sample.
    * ``gate_by="voxel"``: the same with :math:`\omega_{bmv}` from :math:`D_{bmv} = \operatorname{mean}_k |g_{bmkv}|`.
    * ``lone=True``: a sample of one modality, which has no student, has the loss :math:`w_m u\, S_{bm}` of its only
      prediction all the same. Otherwise it counts 1 where a sample of several counts :math:`1 + u \sum_m w_m`.
    * ``rarity_cap=c``: :math:`w_m = \min(N / N_m, c)`.
    * ``teacher_decay=d``: the teacher is the network with averaged weights, :math:`\bar\theta_i = d_i \bar\theta_{i-1}
      + (1 - d_i)\, \theta_i` at step i, :math:`d_i = \min(d, (1 + i) / (10 + i))` (Tarvainen and Valpola, NeurIPS
      2017, arXiv:1703.01780), on the same batch. They are no part of the state: for trainings in one go.

    The preference, its distances and beta are those of the library. Exchanged divergences leave coarse outputs out.

    Args:
        unimodal_loss: see :class:`~passion_plugin.strategies.PassionRule`.
        pixel: how divergences of voxels become one number; ``"mean"`` is that of the library.
        gate_by: what the prototype distillation is switched for; ``"modality"`` is that of the library.
        lone: whether samples of one modality have the uni-modal segmentation loss.
        rarity_cap: 1 or more; None: none.
        teacher_decay: in [0, 1); None: the teacher is the prediction that is trained.

    Raises:
        ConfigError: listing every value that makes no sense.
    """

    def __init__(
        self,
        unimodal_loss: UnimodalLoss | None = None,
        *,
        pixel: Pixel = "mean",
        gate_by: GateBy = "modality",
        lone: bool = False,
        rarity_cap: float | None = None,
        teacher_decay: float | None = None,
    ) -> None:
        super().__init__(unimodal_loss)
        problems = [
            f"{name} must be one of {choices}, got {value!r}"
            for name, value, choices in (("pixel", pixel, get_args(Pixel)), ("gate_by", gate_by, get_args(GateBy)))
            if not is_one_of(value, choices)
        ]
        if not isinstance(lone, bool):
            problems.append(f"lone must be True or False, got {lone!r}")
        if rarity_cap is not None and not is_number(rarity_cap, least=1):
            problems.append(f"rarity_cap must be 1 or more, or None, got {rarity_cap!r}")
        if teacher_decay is not None and not (is_number(teacher_decay, least=0, most=1) and teacher_decay < 1):
            problems.append(f"teacher_decay must be in [0, 1), or None, got {teacher_decay!r}")
        raise_problems(problems, what=type(self).__name__)
        self.pixel, self.gate_by, self.lone = pixel, gate_by, lone
        self.rarity_cap, self.teacher_decay = rarity_cap, teacher_decay
        self._average: list[Tensor] = []
        self._steps = 0

    def check_config(self, config: PassionConfig) -> None:
        """Check that what is changed is in use.

        Raises:
            ConfigError: listing every idea that would change nothing, or that cannot be had with this configuration.
        """
        changed = {name: getattr(self, name) for name, default in IDEAS.items() if getattr(self, name) != default}
        problems = []
        for name, value in changed.items():
            if config.mode == "official":
                problems.append(f"{name}={value!r} goes with the default mode, not the official")
            if config.subset_students and name in ("pixel", "gate_by"):
                problems.append(f"{name} is about students of one modality: leave it or subset_students out")
            needed = {"rarity_cap": "rarity_weights", "gate_by": "gate"}.get(name)
            if needed and not getattr(config, needed):
                problems.append(f"{name}={value!r} changes nothing beside {needed}=False: leave one of them out")
        raise_problems(problems, what=type(self).__name__)

    def prepare(self, modalities: Sequence[str], config: PassionConfig, rarity: ModalityFrequencies) -> None:
        """Get ready for one model, with no rarity weight above the cap."""
        self.check_config(config)
        if self.rarity_cap is not None:
            rarity = replace(rarity, weights=tuple(min(weight, self.rarity_cap) for weight in rarity.weights))
        super().prepare(modalities, config, rarity)

    def check(self, adapter: BackboneAdapter) -> None:
        """Check that the backbone has classes that exclude each other."""
        if adapter.spec.outputs != "softmax":
            raise ConfigError(f"variations are for softmax outputs, and the backbone has {adapter.spec.outputs!r}")
        super().check(adapter)

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
        """Every modality alone, in the rows that have it; where asked for also in those that have no other."""
        student_inputs = super().student_inputs(presence)
        if not self.lone:
            return student_inputs
        several = [student_input for student_input in student_inputs if len(student_input.modalities) > 1]
        return StudentInput.singles(self.modalities, presence) + several

    def terms(self, step: TrainingStep, labels: Tensor) -> LossTerms:
        """Compare students with their teacher, each part as it was chosen."""
        if self.teacher_decay is not None:
            step = replace(step, teacher=self._averaged_teacher(step))
        terms = super().terms(step, labels)
        if self.lone:
            # Its own teacher: whatever is not zero there is rounding, and no observation.
            where = terms.active
            kept = {name: torch.where(where, getattr(terms, name), 0) for name in ("pixel", "prototype", "distance")}
            terms = replace(terms, **kept, supervised=step.presence.to(where.device))
        if self.pixel != "mean":
            terms = replace(terms, pixel=self._pixel(step, labels))
        if self.gate_by != "modality":
            # The gate is inside of the term: that of the library stays open.
            terms = replace(terms, prototype=self._prototype(step, labels), gate=terms.active)
        return terms

    def settings(self) -> dict[str, Any]:
        """Return the ideas beside the configuration; see :meth:`~passion_plugin.strategies.Strategy.settings`."""
        return {**super().settings(), **{name: getattr(self, name) for name in IDEAS}}

    def _pixel(self, step: TrainingStep, labels: Tensor) -> Tensor:
        """K (B, M)."""
        logits = step.teacher.logits
        labels = resize_labels(labels, tuple(logits.shape[2:]))
        result = logits.new_zeros(step.presence.shape, dtype=compute_dtype(logits))
        for student in step.students:
            rows = student.rows.to(logits.device)
            values = balanced_divergence(student.prediction.logits, logits[rows], labels[rows], self.config.temperature)
            result = result.index_put((rows, rows.new_tensor(self.modalities.index(student.modality))), values)
        return result

    def _prototype(self, step: TrainingStep, labels: Tensor) -> Tensor:
        """P (B, M), gated."""
        features, classes = step.teacher.features, step.teacher.logits.shape[1]
        labels = resize_labels(labels, tuple(features.shape[2:]))
        masks = class_masks(labels, classes, features.ndim)
        dtype = compute_dtype(features)
        with no_autocast(features):
            maps = similarity_maps(features.to(dtype), masks)
            gaps = maps.new_zeros(len(masks), len(self.modalities), *maps.shape[1:])
            for student in step.students:
                rows = student.rows.to(features.device)
                gap = similarity_maps(student.prediction.features.to(dtype), masks[rows]) - maps[rows]
                gaps = gaps.index_put((rows, rows.new_tensor(self.modalities.index(student.modality))), gap)
        return gated_gaps(gaps, step.active.to(gaps.device), masks.any(-1), by_class=self.gate_by == "class")

    @torch.no_grad()
    def _averaged_teacher(self, step: TrainingStep) -> Prediction:
        """The prediction of the averaged weights, which move by one step first."""
        weights = list(step.adapter.backbone.parameters())
        if not self._average:
            self._average = [weight.detach().clone() for weight in weights]
        self._steps += 1
        decay = min(float(self.teacher_decay or 0), (1 + self._steps) / (10 + self._steps))
        for average, weight in zip(self._average, weights, strict=True):
            average.lerp_(weight, 1 - decay)
        with step.adapter.student_mode(), _exchanged(weights, self._average):
            return fused_pass(step.adapter, step.call, step.presence).prediction


IDEAS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(PassionVariation).parameters.items()
    if name != "unimodal_loss"
}
"""Names of the ideas, with the values that leave PASSION as it is."""


@contextmanager
def _exchanged(weights: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Compute with other values in the same parameters; a graph that was built before does not notice."""
    own = [weight.data for weight in weights]
    try:
        for weight, other in zip(weights, others, strict=True):
            weight.data = other
        yield
    finally:
        for weight, value in zip(weights, own, strict=True):
            weight.data = value
