"""Which students a batch needs, and running them: some modalities each, only on the rows that can teach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passion_plugin.backbone.binding import BoundBackbone
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, UsageError
from passion_plugin.heads import feature_maps
from passion_plugin.missing.subsets import drop_modalities
from passion_plugin.passes import FusedPass, Prediction, explained, student_pass
from passion_plugin.random_state import kept_random_state
from passion_plugin.segments import Segment

__all__ = ["Student", "active_students", "merged", "random_subsets", "run_students", "with_stand_ins"]


@dataclass(frozen=True)
class Student:
    """The prediction of the rows in which only some modalities were let through.

    Attributes:
        modalities: their names.
        rows: int64 (n,), samples of the batch, in ascending order.
        prediction: of these n samples, with gradient.
    """

    modalities: tuple[str, ...]
    rows: Tensor
    prediction: Prediction

    @property
    def modality(self) -> str:
        """Name of the only modality.

        Raises:
            ValueError: there are several.
        """
        (modality,) = self.modalities
        return modality


def active_students(presence: Tensor) -> Tensor:
    """Return bool (B, M): the sample has the modality and at least one other.

    A sample with a single modality is its own teacher; there is nothing to distil.

    Example:
        >>> import torch
        >>> active_students(torch.tensor([[True, True, False], [False, True, False]])).tolist()
        [[True, True, False], [False, False, False]]
    """
    return presence & (presence.sum(1, keepdim=True) > 1)


def random_subsets(presence: Tensor) -> Tensor:
    """Draw bool (B, M): a subset of what each sample has, of two modalities at least and not all; none of two or fewer.

    Each such subset is as likely as any other. The random numbers are those of PyTorch's default generator.

    Example:
        >>> import torch
        >>> drawn = random_subsets(torch.tensor([[True, True, True, False], [True, True, False, False]]))
        >>> drawn.sum(1).tolist()
        [2, 0]
    """
    subsets = torch.zeros_like(presence)
    size = presence.sum(1)
    pending = size > 2
    while pending.any():
        subsets[pending] = drop_modalities(presence[pending])
        drawn = subsets.sum(1)
        pending = (size > 2) & ((drawn < 2) | (drawn == size))
    return subsets


def merged(students: Sequence[Student], name: str) -> Student:
    """Put students of different rows together, as one under another name, with the rows in ascending order.

    Raises:
        UsageError: a row has several of them.
    """
    rows, order = torch.cat([student.rows for student in students]).sort()
    if len(rows.unique()) < len(rows):
        raise UsageError("a sample can have one student of several modalities in a step, and the strategy gave it more")
    tensors = zip(*(student.prediction.tensors() for student in students), strict=True)
    joined = [torch.cat(parts) for parts in tensors]
    return Student((name,), rows, Prediction.of([each.index_select(0, order.to(each.device)) for each in joined]))


def run_students(
    bound: BoundBackbone, fused: FusedPass, segments: Sequence[Segment], config: PassionConfig, heads: nn.ModuleList
) -> list[Student]:
    """Run one student for each segment.

    Args:
        bound: the backbone.
        fused: its fused pass.
        segments: what each student sees, in which rows.
        config: memory and stacking.
        heads: students for a spec with ``students="heads"``.

    Returns:
        Students in the order of the segments.

    Raises:
        BackboneError: several modalities at once are asked of a backbone whose students are heads, or the backbone
            raises where a part of the batch is let through.
    """
    if bound.spec.students == "heads":
        return [_head_student(bound, fused, heads, segment) for segment in segments]
    groups = [list(segments)] if config.stack_students and segments else [[segment] for segment in segments]
    students = []
    with kept_random_state(config.share_random_state):
        for group in groups:
            names = dict.fromkeys(name for segment in group for name in segment.modalities)
            rows = sum(len(segment.rows) for segment in group)
            hint = bound.vector_hint(fused.call, fused.batch) if rows != fused.batch else ""
            with explained(f"only {', '.join(names)} of {rows} sample(s)", hint):
                predictions = _run(bound, fused, group, config)
            students += [
                Student(segment.modalities, segment.rows, prediction)
                for segment, prediction in zip(group, predictions, strict=True)
            ]
    return students


def with_stand_ins(segments: Sequence[Segment], complete: Sequence[Segment]) -> tuple[list[Segment], list[bool]]:
    """Fill up the students of a batch, so that every process runs the same passes in the same order.

    A forward of a sharded backbone is a collective call: processes whose batches need different students would wait
    for each other for ever.

    Args:
        segments: students that the batch needs.
        complete: students that a sample with every modality needs.

    Returns:
        A student for each of ``complete``, of the first row where the batch needs none; and which of them stand in.

    Raises:
        UsageError: the batch needs a student that a complete sample does not need.

    Example:
        >>> import torch
        >>> complete = Segment.singles(("t1", "t2"), torch.tensor([[True, True]]))
        >>> filled, stands_in = with_stand_ins([Segment(("t2",), torch.tensor([1, 3]))], complete)
        >>> [(segment.modalities, segment.rows.tolist()) for segment in filled], stands_in
        ([(('t1',), [0]), (('t2',), [1, 3])], [True, False])
    """
    wanted = {segment.modalities: segment for segment in segments}
    known = {segment.modalities for segment in complete}
    if not wanted.keys() <= known:
        raise UsageError(
            f"the strategy asks for students of {sorted(wanted.keys() - known)}, which no complete sample needs: the "
            f"processes that share a sharded backbone cannot know of them. Use DistributedDataParallel"
        )
    filled = [wanted.get(segment.modalities, Segment(segment.modalities, torch.tensor([0]))) for segment in complete]
    return filled, [segment.modalities not in wanted for segment in complete]


def _run(bound: BoundBackbone, fused: FusedPass, group: list[Segment], config: PassionConfig) -> list[Prediction]:
    if config.memory == "default":
        return student_pass(bound, fused, group)

    def flat(_: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for prediction in student_pass(bound, fused, group) for tensor in prediction.tensors())

    # The argument only says on which device random states have to be kept for the second run.
    tensors = checkpoint(flat, fused.prediction.logits.detach(), use_reentrant=False)
    size = len(tensors) // len(group)
    return [Prediction.of(tensors[start : start + size]) for start in range(0, len(tensors), size)]


def _head_student(bound: BoundBackbone, fused: FusedPass, heads: nn.ModuleList, segment: Segment) -> Student:
    modality, *more = segment.modalities
    if more:
        raise BackboneError(
            f"the students of this backbone are heads on the features of one encoder each, so that it cannot predict "
            f"from {', '.join(segment.modalities)} together: use single modalities only"
        )
    head = heads[bound.modalities.index(modality)]
    logits = fused.prediction.logits
    maps = feature_maps(fused.record.features(modality), logits.ndim - 2)
    rows = segment.rows.to(logits.device)
    prediction = head([feature.index_select(0, rows) for feature in maps], size=logits.shape[2:])
    return Student(segment.modalities, segment.rows, prediction)
