"""The Triton kernels of prototype distillation: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from passion_plugin.losses import prototype_distillation

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Result = tuple[Tensor, Tensor, Tensor]


def problem(*spatial: int, classes: int = 4, widths: tuple[int, int] = (5, 3), batch: int = 2) -> list[Tensor]:
    student, teacher = (torch.randn(batch, width, *spatial) for width in widths)
    return [student.to(DEVICE), teacher.to(DEVICE), torch.randint(classes, (batch, *spatial)).to(DEVICE)]


def run(
    student: Tensor, teacher: Tensor, y: Tensor, classes: int, backend: str, *, upstream: Any = (1.0, -2.0), **rest: Any
) -> Result:
    """Loss, distance and gradient."""
    leaf = student.detach().requires_grad_()
    loss, distance = prototype_distillation(leaf, teacher, y, classes, backend=backend, **rest)
    weights = torch.tensor(upstream[: len(loss)], dtype=loss.dtype, device=loss.device)
    return loss.detach(), distance, torch.autograd.grad(loss, leaf, weights)[0]


def exact(student: Tensor, teacher: Tensor, y: Tensor, classes: int, **rest: Any) -> Result:
    return run(student.double(), teacher.double(), y, classes, "eager", **rest)


def assert_exact(found: Result, expected: Result, *, rtol: float = 2e-5, dtype: torch.dtype = torch.float32) -> None:
    """Errors are measured against the largest value: a mean of squares has no smaller scale."""
    assert [value.dtype for value in found] == [torch.float32, torch.float32, dtype]
    for value, wanted in zip(found, expected, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=rtol * scale + 3e-7)


@pytest.mark.parametrize("mode", ["default", "official"])
@pytest.mark.parametrize("spatial", [(1, 2), (7, 9), (3, 5, 11), (5, 211)], ids=str)
def test_odd_sizes(spatial: tuple[int, ...], mode: str) -> None:
    arguments = problem(*spatial)
    arguments[2][1].clamp_(max=1)
    assert_exact(run(*arguments, 4, "triton", mode=mode), exact(*arguments, 4, mode=mode))


def test_one_voxel_has_nothing_to_tell_apart() -> None:
    for value in run(*problem(1, 1), 4, "triton"):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)


@pytest.mark.parametrize("widths", [(1, 1), (17, 40), (70, 2)])
@pytest.mark.parametrize("classes", [1, 20, 32])
def test_many_channels_and_classes(widths: tuple[int, int], classes: int) -> None:
    arguments = problem(6, 17, classes=classes, widths=widths)
    assert_exact(run(*arguments, classes, "triton"), exact(*arguments, classes))


def test_the_widest_features() -> None:
    arguments = problem(5, 7, widths=(256, 129), batch=1)
    assert_exact(run(*arguments, 4, "triton"), exact(*arguments, 4))


@pytest.mark.parametrize("present", [(0,), (0, 2), (3,)], ids=str)
def test_absent_classes(present: tuple[int, ...]) -> None:
    student, teacher, y = problem(6, 9)
    y = torch.tensor(present, device=DEVICE)[y % len(present)]
    assert_exact(run(student, teacher, y, 4, "triton"), exact(student, teacher, y, 4))


def test_regions_overlap_and_may_be_empty() -> None:
    student, teacher, _ = problem(4, 5, 6)
    regions = torch.rand(2, 3, 4, 5, 6, device=DEVICE) < 0.4
    regions[0] = False
    found = run(student, teacher, regions, 3, "triton")
    assert_exact(found, exact(student, teacher, regions, 3))
    assert found[0][0] == 0
    assert not found[2][0].any()
    for dtype in (torch.uint8, torch.float32, torch.int64):
        for value, same in zip(run(student, teacher, regions.to(dtype), 3, "triton"), found, strict=True):
            assert torch.equal(value, same)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_label_dtypes(dtype: torch.dtype) -> None:
    student, teacher, y = problem(5, 6, classes=2)
    expected = run(student, teacher, y, 2, "triton")
    for value, wanted in zip(run(student, teacher, y.to(dtype), 2, "triton"), expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("ignore_index", [0, 1, 255, -100])
def test_ignored_voxels(ignore_index: int) -> None:
    student, teacher, y = problem(7, 9)
    y[:, ::3] = ignore_index
    found = run(student, teacher, y, 4, "triton", ignore_index=ignore_index)
    assert_exact(found, exact(student, teacher, y, 4, ignore_index=ignore_index))
    assert not found[2].movedim(1, 0)[:, y == ignore_index].any()
    if ignore_index == 255:
        for value, wanted in zip(
            run(student, teacher, y.to(torch.uint8), 4, "triton", ignore_index=255), found, strict=True
        ):
            assert torch.equal(value, wanted)


def test_everything_ignored() -> None:
    student, teacher, y = problem(3, 4)
    for value in run(student, teacher, torch.zeros_like(y), 4, "triton", ignore_index=0):
        assert not value.any()


@pytest.mark.parametrize("size", [30.0, 1e-6, 0.0])
def test_large_short_and_zero_features(size: float) -> None:
    student, teacher, y = problem(5, 9)
    student[:, :, ::2] = size * student[:, :, ::2].sign()
    teacher[:, :, 1] *= size
    assert_exact(run(student, teacher, y, 4, "triton"), exact(student, teacher, y, 4))


def test_a_prototype_shorter_than_its_bound() -> None:
    student, teacher, y = problem(5, 9)
    student[:, :, :] = torch.where(y.unsqueeze(1) == 1, 1e-6 * student, student)
    assert_exact(run(student, teacher, y, 4, "triton"), exact(student, teacher, y, 4))


def test_upstream_gradients_and_a_second_backward() -> None:
    student, teacher, y = problem(5, 7)
    assert not run(student, teacher, y, 4, "triton", upstream=(0.0, 0.0))[2].any()
    leaf = student.requires_grad_()
    loss, _ = prototype_distillation(leaf, teacher, y, 4, backend="triton")
    weights = torch.tensor([0.0, 2.5], device=DEVICE)
    once, again = (torch.autograd.grad(loss, leaf, weights, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    assert not once[0].any()
    assert_exact((loss, loss, once), (*[loss.double()] * 2, exact(student, teacher, y, 4, upstream=(0.0, 2.5))[2]))


def test_student_equal_to_its_teacher_costs_exactly_nothing() -> None:
    student, _, y = problem(5, 7)
    for value in run(student, student.clone(), y, 4, "triton"):
        assert not value.any()


@pytest.mark.parametrize("spatial", [(6, 7), (3, 4, 5)], ids=str)
def test_layouts(spatial: tuple[int, ...]) -> None:
    student, teacher, y = problem(*spatial)
    expected = exact(student, teacher, y, 4)
    layout = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
    last = [tensor.to(memory_format=layout) for tensor in (student, teacher)]
    found = run(*last, y, 4, "triton")
    assert_exact(found, expected)
    assert found[2].stride() == last[0].stride()
    turned = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in (student, teacher, y)]
    assert_exact(run(*turned, 4, "triton"), expected)
    sliced = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in (student, teacher, y)]
    assert_exact(run(*sliced, 4, "triton"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    student, teacher, y = problem(9, 11)
    low = (student.to(dtype), teacher.to(dtype), y)
    found, eager, wanted = run(*low, 4, "triton"), run(*low, 4, "eager"), exact(*low, 4)
    assert found[2].dtype == dtype
    for value, other, truth in zip(found, eager, wanted, strict=True):
        error, allowed = ((result.double() - truth).norm() for result in (value, other))
        # The interpreter cuts bfloat16 off where a GPU rounds to the nearest, which doubles the error.
        cut_off = 2.1 if DEVICE == "cpu" and value.dtype == torch.bfloat16 else 1.02
        # Values have the rounding errors of float32, whose last digit is luck.
        assert error <= cut_off * allowed + 1e-6 * truth.norm()


def test_student_and_teacher_of_different_precision() -> None:
    student, teacher, y = problem(5, 6)
    low = student.bfloat16()
    assert_exact(run(low, teacher, y, 4, "triton"), exact(low, teacher, y, 4), rtol=8e-3, dtype=torch.bfloat16)


@pytest.mark.usefixtures("poisoned")
def test_uninitialised_memory_never_shows() -> None:
    arguments = problem(7, 9)
    assert_exact(run(*arguments, 4, "triton"), exact(*arguments, 4))


def test_reads_the_features_twice_and_in_backward_once(launches: Counter[str]) -> None:
    arguments = problem(4, 5)
    run(*arguments, 4, "triton")
    run(*arguments, 4, "eager")
    passes = ("class_sums", "gap_sums", "feature_gradient")
    assert launches == {f"_prototype._{name}_kernel": 1 for name in passes}


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_two_runs_agree_bit_for_bit(backend: str) -> None:
    arguments = problem(21, 103)
    for one, other in zip(run(*arguments, 4, backend), run(*arguments, 4, backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_offsets_do_not_overflow() -> None:
    """More than 2^31 numbers in one tensor; only the last voxels are compared."""
    student = torch.randn(1, 32, 2, 6000, 6000, device="cuda", dtype=torch.bfloat16)
    teacher = student.roll(1, 1)
    y = torch.randint(2, (1, 2, 6000, 6000), device="cuda", dtype=torch.uint8)
    _, _, found = run(student, teacher, y, 2, "triton", upstream=(1e9,))
    _, _, eager = run(student, teacher, y, 2, "eager", upstream=(1e9,))
    torch.testing.assert_close(found[..., -1, -1, :], eager[..., -1, -1, :], rtol=2e-2, atol=1e-3)
