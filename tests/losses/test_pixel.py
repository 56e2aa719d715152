"""Pixel distillation: what it means, in both modes and for both kinds of outputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passion_plugin.losses import pixel_distillation
from passion_plugin.testing import (
    assert_batch_independent,
    assert_class_permutation_invariant,
    assert_computed_in_float32,
    assert_independent_of_layout,
    assert_matches_reference,
    assert_no_gradient_to_teacher,
    assert_nonnegative,
    assert_voxel_permutation_invariant,
    assert_zero_at_teacher,
    references,
)
from passion_plugin.testing.strategies import logits, shapes

SETTINGS = (
    {"mode": "default"},
    {"mode": "official"},
    {"mode": "default", "outputs": "sigmoid"},
)
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s.values()))
default_settings = pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
temperatures = st.sampled_from([1.0, 4.0, 0.5])


@st.composite
def pairs(draw: st.DrawFn, *, batch: tuple[int, int] = (1, 3), scale: float = 10.0) -> tuple[Tensor, Tensor]:
    shape = draw(shapes(batch=batch, side=(1, 3)))
    drawn = logits(shape, scales=(1.0, 0.0, scale))
    return draw(drawn), draw(drawn)


@each_setting
@settings(max_examples=15)
@given(pair=pairs(), temperature=temperatures)
def test_equals_its_reference(setting: dict[str, str], pair: tuple[Tensor, Tensor], temperature: float) -> None:
    bound = {"temperature": temperature, **setting}
    loss, reference = partial(pixel_distillation, **bound), partial(references.pixel_distillation, **bound)
    assert_matches_reference(loss, reference, *pair)


@settings(max_examples=15)
@given(pair=pairs(batch=(1, 2)), scale_factor=st.integers(1, 3))
def test_official_up_sampling_equals_its_reference(pair: tuple[Tensor, Tensor], scale_factor: int) -> None:
    bound = {"scale_factor": scale_factor, "mode": "official"}
    loss, reference = partial(pixel_distillation, **bound), partial(references.pixel_distillation, **bound)
    assert_matches_reference(loss, reference, *pair)


@each_setting
@settings(max_examples=15)
@given(pair=pairs(batch=(2, 3)))
def test_has_no_geometry_and_no_batch(setting: dict[str, str], pair: tuple[Tensor, Tensor]) -> None:
    loss = partial(pixel_distillation, **setting)
    assert_batch_independent(loss, *pair)
    assert_voxel_permutation_invariant(loss, *pair)
    assert_class_permutation_invariant(loss, None, *pair)
    assert_independent_of_layout(loss, *pair)


@default_settings
@settings(max_examples=15)
@given(teacher=logits())
def test_zero_at_teacher(outputs: str, teacher: Tensor) -> None:
    assert_zero_at_teacher(partial(pixel_distillation, outputs=outputs), teacher, atol=1e-14)


@settings(max_examples=15)
@given(teacher=logits(scales=(1.0, 0.0)))
def test_official_is_zero_at_teacher_where_nothing_is_clamped(teacher: Tensor) -> None:
    loss = partial(pixel_distillation, mode="official")
    assert_zero_at_teacher(loss, teacher.clamp(-3, 3), atol=1e-14)


def test_official_pushes_a_student_that_equals_a_clamped_teacher() -> None:
    teacher = torch.tensor([3.0, 0.0, -9.0], dtype=torch.float64).view(1, 3, 1, 1)
    with pytest.raises(AssertionError, match="gradient at student = teacher"):
        assert_zero_at_teacher(partial(pixel_distillation, temperature=1.0, mode="official"), teacher, atol=1e-6)


@default_settings
@settings(max_examples=15)
@given(pair=pairs(scale=100.0), temperature=temperatures)
def test_default_divergence_is_never_negative(outputs: str, pair: tuple[Tensor, Tensor], temperature: float) -> None:
    assert_nonnegative(partial(pixel_distillation, temperature=temperature, outputs=outputs), *pair)


def test_official_divergence_can_be_negative() -> None:
    # Clamped probabilities sum to more than 1: a student that is clamped more is too likely in every class.
    teacher = torch.tensor([5.2, 0.0, 0.0, 0.0]).view(1, 4, 1, 1)
    student = torch.tensor([9.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1)
    loss = partial(pixel_distillation, student, teacher, 1.0)
    assert loss(mode="official") < 0 < loss()


@settings(max_examples=15)
@given(pair=pairs())
def test_a_constant_added_to_all_classes_of_a_voxel_changes_nothing(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    offset = torch.linspace(-5, 5, student[:, :1].numel(), dtype=torch.float64).view_as(student[:, :1])
    for mode in ("default", "official"):
        expected = pixel_distillation(student, teacher, mode=mode)
        torch.testing.assert_close(
            pixel_distillation(student + offset, teacher - offset, mode=mode), expected, rtol=1e-9, atol=1e-12
        )


@each_setting
def test_the_teacher_gets_no_gradient(setting: dict[str, str]) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    assert_no_gradient_to_teacher(partial(pixel_distillation, **setting), student, teacher)


@each_setting
@pytest.mark.parametrize("spatial", [(2, 3), (1, 2, 2)])
def test_first_and_second_derivatives(setting: dict[str, str], spatial: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, 2, 3, *spatial, dtype=torch.float64)
    student.requires_grad_()
    loss = partial(pixel_distillation, teacher=teacher, **setting)
    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


def test_up_sampled_gradient() -> None:
    student, teacher = torch.randn(2, 1, 3, 2, 3, dtype=torch.float64)
    loss = partial(pixel_distillation, teacher=teacher, scale_factor=2, mode="official")
    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@each_setting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_float32(setting: dict[str, str], dtype: torch.dtype) -> None:
    student, teacher = 3 * torch.randn(2, 2, 3, 4, 4)
    assert_computed_in_float32(partial(pixel_distillation, **setting), student, teacher, dtype=dtype)


def test_only_default_mode_pulls_back_a_confidently_wrong_student() -> None:
    teacher = torch.tensor([9.0, -9.0]).view(1, 2, 1, 1)
    slopes = {}
    for mode in ("default", "official"):
        student = (-teacher).clone().requires_grad_()
        pixel_distillation(student, teacher, 1.0, mode=mode).sum().backward()
        slopes[mode] = student.grad
    assert slopes["default"].abs().max() > 0.4
    assert slopes["official"].abs().max() < 1e-6


def test_one_region_is_half_of_two_classes() -> None:
    # softmax over (0, z) is sigmoid(z); the mean runs over one region instead of two classes.
    student, teacher = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64)
    two = [torch.cat((torch.zeros_like(z), z), 1) for z in (student, teacher)]
    torch.testing.assert_close(pixel_distillation(student, teacher, outputs="sigmoid"), 2 * pixel_distillation(*two))


@default_settings
def test_logits_far_out_of_range_stay_finite(outputs: str) -> None:
    teacher = torch.tensor([3e4, -3e4]).view(1, 2, 1, 1)
    student = (-teacher).requires_grad_()
    loss = pixel_distillation(student, teacher, 1.0, outputs=outputs)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


def test_little_is_kept_for_the_backward_pass() -> None:
    student, teacher = torch.randn(2, 1, 4, 16, 16).unbind()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        pixel_distillation(student.requires_grad_(), teacher)
    assert sum(kept.values()) <= 2.1 * student.numel() * 4
