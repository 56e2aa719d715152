"""One training step: what a forward leaves behind, and the terms that come of it once the target is known."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passion_plugin.backbone.binding import BoundBackbone
from passion_plugin.backbone.calls import BackboneCall
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, UsageError
from passion_plugin.objective import LossTerms, UnimodalLoss, collect_terms, unimodal_loss
from passion_plugin.parallel import in_lockstep
from passion_plugin.passes import Prediction, Skip, fused_pass
from passion_plugin.plain_values import members
from passion_plugin.preference import PreferenceEstimator
from passion_plugin.reentrant import passes_reentrant, reentrant_problem
from passion_plugin.students import Student, active_students, merged, run_students, with_stand_ins
from passion_plugin.targets import prepare_target
from passion_plugin.validate import describe
from passion_plugin.zeros import zero_of

if TYPE_CHECKING:
    from passion_plugin.strategies.base import Strategy

__all__ = ["TrainingStep"]


@dataclass(frozen=True)
class TrainingStep:
    """A forward in training mode that waits for its target.

    Attributes:
        bound: the backbone.
        call: its arguments, for a strategy that runs it again.
        raw: what the backbone returned.
        teacher: the fused prediction, without gradient.
        version: of the teacher's logits, to notice an in-place change by the user.
        students: predictions that saw some modalities only; for PASSION one each, unless ``subset_students``.
        presence: bool (B, M) on the CPU.
        active: bool (B, M) on the CPU: the sample has the modality and at least one other.
        image_size: spatial size of the images, None when unknown.
        features: outputs of the encoders by modality, with gradient; empty unless the strategy needs them.
        idle: what the loss has to depend on, although this batch has no use for it: :meth:`with_idle`.
        thread: identity of the thread that ran the forward.
    """

    bound: BoundBackbone
    call: BackboneCall
    raw: Any
    teacher: Prediction
    version: int
    students: list[Student]
    presence: Tensor
    active: Tensor
    image_size: tuple[int, ...] | None
    features: Mapping[str, list[Tensor]]
    idle: tuple[Tensor, ...] = ()
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def run(
        cls,
        bound: BoundBackbone,
        call: BackboneCall,
        presence: Tensor | None,
        config: PassionConfig,
        heads: nn.ModuleList,
        strategy: Strategy,
    ) -> TrainingStep:
        """Run the fused pass and every student that the batch needs.

        Args:
            bound: the backbone.
            call: the user's arguments.
            presence: bool (B, M), what may be looked at; None: what the mask of the call lets through.
            config: hyper-parameters.
            heads: students for a backbone that cannot let a single modality through.
            strategy: decides which students there are.

        Raises:
            InputError: the batch is not usable.
            UsageError: ``presence`` names more than the mask, which this strategy cannot use, or a forward of the
                backbone waits for all processes and ``subset_students`` draws other passes in each.
            BackboneError: what leaves the classifier is not usable, or reentrant activation checkpointing, seen in the
                first batch.
        """
        bound.check_images(call)
        available = bound.availability(call, presence)
        if strategy.teacher_sees_all and bound.has_mask(call) and not bound.presence_of(call).equal(available):
            raise UsageError(
                f"strategy {strategy.name!r} takes the network's prediction for that from all modalities of a sample, "
                "but passion_presence names more of them than the mask lets through; leave passion_presence out"
            )
        bound.check_finite(call, available)
        if not bound.trained:
            bound.lockstep = in_lockstep(bound.backbone)
        lockstep = bound.lockstep
        if lockstep and config.subset_students:
            raise UsageError(
                "subset_students=True draws students anew in every process, but a forward of this backbone waits for "
                "all processes, because it is sharded or has SyncBatchNorm layers: leave subset_students out, or use "
                "DistributedDataParallel without SyncBatchNorm"
            )
        wanted = config.skip_missing_encoders if bound.spec.skippable and not lockstep else False
        skip: Skip = "absent" if wanted == "auto" else "rows" if wanted else "no"
        keep_features = strategy.needs_features
        fused = fused_pass(
            bound,
            call,
            available,
            keep_random_state=config.share_random_state,
            keep_features=keep_features,
            copy_features=lockstep,
            skip=skip,
        )
        logits = fused.prediction.logits
        if not bound.trained:
            if passes_reentrant((fused.raw, logits)):
                raise BackboneError(reentrant_problem())
            bound.trained = True
        _check_classes(bound, logits)
        segments = strategy.segments(available)
        stands_in = [False] * len(segments)
        if lockstep:
            complete = torch.ones(1, len(bound.modalities), dtype=torch.bool)
            segments, stands_in = with_stand_ins(segments, strategy.segments(complete))
        with torch.set_grad_enabled(strategy.students == "trained"):
            students = run_students(bound, fused, segments, config, heads)
        idle = [
            tensor
            for student, unused in zip(students, stands_in, strict=True)
            if unused
            for tensor in student.prediction.tensors()
        ]
        students = [student for student, unused in zip(students, stands_in, strict=True) if not unused]
        # Heads without a student in this batch would have no gradient here and one in another process.
        idle += [
            parameter
            for modality, head in zip(bound.modalities, heads, strict=False)
            if all(modality not in student.modalities for student in students)
            for parameter in head.parameters()
        ]
        return cls(
            bound=bound,
            call=fused.call,
            raw=fused.raw,
            teacher=fused.prediction.detached(),
            version=logits._version,
            students=students,
            presence=available,
            active=active_students(available),
            image_size=bound.image_size(call),
            features={name: fused.record.features(name) for name in bound.modalities} if keep_features else {},
            idle=tuple(tensor for tensor in idle if tensor.requires_grad),
        )

    def with_idle(self, loss: Tensor) -> Tensor:
        """Return the loss with a gradient of zero for what runs idle.

        Processes that train together need the same parameters to have a gradient, and the same passes to be in the
        graph, whatever their batches hold.
        """
        return loss + zero_of(self.idle).to(loss) if self.idle else loss

    def labels(self, target: Tensor) -> Tensor:
        """Check the target, and that the prediction is still what it was.

        Args:
            target: as the user has it.

        Returns:
            int64 labels (B, *spatial) or masks (B, K, *spatial), on the device of the prediction.

        Raises:
            UsageError: the prediction was changed in place since the forward, or that was called in another thread.
            InputError: the target has the wrong shape, dtype or content.
        """
        if self.thread != threading.get_ident():
            raise UsageError(
                "the forward that waits for its passion_loss was called in another thread: call both in one thread, "
                "or forward(..., passion_target=target) in their place"
            )
        logits = self.teacher.logits
        if logits._version != self.version:
            raise UsageError(
                "the prediction was changed in place between forward and passion_loss, and the teacher with it; "
                "use an out-of-place operation on what forward returned"
            )
        return prepare_target(target, logits, self.bound.spec.outputs, self.image_size).to(logits.device)

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
        logits, spec = self.teacher.logits, self.bound.spec
        presence, active = self.presence.to(logits.device), self.active.to(logits.device)
        modalities = self.bound.modalities
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
        students = [merged(several, "subset")] if several else []
        active = torch.zeros(len(labels), 1, dtype=torch.bool)
        for student in students:
            active[student.rows] = True
        active = active.to(self.teacher.logits.device)
        matrices = collect_terms(self.teacher, students, labels, ("subset",), config, self.bound.spec.outputs, own_loss)
        return LossTerms(("subset",), **matrices, gate=active, active=active, supervised=active, subset=None)

    def _own_unimodal(self, config: PassionConfig) -> Sequence[Tensor] | None:
        """Return what a separate uni-modal decoder of the backbone predicted; only official mode uses it."""
        pick = self.bound.spec.unimodal_outputs
        if pick is None or config.mode != "official":
            return None
        picked = pick(self.raw)
        if picked is None:
            return None
        predictions = members(picked) or ()
        if len(predictions) != len(self.bound.modalities):
            raise BackboneError(
                f"BackboneSpec.unimodal_outputs gave {len(predictions)} predictions for the modalities "
                f"{self.bound.modalities}; it must give one for each, in this order"
            )
        logits = self.teacher.logits
        wrong = [x for x in predictions if not isinstance(x, Tensor) or x.ndim != logits.ndim or len(x) != len(logits)]
        if wrong:
            raise BackboneError(
                f"BackboneSpec.unimodal_outputs gave {describe(wrong[0])}; each prediction must be a tensor of "
                f"probabilities (B, K, *spatial) like the logits {tuple(logits.shape)}"
            )
        return predictions


def _check_classes(bound: BoundBackbone, logits: Tensor) -> None:
    if bound.spec.outputs == "softmax" and logits.ndim > 1 and logits.shape[1] == 1:
        raise BackboneError(
            f"the classifier {bound.spec.classifier!r} gives one class, whose softmax is 1 whatever the network says: "
            f"set BackboneSpec(outputs='sigmoid') and pass region masks (B, 1, *spatial), or give it two classes"
        )


def _log(probability: Tensor) -> Tensor:
    """Turn probabilities into logits of the same softmax."""
    dtype = torch.promote_types(probability.dtype, torch.float32)
    return probability.to(dtype).clamp(min=torch.finfo(dtype).tiny).log()
