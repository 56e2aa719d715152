"""The two kinds of passes through a backbone: the fused one, and students that see some modalities only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from passion_plugin.backbone.binding import BoundBackbone
from passion_plugin.backbone.calls import BackboneCall
from passion_plugin.errors import BackboneError, PassionError, short
from passion_plugin.overrides import overridden_forward
from passion_plugin.random_state import kept_random_state, random_state, set_random_state
from passion_plugin.segments import Segment
from passion_plugin.skipping import skipping
from passion_plugin.taps import FeatureRecord, Tap

__all__ = ["FusedPass", "Prediction", "Skip", "explained", "fused_pass", "student_pass"]

Skip = Literal["no", "absent", "rows"]
"""Where encoders of missing modalities are left out."""


@dataclass(frozen=True)
class Prediction:
    """What a pass gives to compare.

    Attributes:
        logits: (B, K, *spatial), what leaves the classifier.
        features: (B, C, *spatial), what enters it.
        coarse: coarse logits (B, K, *coarser), finest first.
    """

    logits: Tensor
    features: Tensor
    coarse: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the logits, the features and the coarse logits, in this order."""
        return (self.logits, self.features, *self.coarse)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Prediction:
        """Build one from what :meth:`tensors` returned."""
        return cls(tensors[0], tensors[1], tuple(tensors[2:]))

    def detached(self) -> Prediction:
        """Return it without gradient."""
        return self.of([tensor.detach() for tensor in self.tensors()])

    def split(self, sizes: Sequence[int]) -> list[Prediction]:
        """Cut the batch into consecutive parts."""
        if len(sizes) == 1:
            return [self]
        parts = zip(*(tensor.split(list(sizes)) for tensor in self.tensors()), strict=True)
        return [self.of(part) for part in parts]

    def rows(self, index: Tensor) -> Prediction:
        """Return some samples only, given in ascending order."""
        if len(index) == len(self.logits):
            return self
        return self.of([tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors()])


@dataclass(frozen=True)
class FusedPass:
    """The pass with everything that is available, and what students need of it.

    Attributes:
        call: the arguments, with absent modalities blanked.
        batch: batch size.
        raw: what the backbone returned, untouched.
        prediction: the teacher, with its gradient.
        record: encoder outputs.
        absent: encoder outputs of one sample in which everything is absent, for mixed replay.
    """

    call: BackboneCall
    batch: int
    raw: Any
    prediction: Prediction
    record: FeatureRecord
    absent: FeatureRecord | None


def fused_pass(
    bound: BoundBackbone,
    call: BackboneCall,
    presence: Tensor,
    *,
    keep_random_state: bool = False,
    keep_features: bool = False,
    copy_features: bool = False,
    skip: Skip = "no",
) -> FusedPass:
    """Run the backbone on all that is available and listen.

    Absent modalities are blanked in the images first: a NaN that stands for "missing" would otherwise come
    back as 0 × NaN in the gradient of their encoders.

    Args:
        bound: the backbone.
        call: the user's arguments.
        presence: bool (B, M), modalities whose content may be looked at.
        keep_random_state: remember the random state after the last encoder.
        keep_features: record what the encoders put out even if no student replays it.
        copy_features: replay copies although the backbone does not ask for them. The graph is then the same
            whichever rows a student takes, which a sharded backbone needs: it gathers parameters in backward.
        skip: leave encoders out where their modality is ``"absent"`` from the whole batch, or from single
            ``"rows"`` too.
    """
    call = bound.blanked(call, presence)
    given = call
    if bound.spec.students in ("rerun", "mixed"):
        # Students read the images again; a backbone that writes into them must not spoil that.
        given = bound.with_input(call, tree_map(_clone, bound.input_of(call)))
    record = FeatureRecord(bound.encoders, copy=bound.spec.copy_features or copy_features)
    record.random_state = random_state() if keep_random_state else None
    replayed = bound.spec.students in ("replay", "mixed", "heads")
    recording = record.recording(features=replayed or keep_features, keep_random_state=keep_random_state)
    skipped = {}
    if skip != "no":
        skipped = skipping(bound.encoders, bound.modalities, presence, bound.layouts, by_rows=skip == "rows")
    with overridden_forward(skipped), overridden_forward(recording), _tapped(bound) as taps:
        raw = bound.run(given)
    if torch.is_grad_enabled() and replayed:
        record.check_trainable()
    with kept_random_state(keep_random_state):
        absent = _absent_record(bound, call, len(presence)) if bound.spec.students == "mixed" else None
    return FusedPass(call, len(presence), raw, _prediction(taps), record, absent)


def student_pass(bound: BoundBackbone, fused: FusedPass, segments: Sequence[Segment]) -> list[Prediction]:
    """Run the backbone with some modalities let through, in light mode, with buffers at rest.

    Args:
        bound: the backbone.
        fused: the fused pass of this step.
        segments: one student, or several to be stacked into one batch.

    Returns:
        A prediction for each segment.
    """
    rows = torch.cat([segment.rows for segment in segments])
    keep = torch.zeros(len(rows), len(bound.modalities), dtype=torch.bool)
    start = 0
    for segment in segments:
        columns = [bound.modalities.index(modality) for modality in segment.modalities]
        keep[start : start + len(segment.rows), columns] = True
        start += len(segment.rows)
    call = bound.rows(fused.call, rows, fused.batch)
    if fused.record.random_state is not None:
        set_random_state(fused.record.random_state)
    with bound.student_mode(), _only(bound, fused, segments), _tapped(bound) as taps:
        bound.run_masked(call, keep)
    prediction = _prediction(taps)
    if len(prediction.logits) != len(rows):
        raise BackboneError(
            f"the student of {', '.join(segments[0].modalities)} was given {len(rows)} sample(s), but its prediction "
            f"has {len(prediction.logits)}{bound.vector_hint(fused.call, fused.batch)}"
        )
    names = list(dict.fromkeys(modality for segment in segments for modality in segment.modalities))
    if torch.is_grad_enabled() and not prediction.features.requires_grad and _upstream_is_trainable(bound, names):
        raise BackboneError(
            f"the features of the student of {', '.join(names)} carry no gradient, so that nothing "
            f"would be distilled: reentrant activation checkpointing? Use checkpoint(..., use_reentrant=False)"
        )
    return prediction.split([len(segment.rows) for segment in segments])


@contextmanager
def explained(what: str, hint: str = "") -> Iterator[None]:
    """Say of an exception that it comes from a pass that the user never asked for.

    What the machine raises, such as having no memory left, keeps its class and its message, which batch-size finders
    look at, and gets a note. Only for passes within forward: checkpoints recompute in backward, and stop that by an
    exception of their own.

    Args:
        what: what the pass gives to the backbone.
        hint: what may be wrong with it.

    Raises:
        BackboneError: instead of an exception of the backbone.
    """
    try:
        yield
    except PassionError:
        raise
    except Exception as error:
        if _is_of_the_machine(error):
            # add_note() of Python 3.11 does the same.
            vars(error).setdefault("__notes__", []).append(f"while the backbone was given {what}")
            raise
        few = any(f"more than 1 {lacking}" in str(error) for lacking in ("value", "spatial element"))
        hint = ". Use larger batches or images, or layers without batch statistics" if few else hint
        raise BackboneError(
            f"the backbone ran on the batch, but raises when it is given {what}: {short(error)}{hint}"
        ) from error


def _is_of_the_machine(error: Exception) -> bool:
    """Whether it is for want of memory, or comes from a device, its libraries or another process."""
    words = ("out of memory", "alloc", "cuda error", "hip error", "cudnn", "cublas", "nccl", "gloo")
    spoken = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return spoken or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _upstream_is_trainable(bound: BoundBackbone, modalities: Sequence[str]) -> bool:
    """Whether these modalities can learn in front of the classifier: in their encoders, where they are known."""
    own = [module for name in modalities for module in bound.encoders.get(name, ())]
    others = [module for name, group in bound.encoders.items() if name not in modalities for module in group]
    others += [] if bound.classifier is None else [bound.classifier]
    elsewhere = {parameter for module in others for parameter in module.parameters()}
    modules = own or [bound.backbone]
    return any(p.requires_grad for module in modules for p in module.parameters() if p not in elsewhere)


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def _tapped(bound: BoundBackbone) -> Iterator[list[Tap]]:
    modules = [bound.classifier, *bound.coarse]
    taps = [Tap(name) for name in (bound.spec.classifier, *bound.spec.coarse)]
    with overridden_forward({module: tap for module, tap in zip(modules, taps, strict=True) if module is not None}):
        yield taps


def _prediction(taps: Sequence[Tap]) -> Prediction:
    features, logits = taps[0].result()
    return Prediction(logits, features, tuple(tap.result()[1] for tap in taps[1:]))


@contextmanager
def _only(bound: BoundBackbone, fused: FusedPass, segments: Sequence[Segment]) -> Iterator[None]:
    """Let only the modalities of each segment through the encoders."""
    if bound.spec.students in ("replay", "mixed"):
        with fused.record.replaying(segments, fused.batch, others=fused.absent):
            yield
    elif len(segments) == 1:
        with overridden_forward(fused.record.isolating(segments[0].modalities)):
            yield
    else:
        yield


@torch.no_grad()
def _absent_record(bound: BoundBackbone, call: BackboneCall, batch: int) -> FeatureRecord:
    """Record what the encoders make of one sample in which every modality is absent."""
    record = FeatureRecord(bound.encoders, copy=bound.spec.copy_features)
    nothing = torch.zeros(1, len(bound.modalities), dtype=torch.bool)
    call = bound.blanked(bound.rows(call, torch.tensor([0]), batch), nothing)
    what = "one sample in which every modality is absent"
    with explained(what), bound.student_mode(), overridden_forward(record.recording()):
        bound.run_masked(call, ~nothing)
    return record
