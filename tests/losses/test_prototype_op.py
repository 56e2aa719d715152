"""The operation of prototype distillation: registration, derivatives, precision, what it keeps and what it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from passion_plugin.errors import ConfigError, InputError
from passion_plugin.losses import _common, prototype_distillation
from passion_plugin.losses._prototype import _prototype_gradient_op, _prototype_op, plain_prototype_distillation

K = 4


def problem(
    *spatial: int, batch: int = 2, width: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher with two more channels, labels in which class 3 is missing."""
    student = torch.randn(batch, width, *spatial, dtype=dtype, requires_grad=True)
    return student, torch.randn(batch, width + 2, *spatial, dtype=dtype), torch.randint(K - 1, (batch, *spatial))


def terms(student: Tensor, teacher: Tensor, y: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return prototype_distillation(student, teacher, y, K, **settings)


def gradient(loss: Tensor, student: Tensor, upstream: Tensor | None = None) -> Tensor:
    upstream = torch.linspace(-1, 2, len(loss)).to(loss) if upstream is None else upstream
    return torch.autograd.grad(loss, student, upstream, retain_graph=True)[0]


@pytest.mark.parametrize(
    "settings", [(K, False, None, "auto"), (K, True, None, "auto"), (K, False, 1, "auto")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_operations_pass_opcheck(settings: tuple[Any, ...], dtype: torch.dtype) -> None:
    student, teacher, y = problem(3, 5, dtype=dtype)
    torch.library.opcheck(_prototype_op, (student, teacher, y, *settings))
    _, _, *small = _prototype_op(student, teacher, y, *settings)
    fixed = (student.detach(), teacher, y, *small, *settings)
    torch.library.opcheck(_prototype_gradient_op, (torch.rand(2), *fixed))


def test_operations_pass_opcheck_with_masks_and_channels_last() -> None:
    student, teacher, y = problem(2, 3, 4)
    student = student.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    masks = y.unsqueeze(1) == torch.arange(K).view(1, K, 1, 1, 1)
    torch.library.opcheck(_prototype_op, (student, teacher, masks, K, False, None, "eager"))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("ignore_index", [None, 0, 255])
def test_equals_its_plain_definition(official: bool, ignore_index: int | None) -> None:
    student, teacher, y = problem(3, 4, 5)
    y[1].clamp_(max=1)
    y[:, 0, 0] = 255 if ignore_index == 255 else 2
    settings = (K, official, ignore_index)
    loss, distance, *_ = _prototype_op(student, teacher, y, *settings, "eager")
    plain = plain_prototype_distillation(student, teacher, y, *settings)
    torch.testing.assert_close((loss, distance), plain, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient(loss, student), gradient(plain[0], student), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("regions", [False, True])
def test_pieces_of_a_volume_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, regions: bool) -> None:
    student, teacher, y = problem(13, 15, 17)
    labels = torch.rand(2, K, 13, 15, 17) < 0.3 if regions else y
    whole = terms(student, teacher, labels)
    expected = gradient(whole[0], student)
    monkeypatch.setattr(_common, "_CHUNK_ELEMENTS", 1)
    pieces = terms(student, teacher, labels)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(pieces[0], student), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("ignore_index", [None, 0])
def test_derivatives_where_the_bounds_on_norms_act(ignore_index: int | None) -> None:
    student, teacher, y = problem(2, 3)
    with torch.no_grad():
        student[0, :, 0, 0] = 1e-6  # a short feature
        student[1].mul_(torch.where(y[1] == 1, 1e-6, 1.0))  # a short prototype

    def loss(s: Tensor) -> Tensor:
        return terms(s, teacher, y, ignore_index=ignore_index)[0]

    assert torch.autograd.gradcheck(loss, student, eps=1e-8, atol=1e-3, rtol=1e-5)
    plain = plain_prototype_distillation(student, teacher, y, K, False, ignore_index)[0]
    torch.testing.assert_close(gradient(loss(student), student), gradient(plain, student), rtol=1e-9, atol=1e-12)


def test_second_derivatives() -> None:
    student, teacher, y = problem(2, 3)
    assert torch.autograd.gradgradcheck(lambda s: terms(s, teacher, y, ignore_index=2)[0], student)


def test_ignored_voxels_are_as_if_they_were_not_there() -> None:
    student, teacher, y = problem(6, 8, batch=1)
    y[:, :, 5:] = 255
    with_ignored = terms(student, teacher, y, ignore_index=255)
    cropped = terms(student[..., :5], teacher[..., :5], y[..., :5])
    torch.testing.assert_close(with_ignored, cropped, rtol=1e-12, atol=0)
    found = gradient(with_ignored[0], student)
    assert not found[..., 5:].any()
    torch.testing.assert_close(found, gradient(cropped[0], student), rtol=1e-10, atol=1e-15)


def test_a_class_may_be_ignored_and_so_may_everything() -> None:
    student, teacher, y = problem(4, 4)
    loss, distance = terms(student, teacher, torch.full_like(y, 2), ignore_index=2)
    assert not loss.any()
    assert not distance.any()
    assert not gradient(loss, student).any()
    kept = terms(student, teacher, y, ignore_index=0)
    assert bool((kept[0] != terms(student, teacher, y)[0]).all())


def test_a_number_that_labels_cannot_hold_ignores_nothing() -> None:
    student, teacher, y = problem(4, 4)
    for value, same in zip(
        terms(student, teacher, y.to(torch.uint8), ignore_index=256), terms(student, teacher, y), strict=True
    ):
        assert torch.equal(value, same)


def test_ignore_index_is_for_class_numbers_and_hides_no_other_value() -> None:
    student, teacher, y = problem(4, 4)
    with pytest.raises(ConfigError, match="ignore_index needs class numbers"):
        terms(student, teacher, torch.ones(2, K, 4, 4), ignore_index=0)
    with pytest.raises(InputError, match="values from 0 to 9"):
        terms(student, teacher, y.masked_fill(y == 2, 9), ignore_index=255)


def test_keeps_its_inputs_and_what_is_of_the_size_of_prototypes() -> None:
    student, teacher, y = problem(6, 7, 8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        terms(student, teacher, y)
    inputs = {tensor.data_ptr() for tensor in (student, teacher, y)}
    own = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    assert 0 < sum(tensor.numel() for tensor in own) < 100
    assert len(kept) - len(own) == 3


def test_inputs_are_left_as_they_are() -> None:
    arguments = problem(5, 5)
    before = [tensor.detach().clone() for tensor in arguments]
    terms(*arguments)[0].sum().backward()
    for after, kept in zip(arguments, before, strict=True):
        assert torch.equal(after, kept)


def test_backward_may_run_twice_and_is_linear_in_its_upstream() -> None:
    student, teacher, y = problem(5, 5)
    loss, _ = terms(student, teacher, y)
    once, again = gradient(loss, student), gradient(loss, student)
    assert torch.equal(once, again)
    assert not gradient(loss, student, torch.zeros(2, dtype=torch.float64)).any()
    only_second = gradient(loss, student, torch.tensor([0.0, -3.0], dtype=torch.float64))
    assert not only_second[0].any()
    torch.testing.assert_close(only_second[1], -1.5 * once[1])


def test_uninitialised_memory_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, y = problem(5, 5, dtype=torch.float32)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **rest: torch.full_like(tensor, torch.nan, **rest))
    loss, distance = terms(student, teacher, y)
    for values in (loss, distance, gradient(loss, student)):
        assert torch.isfinite(values).all()


def test_a_student_without_gradient_builds_no_graph() -> None:
    student, teacher, y = problem(4, 4)
    assert not terms(student.detach(), teacher.requires_grad_(), y)[0].requires_grad
    terms(student, teacher, y)[0].sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_come_in_the_dtype_of_the_student(dtype: torch.dtype) -> None:
    student, teacher, y = problem(6, 6, dtype=dtype)
    found = gradient(terms(student, teacher, y)[0], student)
    exact = student.detach().double().requires_grad_()
    expected = gradient(terms(exact, teacher.double(), y)[0], exact)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_backward_inside_autocast_stays_in_float32() -> None:
    student, teacher, y = problem(6, 6, dtype=torch.float32)
    expected = gradient(terms(student, teacher, y)[0], student)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(terms(student, teacher, y)[0], student), expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_has_the_layout_of_the_features(layout: torch.memory_format) -> None:
    student, teacher, y = problem(3, 4, width=5)
    student = student.detach().to(memory_format=layout).requires_grad_()
    assert gradient(terms(student, teacher, y)[0], student).stride() == student.stride()


def test_compiles_into_one_graph() -> None:
    student, teacher, y = problem(4, 5)
    compiled = torch.compile(lambda s: terms(s.tanh(), teacher, y)[0], backend="aot_eager", fullgraph=True)
    loss, expected = compiled(student), terms(student.tanh(), teacher, y)[0]
    assert torch.equal(loss, expected)
    assert torch.equal(gradient(loss, student), gradient(expected, student))


def test_a_backend_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    student, teacher, y = problem(2, 2)
    with pytest.raises(ConfigError, match="the tensor is float64"):
        terms(student, teacher, y, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="the tensor is on cpu"):
        terms(student.float(), teacher.float(), y, backend="triton")
    with pytest.raises(ConfigError, match=r"backend='trition' is unknown\. Did you mean 'triton'"):
        terms(student, teacher, y, backend="trition")
