"""Which students a batch needs, and running them: some modalities each, on the rows that can teach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.backbone._heads import feature_maps
from passion_plugin.backbone._passes import FusedPass, explain_errors, student_pass
from passion_plugin.backbone._patching import preserved_rng_state
from passion_plugin.backbone._prediction import Prediction
from passion_plugin.backbone._student_inputs import StudentInput
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, UsageError


@dataclass(frozen=True)
class Student:
    """The prediction of the rows in which only some modalities were kept.

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


def concatenate_students(students: Sequence[Student], name: str) -> Student:
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
    adapter: BackboneAdapter,
    fused: FusedPass,
    student_inputs: Sequence[StudentInput],
    config: PassionConfig,
    heads: nn.ModuleList,
) -> list[Student]:
    """Run one student for each input, one after the other.

    Args:
        adapter: the backbone.
        fused: its fused pass.
        student_inputs: what each student sees, in which rows.
        config: how passes are run.
        heads: students for a spec with ``students="heads"``.

    Returns:
        Students in the order of the inputs.

    Raises:
        BackboneError: several modalities at once are asked of a backbone whose students are heads, or the backbone
            raises where it is given a part of the batch.
    """
    if adapter.spec.students == "heads":
        return [_head_student(adapter, fused, heads, student_input) for student_input in student_inputs]
    students = []
    with preserved_rng_state(config.share_random_state):
        for student_input in student_inputs:
            modalities, rows = student_input.modalities, student_input.rows
            hint = None if len(rows) == fused.batch else partial(adapter.vector_hint, fused.call, fused.batch)
            with explain_errors(f"only {', '.join(modalities)} of {len(rows)} sample(s)", hint):
                prediction = _run(adapter, fused, student_input, config)
            students.append(Student(modalities, rows, prediction))
    return students


def _run(adapter: BackboneAdapter, fused: FusedPass, student_input: StudentInput, config: PassionConfig) -> Prediction:
    if config.memory == "default":
        return student_pass(adapter, fused, student_input)

    def tensors(_: Tensor) -> tuple[Tensor, ...]:
        return student_pass(adapter, fused, student_input).tensors()

    # The argument only says on which device random states have to be kept for the second run.
    return Prediction.of(checkpoint(tensors, fused.prediction.logits.detach(), use_reentrant=False))


def _head_student(
    adapter: BackboneAdapter, fused: FusedPass, heads: nn.ModuleList, student_input: StudentInput
) -> Student:
    modality, *more = student_input.modalities
    if more:
        raise BackboneError(
            f"the students of this backbone are heads on the features of one encoder each, so that it cannot predict "
            f"from {', '.join(student_input.modalities)} together: use single modalities only"
        )
    head = heads[adapter.modalities.index(modality)]
    logits = fused.prediction.logits
    maps = feature_maps(fused.features.features(modality), logits.ndim - 2)
    rows = student_input.rows.to(logits.device)
    prediction = head([feature.index_select(0, rows) for feature in maps], size=logits.shape[2:])
    return Student(student_input.modalities, student_input.rows, prediction)
