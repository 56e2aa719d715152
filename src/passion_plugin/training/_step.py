"""One training step: what a forward leaves behind, and the terms that come of it once the target is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passion_plugin._validate import as_tuple, describe
from passion_plugin.backbone import (
    BackboneAdapter,
    BackboneCall,
    Prediction,
    Student,
    concatenate_students,
    zero_with_graph,
)
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, UsageError
from passion_plugin.losses import prepare_target
from passion_plugin.training._objective import LossTerms, UnimodalLoss, collect_terms, unimodal_loss
from passion_plugin.training._preference import PreferenceEstimator


@dataclass(frozen=True)
class TrainingStep:
    """A forward in training mode that waits for its target.

    Attributes:
        adapter: the backbone.
        call: its arguments, for a strategy that runs it again.
        raw: what the backbone returned.
        teacher: the fused prediction, without gradient.
        version: of the teacher's logits, to notice an in-place change by the user.
        students: predictions that saw some modalities only; for PASSION one each, unless ``subset_students``.
        presence: bool (B, M) on the CPU.
        active: bool (B, M) on the CPU: the sample has the modality and at least one other.
        image_size: spatial size of the images, None when unknown.
        features: outputs of the encoders by modality, with gradient; empty unless the strategy needs them.
        unused: tensors that the loss must depend on although nothing in this batch uses them.
    """

    adapter: BackboneAdapter
    call: BackboneCall
    raw: Any
    teacher: Prediction
    version: int
    students: list[Student]
    presence: Tensor
    active: Tensor
    image_size: tuple[int, ...] | None
    features: Mapping[str, list[Tensor]]
    unused: tuple[Tensor, ...] = ()

    def with_unused(self, loss: Tensor) -> Tensor:
        """Return the loss with a gradient of zero for :attr:`unused`.

        Processes that train together need the same parameters to have a gradient, and the same passes to be in the
        graph, whatever their batches hold.
        """
        return loss + zero_with_graph(self.unused).to(loss) if self.unused else loss

    def labels(self, target: Tensor) -> Tensor:
        """Check the target, and that the prediction is still what it was.

        Args:
            target: as the user has it.

        Returns:
            int64 labels (B, *spatial) or masks (B, K, *spatial), on the device of the prediction.

        Raises:
            UsageError: the prediction was changed in place since the forward.
            InputError: the target has the wrong shape, dtype or content.
        """
        logits = self.teacher.logits
        if logits._version != self.version:
            raise UsageError(
                "the prediction was changed in place between forward and passion_loss, and the teacher with it; "
                "use an out-of-place operation on what forward returned"
            )
        return prepare_target(target, logits, self.adapter.spec.outputs, self.image_size).to(logits.device)

    def terms(
        self,
        labels: Tensor,
        config: PassionConfig,
        preference: PreferenceEstimator,
        own_loss: UnimodalLoss | None = None,
    ) -> LossTerms:
        """Compare students with their teacher and with the target.

        Args:
            labels: from :meth:`labels`.
            config: hyper-parameters.
            preference: decides the gate; not updated.
            own_loss: of the user, for the students; None: ours.

        Raises:
            BackboneError: ``unimodal_outputs`` of the spec does not give one prediction for each modality.
        """
        logits, spec = self.teacher.logits, self.adapter.spec
        presence, active = self.presence.to(logits.device), self.active.to(logits.device)
        modalities = self.adapter.modalities
        alone = self.students
        if config.subset_students:
            alone = [student for student in alone if len(student.modalities) == 1]
        matrices = collect_terms(self.teacher, alone, labels, modalities, config, spec.outputs, own_loss)
        subset = self._subset_terms(labels, config, own_loss) if config.subset_students else None
        supervised = active
        own = self._own_unimodal(config)
        if own is not None:
            columns = [unimodal_loss(_log(probability), labels, config, spec.outputs) for probability in own]
            matrices["unimodal"] = torch.where(presence, torch.stack(columns, dim=1), 0)
            supervised = presence
        gate = preference.gate(matrices["distance"], presence) & active
        return LossTerms(modalities, **matrices, gate=gate, active=active, supervised=supervised, subset=subset)

    def _subset_terms(self, labels: Tensor, config: PassionConfig, own_loss: UnimodalLoss | None) -> LossTerms:
        """Compare the students of several modalities, one for each sample at most, with teacher and target."""
        several = [student for student in self.students if len(student.modalities) > 1]
        students = [concatenate_students(several, "subset")] if several else []
        active = torch.zeros(len(labels), 1, dtype=torch.bool)
        for student in students:
            active[student.rows] = True
        active, outputs = active.to(self.teacher.logits.device), self.adapter.spec.outputs
        matrices = collect_terms(self.teacher, students, labels, ("subset",), config, outputs, own_loss)
        return LossTerms(("subset",), **matrices, gate=active, active=active, supervised=active, subset=None)

    def _own_unimodal(self, config: PassionConfig) -> Sequence[Tensor] | None:
        """Return what a separate uni-modal decoder of the backbone predicted; only official mode uses it."""
        pick = self.adapter.spec.unimodal_outputs
        if pick is None or config.mode != "official":
            return None
        picked = pick(self.raw)
        if picked is None:
            return None
        predictions = as_tuple(picked) or ()
        if len(predictions) != len(self.adapter.modalities):
            raise BackboneError(
                f"BackboneSpec.unimodal_outputs gave {len(predictions)} predictions for the modalities "
                f"{self.adapter.modalities}; it must give one for each, in this order"
            )
        logits = self.teacher.logits
        wrong = [x for x in predictions if not isinstance(x, Tensor) or x.ndim != logits.ndim or len(x) != len(logits)]
        if wrong:
            raise BackboneError(
                f"BackboneSpec.unimodal_outputs gave {describe(wrong[0])}; each prediction must be a tensor of "
                f"probabilities (B, K, *spatial) like the logits {tuple(logits.shape)}"
            )
        return predictions


def _log(probability: Tensor) -> Tensor:
    """Turn probabilities into logits of the same softmax."""
    dtype = torch.promote_types(probability.dtype, torch.float32)
    return probability.to(dtype).clamp(min=torch.finfo(dtype).tiny).log()
