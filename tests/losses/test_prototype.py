"""Prototype distillation: what it means, in both modes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from passion_plugin.losses import prototype_distillation
from passion_plugin.testing import (
    assert_batch_independent,
    assert_computed_in_float32,
    assert_independent_of_layout,
    assert_matches_reference,
    assert_no_gradient_to_teacher,
    assert_nonnegative,
    assert_voxel_permutation_invariant,
    assert_zero_at_teacher,
    references,
)
from passion_plugin.testing.strategies import features, labels, shapes

MODES = ("default", "official")
K = 4
Case = tuple[Tensor, Tensor, Tensor]


def terms(student: Tensor, teacher: Tensor, y: Tensor, mode: str = "default") -> tuple[Tensor, Tensor]:
    return prototype_distillation(student, teacher, y, K, mode=mode)


def masks_of(y: Tensor) -> Tensor:
    return one_hot(y, K).movedim(-1, 1)


@st.composite
def cases(draw: st.DrawFn, *, batch: tuple[int, int] = (1, 3)) -> Case:
    """Student and teacher features of different widths, and labels in which classes are missing."""
    size, width, *spatial = draw(shapes(batch=batch, side=(1, 3)))
    student = draw(features((size, width, *spatial)))
    teacher = draw(features((size, draw(st.integers(1, 4)), *spatial)))
    return student, teacher, draw(labels((size, K, *spatial)))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(case=cases())
def test_equals_its_reference(mode: str, case: Case) -> None:
    bound = {"num_classes": K, "mode": mode}
    assert_matches_reference(
        partial(prototype_distillation, **bound),
        partial(references.prototype_distillation, **bound),
        *case,
        gradient=False,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 2)])
def test_gradient_is_the_slope_of_the_reference(mode: str, spatial: tuple[int, ...]) -> None:
    student = torch.randn(2, 3, *spatial, dtype=torch.float64)
    teacher = torch.randn(2, 5, *spatial, dtype=torch.float64)
    y = torch.randint(3, (2, *spatial))
    y[1].clamp_(max=1)
    bound = {"num_classes": K, "mode": mode}
    assert_matches_reference(
        partial(prototype_distillation, **bound),
        partial(references.prototype_distillation, **bound),
        student,
        teacher,
        y,
    )


@settings(max_examples=15)
@given(case=cases(batch=(2, 3)))
def test_default_is_batch_independent(case: Case) -> None:
    assert_batch_independent(terms, *case)


def test_official_is_not_batch_independent() -> None:
    student, teacher = torch.randn(2, 2, 3, 1, 4, dtype=torch.float64)
    y = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]]])
    with pytest.raises(AssertionError, match="depends on its batch"):
        assert_batch_independent(partial(terms, mode="official"), student, teacher, y)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(case=cases())
def test_has_no_geometry_and_no_sign(mode: str, case: Case) -> None:
    loss = partial(terms, mode=mode)
    assert_voxel_permutation_invariant(loss, *case)
    assert_nonnegative(loss, *case, atol=0.0)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(case=cases())
def test_layout_of_memory_does_not_matter(mode: str, case: Case) -> None:
    # Gradients divide by norms, so rounding is measured against sizes that rule out near-zero features.
    student, teacher, y = case
    assert_independent_of_layout(partial(terms, mode=mode), student.abs() + 2, teacher.abs() + 2, y)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(case=cases(), order=st.permutations(range(K)))
def test_names_of_classes_do_not_matter(mode: str, case: Case, order: list[int]) -> None:
    student, teacher, y = case
    renamed = torch.tensor(order)[y]
    for after, before in zip(terms(student, teacher, renamed, mode), terms(*case, mode), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@settings(max_examples=15)
@given(case=cases(), scale=st.sampled_from([0.1, 3.0, 100.0]))
def test_scale_of_the_features_does_not_matter(case: Case, scale: float) -> None:
    student, teacher, y = case
    # Away from zero, where the bound on the norms would act, also on the mean of a class.
    student, teacher = student.abs() + 1, teacher.abs() + 1
    scaled, plain = terms(student * scale, teacher / scale, y), terms(student, teacher, y)
    for after, before in zip(scaled, plain, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(case=cases())
def test_zero_at_teacher(mode: str, case: Case) -> None:
    _, teacher, y = case
    assert_zero_at_teacher(lambda s, t: terms(s, t, y, mode), teacher)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(case=cases())
def test_masks_and_class_numbers_agree(mode: str, case: Case) -> None:
    student, teacher, y = case
    by_number = terms(*case, mode)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        for one, other in zip(terms(student, teacher, masks_of(y).to(dtype), mode), by_number, strict=True):
            assert torch.equal(one, other)


def test_regions_may_overlap() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    regions = torch.rand(2, K, 2, 4) < 0.5
    bound = {"num_classes": K}
    assert bool((regions.sum(1) > 1).any())
    assert_matches_reference(
        partial(prototype_distillation, **bound),
        partial(references.prototype_distillation, **bound),
        student,
        teacher,
        regions,
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_without_any_class_costs_exactly_zero(mode: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    student.requires_grad_()
    regions = torch.ones(2, K, 2, 4, dtype=torch.bool)
    regions[0] = False
    loss, distance = terms(student, teacher, regions, mode)
    loss.sum().backward()
    assert loss[0] == 0
    assert distance[0] == 0
    assert not student.grad[0].any()
    # Official mode asks every sample of the batch for a class, so here none counts for the other one either.
    assert (loss[1] > 0) == (mode == "default")


def test_official_without_a_common_class_costs_exactly_zero() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    y = torch.stack((torch.zeros(2, 4), torch.ones(2, 4))).long()
    loss, distance = terms(student.requires_grad_(), teacher, y, "official")
    loss.sum().backward()
    assert not loss.any()
    assert not distance.any()
    assert not student.grad.any()
    assert bool((terms(student, teacher, y)[0] > 0).all())


def test_features_of_zero_length_have_finite_gradients() -> None:
    student = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss, _ = terms(student, torch.rand(1, 3, 2, 2), torch.tensor([[[0, 1], [1, 2]]]))
    loss.sum().backward()
    assert torch.isfinite(student.grad).all()


def test_the_distance_and_the_teacher_carry_no_gradient() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    y = torch.randint(K, (2, 4, 4))
    assert_no_gradient_to_teacher(lambda s, t: terms(s, t, y), student, teacher)
    assert not terms(student.requires_grad_(), teacher, y)[1].requires_grad


def test_the_gradient_flows_through_the_prototypes_too() -> None:
    # Class 1 has one voxel: its similarity to itself is 1 whatever happens, yet moving it moves its prototype
    # and with it the similarity of every other voxel.
    student = torch.tensor([[1.0, 1.0, 0.2], [0.0, 0.5, 1.0]], dtype=torch.float64).view(1, 2, 1, 3)
    teacher = torch.tensor([[1.0, 1.0, -0.5], [0.0, 0.5, 1.0]], dtype=torch.float64).view(1, 2, 1, 3)
    only_last = torch.tensor([0, 0, 1], dtype=torch.bool).view(1, 1, 1, 3)
    student.requires_grad_()
    prototype_distillation(student, teacher, only_last, 1)[0].sum().backward()
    assert student.grad[..., 2].any()


@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives(mode: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    y = torch.tensor([[[0, 1, 2], [2, 1, 0]], [[0, 1, 1], [1, 1, 0]]])

    def loss(s: Tensor) -> Tensor:
        return terms(s, teacher, y, mode)[0]

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 2, 8, 4, 4, 4)
    assert_computed_in_float32(terms, student, teacher, torch.randint(K, (2, 4, 4, 4)), dtype=dtype)


def test_student_and_teacher_of_different_precision_meet_in_the_wider_one() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    y = torch.randint(K, (2, 4, 4))
    assert terms(student.bfloat16(), teacher, y)[0].dtype == torch.float32
    assert terms(student, teacher.double(), y)[0].dtype == torch.float64
